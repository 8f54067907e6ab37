"""On a GPU: whatever takes tensors gives what it gives on the CPU, whichever of its arguments are where."""

import json

import numpy as np
import pytest
import torch
from encoders import HeadEncoder, PooledEncoder, TokenEncoder, random, seeded
from helpers import close
from PIL import Image
from test_cli import photos, run  # noqa: F401
from torch import nn

from captum_fam import (
    CorrespondenceMap,
    FeatureActivationMap,
    IntegratedDecomposition,
    LabelFreeActivationMap,
    Relax,
    ScoreCam,
    SimilarityDecomposition,
    SimilarityScore,
    compare_attributions,
    explain_episode,
    explain_retrieval,
    nearest_references,
    prototypes,
    to_input_space,
    visualize_comparison,
    visualize_pair,
)
from captum_fam.engine.chunks import cut_arguments
from captum_fam.metrics import rank_correlation, reference_dependence, road
from captum_fam.scenes import removal_effects, shared_object_scenes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

X, Y, OTHERS = random(3, 3, 8, 8), random(3, 3, 8, 8, seed=2), random(4, 3, 8, 8, seed=3)
S, LABELS = random(5, 6, seed=4), [0, 0, 1]
EARLY = {"n_steps": 4, "channel_weights": "jacobian"}
PLACES = [(x, s) for x in ("cpu", "cuda") for s in ("cpu", "cuda")]


class Index:
    """What explain_retrieval asks of a faiss index of inner products, without faiss."""

    metric_type, d, ntotal = 0, 6, 5

    def search(self, z, k):
        scores = z @ self.reconstruct_all().T
        found = np.argsort(-scores, 1)[:, :k]
        return np.take_along_axis(scores, found, 1), found

    def reconstruct_all(self):
        return S.float().numpy()

    def reconstruct(self, number):
        return self.reconstruct_all()[number]


def nearest(e, x, s):
    found = nearest_references(FeatureActivationMap(e, e.layer).embed(x), s, [3, 1, 1, 3, 7], k=3)
    return [found.predicted, found.scores, found.indices, found.reference_embedding]


def episode(e, x, s, **options):
    found = explain_episode(e, e.layer, x, X.to(s), LABELS, **options)
    return [found.scores, found.maps, found.map(torch.tensor([0, 1, 0])), found.contrast(1, 0)]


def retrieval(e, x, s):
    found = explain_retrieval(x, Index(), e, e.layer, torch.cat([X, Y]).to(s), k=3)
    return [found.indices, found.scores, found.maps, found.hit_maps, found.contrast(0, 1)]


def comparison(e, x, s):
    score = SimilarityScore(e, s)
    methods = ["FeatureActivationMap", "SimilarityDecomposition", "IntegratedDecomposition", "LabelFreeActivationMap"]
    methods += ["LayerGradCam", "RelevanceCam", "CorrespondenceMap", "Occlusion"]
    reference = random(5, 3, 8, 8).to(x)
    found = compare_attributions(score, e.layer, x, 2, methods, reference=reference, show_progress=False)
    assert not found.failures
    return list(found.values())


def measured(e, x, s):
    score, maps = SimilarityScore(e, s), random(3, 1, 4, 4).to(s)
    found = reference_dependence(score, x, maps, maps.flip(0), 1, 2)
    return [found.agreement, found.change, road(score, x, maps, target=1).score, rank_correlation(maps, x[:, :1])]


CALLS = {
    "decomposition": lambda e, x, s: SimilarityDecomposition(e, e.layer).attribute(x, 2, reference_embedding=s),
    "path": lambda e, x, s: SimilarityDecomposition(e, e.early, **EARLY).attribute_all(x, reference_embedding=s),
    "path from a baseline": lambda e, x, s: SimilarityDecomposition(
        e, e.early, n_steps=4, baseline=torch.zeros(5, 1, 1).to(s)
    ).attribute_all(x, reference_embedding=s),
    "matrix": lambda e, x, s: SimilarityDecomposition(e, e.layer).attribute_matrix(x, Y.to(x)),
    "matrix of paths": lambda e, x, s: list(
        SimilarityDecomposition(e, e.early, **EARLY).attribute_matrix(x, Y[:1].to(x), return_baselines=True)
    ),
    "matrix by the head": lambda e, x, s: SimilarityDecomposition(
        e, e.layer, channel_weights="jacobian"
    ).attribute_matrix(x, Y.to(x)),
    "integrated": lambda e, x, s: IntegratedDecomposition(e).attribute(x, [0, 4, 2], reference_embedding=s),
    "chunks": lambda e, x, s: IntegratedDecomposition(e, e.early).attribute_all(
        x, reference_embedding=s, internal_batch_size=2
    ),
    "targets": lambda e, x, s: FeatureActivationMap(e, e.layer).attribute(
        x, torch.tensor([1, 0, 2]).to(s.device), reference_embedding=s, contrast=torch.tensor([0, 1, 1]).to(s.device)
    ),
    "correspondence": lambda e, x, s: CorrespondenceMap(e, e.layer).attribute(x, [2, 1, 0], reference=Y.to(x)),
    "correspondence, rest": lambda e, x, s: CorrespondenceMap(e, e.layer).attribute_all(
        x, reference=Y.to(x), contrast="rest"
    ),
    "correspondence, another": lambda e, x, s: CorrespondenceMap(e, e.layer).attribute(
        x, torch.tensor([2, 1, 0]).to(s.device), reference=Y.to(x), contrast=torch.tensor([0, 0, 1]).to(s.device)
    ),
    "background": lambda e, x, s: CorrespondenceMap(e, e.layer, background=OTHERS.to(x)).attribute(
        x, 0, reference=Y.to(x)
    ),
    "correspondence of pairs": lambda e, x, s: list(CorrespondenceMap(e, e.layer).attribute_pair(x, Y.to(x))),
    "prototypes": lambda e, x, s: prototypes(s[:3], LABELS),
    "nearest": nearest,
    "episode": lambda e, x, s: episode(e, x, x),
    "episode, euclidean": lambda e, x, s: episode(
        e, x, x, similarity="euclidean", method=SimilarityDecomposition, internal_batch_size=2
    ),
    "retrieval": retrieval,
    "comparison": comparison,
    "metrics": measured,
    "input space": lambda e, x, s: to_input_space(random(3, 1, 4, 4).to(s), x),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("x", "s"), PLACES[2:])
@pytest.mark.filterwarnings("ignore:The places of layer", "ignore:The embeddings of the gallery")
@pytest.mark.parametrize("kind", [PooledEncoder, lambda: HeadEncoder(embedding=6)], ids=["aligned", "head"])
def test_what_is_on_a_gpu_gives_what_it_gives_on_the_cpu(kind, x, s, call):
    found, expected = (CALLS[call](seeded(kind).to(x), X.to(x), S.to(s)) for x, s in ((x, s), ("cpu", "cpu")))
    found, expected = (list(f) if isinstance(f, (tuple, list)) else [f] for f in (found, expected))
    close([f.cpu() for f in found], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [FeatureActivationMap, SimilarityDecomposition, LabelFreeActivationMap, ScoreCam])
def test_a_data_parallel_model_on_a_gpu_takes_inputs_in_the_memory_of_the_cpu(kind):
    encoder = seeded(PooledEncoder)
    expected = kind(encoder, encoder.layer).attribute(X, 2, reference_embedding=S)
    found = kind(nn.DataParallel(encoder.cuda()), encoder.layer).attribute(X, 2, reference_embedding=S)
    close(found.cpu(), expected, rtol=1e-6, atol=1e-8)


def test_relax_takes_a_data_parallel_model_and_inputs_in_the_memory_of_the_cpu():
    encoder = seeded(PooledEncoder)
    expected = Relax(encoder, n_samples=8).attribute(X, 2, reference_embedding=S)
    found = Relax(nn.DataParallel(encoder.cuda()), n_samples=8).attribute(X, 2, reference_embedding=S)
    close(found.cpu(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), slice(1, 3)])
@pytest.mark.parametrize(("there", "here"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_arguments_are_cut_wherever_they_are(there, here, rows):
    given = torch.arange(3.0)
    moved = rows.to(here) if isinstance(rows, torch.Tensor) else rows
    (cut,) = cut_arguments(given.to(there), moved, 3)
    close(cut.cpu(), given[rows])


def test_the_places_of_tokens_are_found_on_a_gpu():
    encoder = seeded(TokenEncoder)
    x, y, s = random(2, 3, 12, 12), random(2, 3, 12, 12, seed=2), random(4, 6, seed=3)
    methods = [FeatureActivationMap(encoder, encoder.layer), SimilarityDecomposition(encoder, encoder.layer)]
    expected = [m.attribute_all(x, reference_embedding=s) for m in methods] + [methods[1].attribute_matrix(x, y)]
    encoder.cuda()
    x, y, s = x.cuda(), y.cuda(), s.cuda()
    found = [m.attribute_all(x, reference_embedding=s) for m in methods] + [methods[1].attribute_matrix(x, y)]
    close([f.cpu() for f in found], expected, rtol=1e-6, atol=1e-8)


def test_figures_are_drawn_of_what_is_on_a_gpu():
    maps, images = random(1, 1, 4, 4).cuda(), torch.rand(1, 3, 8, 8).cuda()
    visualize_pair(images, images, maps, maps, use_pyplot=False)
    visualize_comparison(images, {"FAM": maps}, use_pyplot=False)


def test_scenes_are_explained_by_an_encoder_on_a_gpu():
    noise = np.random.default_rng(0).integers(0, 256, (14, 24, 24, 3), np.uint8)
    scenes = shared_object_scenes([Image.fromarray(a) for a in noise], [i // 2 for i in range(14)], 2, size=64)
    encoder = seeded(PooledEncoder).float()
    expected = removal_effects(encoder, scenes)
    on_gpu = encoder.cuda()
    close(removal_effects(lambda x: on_gpu(x.cuda()), scenes).cpu(), expected, rtol=1e-3, atol=1e-5)


def test_the_command_line_explains_on_a_gpu(run, photos, tmp_path):  # noqa: F811
    paths, scores = [photos / n for n in ("query.png", "cat.jpg", "coffee.png")], []
    for device in ("cpu", "cuda", "cuda:0"):
        status, out, err = run("explain", *paths, "--json", "--device", device, "-o", tmp_path / "out.png")
        assert status == 0, err
        scores.append([r["score"] for r in json.loads(out)["references"]])
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)
    assert scores[2] == pytest.approx(scores[0], abs=1e-3)


@pytest.mark.parametrize("command", ["compare", "batch"])
def test_other_commands_run_on_a_gpu(run, photos, tmp_path, command):  # noqa: F811
    if command == "compare":
        images, out = [photos / "query.png", photos / "cat.jpg"], tmp_path / "out.png"
    else:
        pytest.importorskip("pyarrow")
        (tmp_path / "pairs.csv").write_text("query,reference\nquery.png,cat.jpg\nquery.png,coffee.png\n")
        images, out = [tmp_path / "pairs.csv", "--root", photos], tmp_path / "maps"
    status, _, err = run(command, *images, "-o", out, "--device", "cuda")
    assert status == 0, err
    assert out.exists()


def test_a_model_in_half_precision_on_a_gpu_has_the_maps_but_for_rounding():
    encoder = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    decomposition = SimilarityDecomposition(encoder, encoder[1])
    expected = decomposition.attribute_matrix(X, Y)
    for dtype in (torch.float16, torch.bfloat16):
        encoder.to("cuda", dtype)
        found = decomposition.attribute_matrix(X.to("cuda", dtype), Y.to("cuda", dtype))
        assert found.dtype == dtype
        close(found.cpu().double(), expected, rtol=0.1, atol=0.03 * expected.abs().max().item())


def test_autocast_on_a_gpu_has_the_maps_but_for_rounding():
    encoder = seeded(lambda: HeadEncoder(embedding=6)).float()
    fam, x, s = FeatureActivationMap(encoder, encoder.layer), X.float(), S.float()
    expected = fam.attribute_all(x, reference_embedding=s)
    encoder.cuda()
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype):
            found = fam.attribute_all(x.cuda(), reference_embedding=s.cuda())
        close(found.float().cpu(), expected, rtol=0.1, atol=0.03 * expected.abs().max().item())
