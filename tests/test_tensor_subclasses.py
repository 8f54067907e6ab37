"""Tensors of a subclass, wherever they come from: every public call gives what it gives for plain ones."""

import warnings

import numpy as np
import pytest
import torch
from encoders import HeadEncoder, PooledEncoder, TokenEncoder, random, seeded
from helpers import close
from PIL import Image
from torch import nn
from torchvision import tv_tensors

from captum_fam import (
    ClassActivationMap,
    CorrespondenceMap,
    FeatureActivationMap,
    IntegratedDecomposition,
    LabelFreeActivationMap,
    Relax,
    RelevanceCam,
    ScoreCam,
    SimilarityDecomposition,
    SimilarityScore,
    channel_contributions,
    channels_last,
    compare_attributions,
    contribution_weights,
    explain_episode,
    explain_retrieval,
    explanation_func,
    metrics,
    nearest_references,
    patch_tokens,
    prototypes,
    to_input_space,
    visualize_comparison,
    visualize_pair,
)
from captum_fam.scenes import removal_effects, shared_object_scenes


class Kept(torch.Tensor):
    """Stays what it is in whatever is done with it, as fastai's images do."""


class Placed(torch.Tensor):
    """Has an attribute that goes along, and is combined with none of another."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        places = {a.place for a in args if isinstance(a, Placed) and hasattr(a, "place")}
        assert len(places) < 2
        if isinstance(result, Placed) and places:
            (result.place,) = places
        return result


KINDS = {"kept": Kept, "placed": Placed, "torchvision": tv_tensors.Image}
X, Y, S = random(3, 3, 16, 16), random(3, 3, 16, 16, seed=2), random(5, 4, seed=3)
LABELS = [0, 0, 1, 1, 2, 2]
SUPPORT = random(6, 3, 16, 16, seed=4)
MASKS = torch.zeros(3, 16, 16, dtype=torch.bool)
MASKS[:, 3:9, 4:12] = True
HEAD, POOLED, FLOAT = seeded(HeadEncoder), seeded(PooledEncoder), seeded(HeadEncoder).float()
TOKENS = seeded(lambda: TokenEncoder(grid=4))


class Wrapping(HeadEncoder):
    """Its activations and embeddings are of the subclass, whatever comes in."""

    def __init__(self, as_kind):
        super().__init__()
        self.as_kind = as_kind

    def features(self, x):
        return self.as_kind(super().features(x.as_subclass(torch.Tensor)))


def methods(encoder, **options):
    layer = encoder.layer
    yield FeatureActivationMap(encoder, layer, **options)
    yield FeatureActivationMap(encoder, layer, n_steps=3, **options)
    yield SimilarityDecomposition(encoder, layer, **options)
    yield SimilarityDecomposition(encoder, layer, similarity="dot", n_steps=3, baseline="zero", **options)
    yield SimilarityDecomposition(encoder, layer, similarity="euclidean", **options)
    yield CorrespondenceMap(encoder, layer, **options)
    yield ScoreCam(encoder, layer, **options)


def every(t, encoder):
    """What the methods for similarities give, by method and call."""
    for number, method in enumerate(methods(encoder)):
        name = f"{number} {type(method).__name__}"
        yield f"{name}.attribute", lambda m=method: m.attribute(t(X), reference=t(Y))
        if not isinstance(method, CorrespondenceMap):
            yield f"{name} by embedding", lambda m=method: m.attribute(t(X), 1, reference_embedding=t(S))
            yield f"{name} contrast", lambda m=method: m.attribute(t(X), 1, reference_embedding=t(S), contrast="rest")
        if hasattr(method, "attribute_all"):
            yield f"{name}.attribute_all", lambda m=method: m.attribute_all(t(X), reference=t(Y))
        if hasattr(method, "attribute_pair"):
            yield f"{name}.attribute_pair", lambda m=method: m.attribute_pair(t(X), t(Y))
        if hasattr(method, "attribute_matrix") and method._similarity() != "euclidean":
            yield f"{name}.attribute_matrix", lambda m=method: m.attribute_matrix(t(X), t(Y))
        if hasattr(method, "embed"):
            yield f"{name}.embed", lambda m=method: m.embed(t(X))
        if getattr(method, "n_steps", None):
            yield (
                f"{name} delta",
                lambda m=method: m.attribute(t(X), reference=t(Y), return_convergence_delta=True),
            )


def attributions(t):
    yield from every(t, HEAD)
    yield (
        "baseline",
        lambda: SimilarityDecomposition(HEAD, HEAD.layer, n_steps=3, baseline=t(random(1, 6, 8, 8))).attribute(
            t(X), reference=t(Y)
        ),
    )
    yield "integrated", lambda: IntegratedDecomposition(HEAD).attribute(t(X), reference=t(Y))
    yield "aligned", lambda: SimilarityDecomposition(POOLED, POOLED.layer).attribute(t(X), reference=t(Y))
    yield "aligned matrix", lambda: SimilarityDecomposition(POOLED, POOLED.layer).attribute_matrix(t(X), t(Y))
    yield "background", lambda: CorrespondenceMap(HEAD, HEAD.layer).attribute(t(X), reference=t(Y), contrast=t(SUPPORT))
    yield "label-free", lambda: LabelFreeActivationMap(HEAD, HEAD.layer).attribute(t(X))
    yield (
        "class",
        lambda: ClassActivationMap(seeded(lambda: nn.Sequential(POOLED, nn.Linear(6, 3))), POOLED.layer).attribute(
            t(X), 1
        ),
    )
    yield "relevance", lambda: RelevanceCam(RELEVANT, RELEVANT[1]).attribute(t(X), reference=t(Y))
    yield "relax", lambda: Relax(HEAD, n_samples=3).attribute(t(X), reference=t(Y))
    yield (
        "layer input",
        lambda: SimilarityDecomposition(HEAD, HEAD.layer).attribute(
            t(X), attribute_to_layer_input=True, reference=t(Y)
        ),
    )
    yield (
        "chunks",
        lambda: SimilarityDecomposition(HEAD, HEAD.layer).attribute(t(X), reference=t(Y), internal_batch_size=1),
    )
    yield (
        "tokens",
        lambda: SimilarityDecomposition(TOKENS, TOKENS.layer, reshape_transform=patch_tokens(4, 4)).attribute(
            t(X), reference=t(Y)
        ),
    )
    yield "channels last", lambda: channels_last(t(X))
    fam, one, targets = FeatureActivationMap(HEAD, HEAD.layer), t(torch.tensor([2])), t(torch.tensor([2, 0, 4]))
    yield "target", lambda: fam.attribute(t(X), targets, reference_embedding=t(S), contrast=t(torch.tensor([1, 1, 0])))
    yield "one target", lambda: fam.attribute(t(X), one, reference_embedding=t(S))
    yield "not finite", lambda: fam.attribute(t(X / (torch.arange(3) != 1)[:, None, None, None]), reference=t(Y))


RELEVANT = seeded(
    lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
)


def tools(t):
    score = SimilarityScore(HEAD, t(S))
    maps = random(3, 1, 8, 8, seed=5).abs()
    fam = FeatureActivationMap(HEAD, HEAD.layer)
    yield "score", lambda: score(t(X)).detach()
    yield "prototypes", lambda: prototypes(t(SUPPORT.flatten(1)), LABELS)
    yield "contributions", lambda: channel_contributions(t(S[:3]), t(S[1:4]))
    yield "weights", lambda: contribution_weights(t(S))
    yield "nearest", lambda: list(nearest_references(t(S[:2]), t(S), torch.arange(5), k=2))[:2]
    yield "func", lambda: explanation_func(fam)(t(X), reference=t(Y))
    yield "input space", lambda: to_input_space(t(maps), t(X))
    yield (
        "compare",
        lambda: list(
            compare_attributions(
                score, HEAD.layer, t(X), 1, methods=["FeatureActivationMap", "LayerGradCam"], show_progress=False
            ).values()
        ),
    )
    yield (
        "figure of pairs",
        lambda: drawn(visualize_pair(t(X.sigmoid()), t(Y.sigmoid()), t(maps), t(maps - 1), use_pyplot=False)),
    )
    yield (
        "figure",
        lambda: drawn(
            visualize_comparison(t(X), {"a": t(maps), "b": t(maps - 1)}, mean=[0.5], std=[0.2], use_pyplot=False)
        ),
    )
    yield "retrieval", lambda: retrieval(t).maps
    yield "retrieval contrast", lambda: retrieval(t).contrast(0, 1)
    yield "episode", lambda: episode(t).maps
    yield "episode contrast", lambda: episode(t).contrast(0, "rest")
    yield "episode margin", lambda: episode(t).margin(0, "rest")
    yield "pointing", lambda: metrics.pointing_game(t(maps), MASKS)
    yield "pointing, in a subclass", lambda: metrics.pointing_game(t(maps), t(MASKS))
    yield "energy", lambda: metrics.energy_pointing_game(t(maps), t(MASKS))
    yield "rank accuracy", lambda: metrics.relevance_rank_accuracy(t(maps), t(MASKS))
    yield "iou", lambda: metrics.iou(t(maps), t(MASKS))
    yield "boxes", lambda: metrics.box_masks([t(torch.tensor([1.0, 0, 3, 1]))], (2, 4))
    for name in ("deletion", "insertion"):
        for baselines in ("blur", "mean", t(X.mean((0, 2, 3), keepdim=True))):
            yield (
                f"{name} {baselines if isinstance(baselines, str) else 'tensor'}",
                lambda n=name, b=baselines: getattr(metrics, n)(score, t(X), t(maps), b, target=1, n_steps=2).auc,
            )
    yield "road", lambda: metrics.road(score, t(X), t(maps), target=1, percentages=[50]).morf
    yield "drop", lambda: metrics.average_drop(score, t(X), t(maps), target=1)
    yield "increase", lambda: metrics.average_increase(score, t(X), t(maps), target=1)
    yield "ranks", lambda: metrics.rank_correlation(t(maps), t(maps.flip(2)))
    yield (
        "randomised",
        lambda: metrics.cascading_randomization(fam.attribute, HEAD, t(X), reference=t(Y)).rank_correlation,
    )
    yield (
        "dependence",
        lambda: metrics.reference_dependence(score, t(X), t(maps), t(maps.flip(2)), target=1, other_target=0).change,
    )
    yield "removed", lambda: removal_effects(lambda x: FLOAT(t(x)), SCENES)


NOISE = np.random.default_rng(0).integers(0, 256, (14, 24, 24, 3), dtype=np.uint8)
SCENES = shared_object_scenes([Image.fromarray(a) for a in NOISE], [i // 2 for i in range(14)], n_pairs=2, size=32)


def episode(t):
    return explain_episode(HEAD, HEAD.layer, t(X), t(SUPPORT), t(torch.tensor(LABELS)))


def retrieval(t):
    """From an index whose vectors have unit length, unlike the embeddings, which is warned about."""
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(4)
    index.add(nn.functional.normalize(FLOAT(SUPPORT.float())).detach().numpy())
    return explain_retrieval(t(X.float()), index, FLOAT, FLOAT.layer, t(SUPPORT.float()), k=2)


def drawn(figure):
    """Pictures, maps with their opacity, and what is written under them."""
    images = [image for axis in figure[1].flat for image in axis.images]
    values = [torch.from_numpy(np.asarray(image.get_array(), np.float64)) for image in images]
    return [*values, *(axis.get_xlabel() for axis in figure[1].flat)]


def plain(result):
    """Results, in whatever they come, as plain tensors."""
    if isinstance(result, (tuple, list)):
        return [plain(r) for r in result]
    return result.detach().as_subclass(torch.Tensor) if isinstance(result, torch.Tensor) else result


def outcome(call):
    """The result of a call and what it warned of."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return plain(call()), [str(w.message) for w in caught]


def of_kind(kind):
    def wrapped(values):
        made = values.as_subclass(kind)
        if kind is Placed:
            made.place = "here"
        return made

    return wrapped


def names(calls):
    return [name for name, _ in calls(lambda values: values)]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", names(attributions) + names(tools))
def test_every_call_gives_what_it_gives_for_tensors(kind, name):
    (found, said), (expected, also_said) = (
        outcome(dict([*attributions(t), *tools(t)])[name]) for t in (of_kind(kind), lambda values: values)
    )
    same(found, expected)
    assert said == also_said


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", [name for name, _ in every(of_kind(Kept), HEAD)])
def test_a_layer_and_an_encoder_may_give_a_subclass(kind, name):
    encoder = seeded(lambda: Wrapping(of_kind(kind)))
    encoder.load_state_dict(HEAD.state_dict())
    (found, said), (expected, also_said) = (
        outcome(dict(every(lambda values: values, e))[name]) for e in (encoder, HEAD)
    )
    same(found, expected)
    assert said == also_said


def same(found, expected):
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            same(one, other)
    elif isinstance(expected, torch.Tensor):
        close(found, expected)
    else:
        assert found == expected
