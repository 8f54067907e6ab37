"""FAM and SimilarityScore in the hands of Captum's other tools, and in the forms of Captum's own generic tests."""

import copy
import functools
import threading

import matplotlib.pyplot as plt
import numpy as np
import pytest
import reference
import torch
from captum.attr import (
    ClassSummarizer,
    GuidedBackprop,
    GuidedGradCam,
    LayerAttribution,
    LayerGradCam,
    Max,
    Mean,
    Min,
    NoiseTunnel,
    StdDev,
    Summarizer,
    Var,
    visualization,
)
from captum.concept import TCAV, Classifier, Concept
from captum.robust import FGSM, AttackComparator, MinParamPerturbation
from encoders import HeadEncoder, PooledEncoder, TwoInputEncoder, random, seeded
from helpers import close
from torch import nn

from captum_fam import FeatureActivationMap, SimilarityScore

try:  # as early as the tests are collected: its configurations are their parameters
    from captum.attr._models.base import _set_deep_layer_value
    from captum.testing.attr.helpers.gen_test_utils import get_target_layer, parse_test_config
    from captum.testing.attr.helpers.test_config import config as captums_config
    from captum.testing.helpers import basic_models
except ModuleNotFoundError:
    captums_config = None

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")

KINDS = [PooledEncoder, HeadEncoder]
SIMILARITIES = ["cosine", "dot", "euclidean"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
each_kind = pytest.mark.parametrize("kind", KINDS)
each_similarity = pytest.mark.parametrize("similarity", SIMILARITIES)


def scored(kind=HeadEncoder, K=3, similarity="cosine"):
    """An encoder, its score for K references, and FAM on that."""
    encoder = seeded(kind)
    D = encoder(random(1, 3, 8, 8)).shape[1]
    score = SimilarityScore(encoder, random(K, D, seed=2), similarity)
    return encoder, score, FeatureActivationMap(score, encoder.layer)


# The same a second time: the encoders' passes written out, the weights from reference.py


def features(encoder, x, relu=torch.relu):
    """The two feature maps of the convolutional encoders."""
    early = relu(encoder.conv1(x))
    return early, relu(encoder.conv2(early))


def embedding(encoder, last):
    z = last.mean((2, 3))
    return encoder.head(z) if hasattr(encoder, "head") else z


def cosines(z, s):
    return torch.stack([(z * s_k).sum(1) / (z.square().sum(1).sqrt() * s_k.square().sum().sqrt()) for s_k in s], 1)


def scores(z, s, similarity="cosine"):
    """Scores (B, K), in NumPy."""
    z, s = (np.asarray(torch.as_tensor(v).detach()) for v in (z, s))
    return np.array([[reference.contributions(z_b, s_k, similarity).sum() for s_k in s] for z_b in z])


def terms(encoder, x, s, targets, at="layer", **question):
    """The terms N f.dz/dA_ki A_ki of FAM by the cosine (B, C, h, w), for each input's own reference."""
    early, last = features(encoder, x)
    A = (early if at == "early" else last).detach().requires_grad_()
    z = embedding(encoder, torch.relu(encoder.conv2(A)) if at == "early" else A)
    f = [
        reference.pair_weights(z_b, s.numpy(), target, "cosine", **question)
        for z_b, target in zip(z.detach().numpy(), targets, strict=True)
    ]
    (gradient,) = torch.autograd.grad((torch.tensor(np.array(f)) * z).sum(), A)
    return (A.shape[2] * A.shape[3] * gradient * A).detach()


def fam_map(*args, **options):
    return terms(*args, **options).sum(1, keepdim=True)


def doubled(maps):
    """Nearest-neighbour interpolation of the encoders' maps to the size of their inputs."""
    return maps.repeat_interleave(2, 2).repeat_interleave(2, 3)


@each_kind
@pytest.mark.parametrize("at", ["layer", "early"])
@pytest.mark.parametrize(
    "question", [{}, {"contrast": 2}, {"contrast": "rest"}, {"contrast": "self"}, {"threshold": 0.3}], ids=str
)
def test_the_written_out_maps_are_those_of_fam(kind, at, question):
    encoder, score, fam = scored(kind)
    x, s = random(2, 3, 8, 8), score.reference_embedding
    fam.layer = getattr(encoder, at)
    close(fam.attribute(x, [1, 0], **question), fam_map(encoder, x, s, [1, 0], at, **question))
    by_channel = fam.attribute(x, [1, 0], attr_dim_summation=False, **question)
    close(by_channel, terms(encoder, x, s, [1, 0], at, **question))


# Noise tunnels


@each_kind
@pytest.mark.parametrize(
    ("nt_type", "statistic"),
    [
        ("smoothgrad", lambda maps: maps.mean(0)),
        ("smoothgrad_sq", lambda maps: maps.square().mean(0)),
        ("vargrad", lambda maps: maps.var(0, unbiased=False)),
    ],
)
def test_each_noise_tunnel_is_its_statistic_of_the_maps_of_noisy_inputs(nt_type, statistic, kind):
    encoder, score, fam = scored(kind)
    x, seen, targets = random(2, 3, 8, 8), [], [2, 0]
    handle = encoder.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    result = NoiseTunnel(fam).attribute(x, nt_type=nt_type, nt_samples=5, stdevs=0.3, target=torch.tensor(targets))
    handle.remove()
    noisy = torch.cat(seen).reshape(2, 5, 3, 8, 8)  # examples, samples
    for b, target in enumerate(targets):
        maps = fam_map(encoder, noisy[b], score.reference_embedding, [target] * 5)
        assert maps.var(0).max() > 0
        close(result[b], statistic(maps), rtol=1e-7)


def test_a_noise_tunnel_hands_the_arguments_of_attribute_on():
    encoder, score, fam = scored()
    x = random(2, 3, 8, 8)
    result = NoiseTunnel(fam).attribute(x, nt_samples=3, stdevs=0.0, target=[1, 0], attr_dim_summation=False)
    close(result, terms(encoder, x, score.reference_embedding, [1, 0]))
    bare = FeatureActivationMap(encoder, encoder.conv2)
    options = {"attribute_to_layer_input": True, "reference_embedding": score.reference_embedding}
    result = NoiseTunnel(bare).attribute(x, nt_samples=3, stdevs=0.0, target=[1, 0], **options)
    close(result, fam_map(encoder, x, score.reference_embedding, [1, 0], at="early"))


def test_a_noise_tunnel_of_a_layer_that_gives_a_tuple_gives_a_tuple():
    encoder, inputs = seeded(TwoInputEncoder), (random(2, 3, 8, 8), random(2, 1, 9, 9))
    fam = FeatureActivationMap(SimilarityScore(encoder, random(3, 3)), encoder.layer)
    result = NoiseTunnel(fam).attribute(inputs, nt_samples=3, stdevs=0.0, target=[2, 1])
    assert isinstance(result, tuple)
    close(result, fam.attribute(inputs, [2, 1]))


# TCAV


class MeanDirections(Classifier):
    """A concept's vector is the mean of its activations less the mean of all; classes come in falling order."""

    def __init__(self):
        self.means = {}

    def train_and_eval(self, dataloader, **kwargs):
        batches = [(activations, int(label)) for activations, labels in dataloader for label in labels.unique()]
        for label in sorted({label for _, label in batches}, reverse=True):
            self.means[label] = torch.cat([a for a, own in batches if own == label]).mean(0)

    def weights(self):
        means = torch.stack(list(self.means.values()))
        return means - means.mean(0)

    def classes(self):
        return list(self.means)


@each_kind
@pytest.mark.parametrize("on", ["the score", "the encoder"])
def test_tcav_scores_concepts_by_the_terms_of_fam(on, kind, tmp_path):
    encoder, score, fam = scored(kind)
    examples = [random(4, 3, 8, 8, seed=seed) for seed in (5, 6)]
    concepts = [Concept(i, f"concept{i}", [e[:2], e[2:]]) for i, e in enumerate(examples)]
    x, targets, s = random(7, 3, 8, 8), [2, 0, 1, 1, 0, 2, 0], score.reference_embedding
    model, prefix, options = score, "encoder.", {}
    if on == "the encoder":
        model, prefix, options = encoder, "", {"reference_embedding": s}
        fam = FeatureActivationMap(encoder, encoder.layer)
    counts = []
    for layer, layer_input, at in [("layer", False, "layer"), ("early", False, "early"), ("conv2", True, "early")]:
        tcav = TCAV(
            model,
            [prefix + layer],
            classifier=MeanDirections(),
            layer_attr_method=fam,
            attribute_to_layer_input=layer_input,
            save_path=str(tmp_path / layer),
        )
        results = tcav.interpret(x, [concepts], target=targets, attr_dim_summation=False, **options)

        activations = [features(encoder, e)[at == "layer"].flatten(1).detach() for e in examples]
        vectors = torch.stack([a.mean(0) for a in activations])
        products = terms(encoder, x, s, targets, at).flatten(1) @ (vectors - vectors.mean(0)).T
        result = results["0-1"][prefix + layer]
        assert torch.equal(result["sign_count"], (products > 0).float().mean(0))
        close(result["magnitude"], products.mean(0).float(), rtol=1e-4, atol=1e-6)
        counts += result["sign_count"].tolist()
    assert any(0 < count < 1 for count in counts)


# Guided Grad-CAM


class GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient.clamp(min=0) * (x > 0)


def guided_gradient(encoder, s, x, targets):
    x = x.clone().requires_grad_()
    z = embedding(encoder, features(encoder, x, GuidedReLU.apply)[1])
    (gradient,) = torch.autograd.grad(cosines(z, s)[range(len(x)), targets].sum(), x)
    return gradient


@each_kind
@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_guided_grad_cam_explains_a_score(kind):
    encoder, score, _ = scored(kind)
    x, targets, s = random(3, 3, 8, 8), [2, 0, 1], score.reference_embedding
    A = features(encoder, x)[1].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(cosines(embedding(encoder, A), s)[range(3), targets].sum(), A)
    grad_cam = (gradient.mean((2, 3), keepdim=True) * A).sum(1, keepdim=True).clamp(min=0).detach()
    assert grad_cam.any()
    expected = guided_gradient(encoder, s, x, targets) * doubled(grad_cam)
    assert expected.any()
    close(GuidedGradCam(score, encoder.layer).attribute(x, target=targets), expected)


@each_kind
@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_fam_takes_the_place_of_grad_cam_in_guided_grad_cam(kind):
    encoder, score, fam = scored(kind)
    x, targets, s = random(3, 3, 8, 8), [2, 0, 1], score.reference_embedding
    maps = fam_map(encoder, x, s, targets)
    assert kind is PooledEncoder or (maps < 0).any()
    expected = guided_gradient(encoder, s, x, targets) * doubled(maps.clamp(min=0))
    assert expected.any()
    guided = GuidedGradCam(score, encoder.layer)
    guided.grad_cam = fam
    close(guided.attribute(x, target=targets), expected)
    upsampled = LayerAttribution.interpolate(fam.attribute(x, targets, relu_attributions=True), (8, 8))
    close(GuidedBackprop(score).attribute(x, targets) * upsampled, expected)


# Attacks


def score_gradients(z, s, similarity):
    """d score_k / dz, (B, K, D), for the scores of z itself."""
    z, s = z[:, None], s[None]
    if similarity == "dot":
        return s.expand(len(z), -1, -1)
    if similarity == "euclidean":
        return -2 * (z - s)
    length, unit = z.norm(dim=2, keepdim=True), s / s.norm(dim=2, keepdim=True)
    cosine = (z / length * unit).sum(2, keepdim=True)
    return (unit - cosine * z / length) / length


@each_similarity
@pytest.mark.parametrize("targeted", [False, True])
def test_fgsm_moves_inputs_along_the_sign_of_the_gradient_of_the_loss(targeted, similarity):
    x, s, target = random(3, 2, 2, 2), random(4, 8, seed=2), torch.tensor([2, 0, 3])
    score = SimilarityScore(nn.Flatten(), s, similarity)
    attack = FGSM(score, nn.CrossEntropyLoss(reduction="none"), lower_bound=-1.5)
    result = attack.perturb(x, 0.1, target, targeted=targeted)

    p = torch.tensor(scores(x.flatten(1), s, similarity)).softmax(1)
    gradient = ((p - nn.functional.one_hot(target, 4))[:, :, None] * score_gradients(x.flatten(1), s, similarity)).sum(
        1
    )
    assert (gradient.abs() > 1e-6).all()  # below, FGSM leaves a value alone
    step = (-0.1 if targeted else 0.1) * gradient.sign().reshape(x.shape)
    close(result, (x + step).clamp(min=-1.5))


def test_fgsm_without_a_loss_lowers_the_score_of_each_examples_target():
    x, s = random(3, 2, 2, 2).abs(), random(4, 8, seed=2).abs()
    score = SimilarityScore(nn.Flatten(), s)  # cosines above zero, of which the default loss takes the logarithm
    result = FGSM(score).perturb(x, 1e-4, [2, 0, 3], mask=torch.tensor([1.0, 0.0]).expand_as(x))
    gradient = score_gradients(x.flatten(1), s, "cosine")[range(3), [2, 0, 3]].reshape(x.shape)
    assert (gradient.abs() > 1e-6).all()
    close(result, x - 1e-4 * gradient.sign() * torch.tensor([1.0, 0.0]))
    assert (score(result) < score(x))[range(3), [2, 0, 3]].all()


def erased(x, maps, n):
    """The inputs without the n places to which their maps give most."""
    order = maps.flatten(1).argsort(1, descending=True)
    kept = torch.ones_like(maps).flatten(1).scatter(1, order[:, :n], 0.0)
    return x * doubled(kept.reshape(maps.shape))


@each_kind
@pytest.mark.parametrize("perturbations_per_eval", [1, 3])
def test_an_attack_comparator_compares_what_attacks_do_to_a_score(perturbations_per_eval, kind):
    encoder, score, fam = scored(kind)
    s, fgsm = score.reference_embedding, FGSM(score, nn.CrossEntropyLoss(reduction="none"))
    brightness = iter(np.tile([0.3, -0.2, 0.1], 2))

    def score_of_target(out, target):
        return out[range(len(out)), target]

    comparator = AttackComparator(score, score_of_target)
    comparator.add_attack(fgsm, "FGSM", attack_kwargs={"epsilon": 0.1}, additional_attack_arg_names=["target"])
    comparator.add_attack(lambda x: x + next(brightness), "light", num_attempts=3)
    comparator.add_attack(
        lambda x, target: erased(x, fam.attribute(x, target), 6), "FAM", additional_attack_arg_names=["target"]
    )

    wanted = []
    for seed, target in ((1, torch.tensor([2, 0, 1])), (4, torch.tensor([1, 1, 0]))):
        x = random(3, 3, 8, 8, seed=seed)
        result = comparator.evaluate(x, perturbations_per_eval=perturbations_per_eval, target=target)

        def of_target(x, target=target):
            z = embedding(encoder, features(encoder, x)[1])
            return torch.tensor(scores(z, s)[range(3), target])

        light = torch.stack([of_target(x + value) for value in (0.3, -0.2, 0.1)])
        moved = x.clone().requires_grad_()
        out = cosines(embedding(encoder, features(encoder, moved)[1]), s)
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(out, target, reduction="sum"), moved)
        expected = {
            "Original": of_target(x),
            "FGSM": of_target(torch.where(gradient.abs() > 1e-6, x + 0.1 * gradient.sign(), x)),
            "light": {"mean": light.mean(0), "min": light.amin(0), "max": light.amax(0)},
            "FAM": of_target(erased(x, fam_map(encoder, x, s, target.tolist()), 6)),
        }
        close(result["Original"], expected["Original"])
        close(result["FGSM"]["mean"], expected["FGSM"])
        assert result["light"].keys() == expected["light"].keys()
        for name, values in expected["light"].items():
            close(result["light"][name], values)
        close(result["FAM"]["mean"], expected["FAM"])
        assert not torch.allclose(expected["FAM"], expected["Original"])
        wanted.append(expected)

    summary = comparator.summary()
    for name in ("Original", "FGSM", "FAM"):
        close(summary[name]["mean"], torch.stack([w[name].mean() for w in wanted]).mean(0))
    close(summary["light Min Attempt"]["mean"], torch.stack([w["light"]["min"].mean() for w in wanted]).mean(0))


@each_similarity
@pytest.mark.parametrize("mode", ["linear", "binary"])
def test_the_smallest_perturbation_that_changes_the_nearest_reference_is_found(mode, similarity):
    here, there = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, -3.0, 4.0])  # of one length: halfway, all tie
    score = SimilarityScore(nn.Flatten(), torch.stack([there, here]), similarity)
    search = MinParamPerturbation(
        score, lambda x, step: x + step / 15 * (there - here), "step", arg_min=0, arg_max=15, arg_step=1, mode=mode
    )
    for batch in (1, 4):
        moved, step = search.evaluate(here[None], target=1, perturbations_per_eval=batch if mode == "linear" else 1)
        assert step == 8
        close(moved, (here + 8 / 15 * (there - here))[None])
    never = MinParamPerturbation(score, lambda x, step: x * (1 + step), "step", 0, 15, 1, mode=mode)
    assert never.evaluate(here[None], target=1) == (None, None)


@each_kind
def test_the_fewest_places_of_a_map_without_which_another_reference_is_nearer_are_found(kind):
    encoder, x, found = seeded(kind), random(6, 3, 8, 8), []
    s = encoder(x).detach()
    score = SimilarityScore(encoder, s)  # each input is a reference too, its nearest
    fam = FeatureActivationMap(score, encoder.layer)
    for target, x_b in enumerate(x.split(1)):
        attack = functools.partial(lambda x, n, maps: erased(x, maps, n), maps=fam.attribute(x_b, target))
        search = MinParamPerturbation(score, attack, "n", arg_min=0, arg_max=8, arg_step=1)
        moved, fewest = search.evaluate(x_b, target=target, perturbations_per_eval=3)

        maps, changed = fam_map(encoder, x_b, s, [target]), []
        for n in range(8):
            z = embedding(encoder, features(encoder, erased(x_b, maps, n))[1])
            changed += [n] if scores(z, s).argmax() != target else []
        assert fewest == min(changed, default=None)
        if changed:
            close(moved, erased(x_b, maps, fewest))
        found.append(fewest)
    assert len(set(found)) > 1


# Summaries and pictures


@each_kind
def test_a_summarizer_collects_the_statistics_of_maps(kind):
    encoder, score, fam = scored(kind)
    x, targets = random(6, 3, 8, 8), [0, 2, 1, 0, 2, 0]
    maps = fam_map(encoder, x, score.reference_embedding, targets)
    summarizer = Summarizer([Mean(), Var("var", order=0), StdDev("std", order=1), Min(), Max()])
    for x_b, target in zip(x.split(1), targets, strict=True):
        summarizer.update(fam.attribute(x_b, target)[0])
    expected = {
        "mean": maps.mean(0),
        "var": maps.var(0, unbiased=False),
        "std": maps.std(0),
        "min": maps.amin(0),
        "max": maps.amax(0),
    }
    assert summarizer.summary.keys() == expected.keys()
    for name, values in expected.items():
        close(summarizer.summary[name], values)


def test_a_summarizer_of_classes_collects_the_maps_of_each_reference():
    encoder, score, fam = scored()
    x, targets = random(6, 3, 8, 8), [0, 2, 1, 0, 2, 0]
    maps = fam_map(encoder, x, score.reference_embedding, targets)
    summarizer = ClassSummarizer([Mean()])
    for part in (slice(0, 4), slice(4, 6)):
        summarizer.update(fam.attribute(x[part], targets[part]), targets[part])
    for k, summary in summarizer.class_summaries.items():
        (statistics,) = [summary] if isinstance(summary, dict) else summary
        close(statistics["mean"], maps[[target == k for target in targets]].mean(0))
    assert set(summarizer.class_summaries) == {0, 1, 2}


@pytest.mark.parametrize(
    ("sign", "part"), [("all", lambda m: m), ("positive", lambda m: m.clip(0)), ("absolute_value", np.abs)]
)
@pytest.mark.parametrize("method", ["heat_map", "blended_heat_map"])
def test_a_picture_of_a_map_shows_the_map(method, sign, part):
    encoder, score, fam = scored()
    x, photo = random(1, 3, 8, 8), (255 * random(8, 8, 3, seed=3).sigmoid()).int().numpy()
    open_figures = plt.get_fignums()
    maps = fam.attribute(x, 0, contrast="rest")
    attribution = LayerAttribution.interpolate(maps, (8, 8), "nearest")[0].permute(1, 2, 0).numpy()
    figure, axis = visualization.visualize_image_attr(
        attribution, photo, method, sign, use_pyplot=False, title="rest", fig_size=(3, 2), show_colorbar=True
    )

    shown = part(doubled(fam_map(encoder, x, score.reference_embedding, [0], contrast="rest"))[0, 0].numpy())
    assert sign != "all" or shown.min() < 0 < shown.max()
    sizes = np.sort(np.abs(shown), axis=None)  # all but the largest that make up 2 percent of their sum are in scale
    scale = sizes[np.flatnonzero(sizes.cumsum() >= 0.98 * sizes.sum())[0]]
    *behind, heat = axis.images
    np.testing.assert_allclose(heat.get_array(), (shown / scale).clip(-1, 1), rtol=1e-9, atol=1e-12)
    assert heat.get_clim() == ((-1, 1) if sign == "all" else (0, 1))
    assert len(behind) == (method == "blended_heat_map")
    for image in behind:
        np.testing.assert_allclose(image.get_array(), photo.mean(2))
    assert axis.get_title() == "rest"
    assert tuple(figure.get_size_inches()) == (3, 2)
    assert plt.get_fignums() == open_figures


# Forward functions


def in_a_thread(module):
    """A function that calls the module in a thread of its own, as DataParallel does, and gathers in the caller's."""

    def forward(*inputs):
        outputs, grad_enabled = [], torch.is_grad_enabled()

        def replica():
            with torch.set_grad_enabled(grad_enabled):
                outputs.append(module(*inputs))

        thread = threading.Thread(target=replica)
        thread.start()
        thread.join()
        return outputs[0].clone()

    return forward


def test_grad_cam_explains_a_function_that_applies_a_model_in_threads():
    encoder, score, _ = scored()
    x = random(2, 3, 8, 8)
    close(
        LayerGradCam(in_a_thread(score), encoder.layer, device_ids=[0]).attribute(x, [1, 0]),
        LayerGradCam(score, encoder.layer).attribute(x, [1, 0]),
    )


@each_kind
def test_device_ids_let_fam_explain_a_function_that_applies_a_model_in_threads(kind):
    encoder, score, _ = scored(kind)
    x, s = random(2, 3, 8, 8), score.reference_embedding
    fam = FeatureActivationMap(in_a_thread(encoder), encoder.layer, device_ids=[0])
    close(fam.attribute(x, [1, 0], reference_embedding=s), fam_map(encoder, x, s, [1, 0]))


@each_kind
def test_device_ids_and_a_function_around_a_data_parallel_encoder_give_the_maps_of_the_encoder(kind):
    encoder, score, _ = scored(kind)
    x, s = random(4, 3, 8, 8), score.reference_embedding
    expected = fam_map(encoder, x, s, [1, 0, 2, 2])
    encoder, ids = encoder.to(DEVICE), [0]
    parallel = nn.DataParallel(encoder, ids if DEVICE == "cuda" else None)
    for forward_func in (parallel, parallel.forward, lambda x: parallel(x)):
        fam = FeatureActivationMap(forward_func, encoder.layer, ids)
        assert fam.device_ids == ids
        close(fam.attribute(x.to(DEVICE), [1, 0, 2, 2], reference_embedding=s).cpu(), expected)


@each_kind
@pytest.mark.parametrize(
    "bind",
    [
        lambda score: score.forward,
        lambda score: score.__call__,
        lambda score: nn.DataParallel(score).forward,
    ],
    ids=["forward", "__call__", "of a DataParallel"],
)
def test_a_bound_method_of_a_score_is_explained_as_the_score(bind, kind):
    encoder, score, _ = scored(kind)
    x, s = random(2, 3, 8, 8), score.reference_embedding
    expected = fam_map(encoder, x, s, [1, 0]).to(DEVICE)
    fam = FeatureActivationMap(bind(score.to(DEVICE)), encoder.layer)
    close(fam.attribute(x.to(DEVICE), target=[1, 0]), expected)


def compiled(func):
    return torch.compile(func, backend="eager")


def compiled_in_place(encoder):
    encoder.compile(backend="eager")
    return encoder


deep = pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="this torch cannot run compiled parts of a model as they are"
)


@each_kind
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(compiled, id="module"),
        pytest.param(lambda encoder: compiled(nn.DataParallel(encoder)), id="DataParallel"),
        pytest.param(compiled_in_place, id="in place", marks=deep),
        pytest.param(lambda encoder: nn.Sequential(compiled(encoder)), id="part of a module", marks=deep),
        pytest.param(lambda encoder: nn.DataParallel(compiled(encoder)), id="in DataParallel", marks=deep),
        pytest.param(lambda encoder: compiled(encoder).forward, id="bound method", marks=deep),
        pytest.param(lambda encoder: compiled(lambda x: encoder(x)), id="function", marks=deep),
    ],
)
@pytest.mark.filterwarnings("ignore:Dynamo")
def test_a_compiled_encoder_that_has_run_gives_the_maps_of_the_encoder(wrap, kind):
    torch.compiler.reset()
    encoder, score, _ = scored(kind)
    x, s = random(2, 3, 8, 8), score.reference_embedding
    expected = fam_map(encoder, x, s, [1, 0]).to(DEVICE)
    x, wrapped = x.to(DEVICE), wrap(encoder.to(DEVICE))
    before = wrapped(x)
    with torch.no_grad():  # compiled a second time for this mode: what FAM calls would run past its hooks
        wrapped(x)
    on_encoder = FeatureActivationMap(wrapped, encoder.layer).attribute(x, [1, 0], reference_embedding=s)
    on_score = FeatureActivationMap(SimilarityScore(wrapped, s), encoder.layer).attribute(x, [1, 0])
    close(on_encoder, expected)
    close(on_score, expected)
    close(wrapped(x), before)


# Captum's generic tests: the schema of captum/testing/attr/helpers/test_config.py, with FAM's configurations


shipped = pytest.mark.skipif(
    captums_config is None, reason="this Captum ships no captum.testing, on which its generic tests are built"
)


def captums_convnet(kind="BasicModel_ConvNet"):
    """A net of Captum's with a head that can tell classes apart (as shipped, all logits move alike)."""

    def build():
        net = getattr(basic_models, kind)()
        for linear in (net.fc1, net.fc2):
            nn.init.normal_(linear.weight)
        net.softmax = nn.Identity()
        return net

    return seeded(build)


def captums_body():
    """The same without a head: its 4 dimensions are the channels of the last layers."""
    net = captums_convnet()
    net.fc1 = net.relu3 = net.fc2 = net.softmax = nn.Identity()
    return net


def fams_config():
    """FAM's entries for Captum's configuration."""
    net, body, images, each = captums_convnet(), captums_body(), random(4, 1, 10, 10), [0, 2, 1, 0]
    fam = FeatureActivationMap
    aligned = functools.partial(fam, channel_weights="aligned")
    jacobian = functools.partial(fam, channel_weights="jacobian", normalize=None)
    entries = [
        ("one_target", fam, net, "conv2", {"target": 1}),
        ("list_of_targets", fam, net, "conv2", {"target": each}),
        ("tensor_of_targets", fam, net, "relu1", {"target": torch.tensor(each)}),
        ("tensor_of_one_target", fam, net, "conv2", {"target": torch.tensor([2])}),
        ("tuples_of_targets", fam, net, "conv2", {"target": [(k,) for k in each]}),
        ("aligned", aligned, body, "conv2", {"target": each}),
        ("found_aligned", fam, body, "pool2", {"target": each}),
        ("jacobian", jacobian, body, "pool2", {"target": each}),
        ("relu", fam, net, "conv2", {"target": each, "relu_attributions": True}),
        ("channels", fam, net, "conv2", {"target": each, "attr_dim_summation": False}),
        ("layer_input", fam, net, "pool2", {"target": each, "attribute_to_layer_input": True}),
        ("list_of_layers", fam, net, ["relu1", "conv2"], {"target": each}),
        ("contrast", fam, net, "conv2", {"target": [0, 2, 2, 0], "contrast": 1}),
        ("contrast_rest", fam, net, "conv2", {"target": each, "contrast": "rest"}),
        ("contrast_self", fam, net, "conv2", {"target": each, "contrast": "self"}),
        ("threshold", fam, net, "conv2", {"target": each, "threshold": 0.2}),
    ]
    for dim in (1, 3):
        args = {"target": each, "inputs": random(4, 1, *[10] * dim)}
        entries.append((f"{dim}d", fam, captums_convnet(f"BasicModel_ConvNet_MaxPool{dim}d"), "conv2", args))
    noisy = {"target": each, "nt_samples": 3, "stdevs": 0.0}
    return [
        {
            "name": f"fam_{name}",
            "algorithms": [algorithm],
            "model": model,
            "layer": layer,
            "attribute_args": {"inputs": images, **args},
            "noise_tunnel": args is noisy,
        }
        for name, algorithm, model, layer, args in [*entries, ("noise_tunnel", fam, net, "conv2", noisy)]
    ]


def score_of(encoder, inputs, additional_forward_args=(), **others):
    """An encoder's score for 3 references."""
    inputs, more = (v if isinstance(v, tuple) else (v,) for v in (inputs, additional_forward_args))
    z = encoder(*inputs, *more)
    return SimilarityScore(encoder, random(3, z.shape[1], seed=2, dtype=z.dtype))


def is_for_fam(entry):
    """Captum's own entries for Grad-CAM, but for the targets of outputs with more than two dimensions."""
    target = entry["attribute_args"].get("target")
    return LayerGradCam in entry["algorithms"] and not (isinstance(target, list) and isinstance(target[0], tuple))


ENTRIES = [] if captums_config is None else fams_config() + [e for e in captums_config if is_for_fam(e)]


def each_entry(entries):
    names = [entry["name"] for entry in entries] or ["none"]
    return pytest.mark.parametrize("entry", entries or [None], ids=names)


def prepared(entry, break_layer=False):
    """What a configuration makes: an attribution method, its model, and the arguments of its attribute."""
    algorithms, encoder, args, names, noise_tunnel, _ = copy.deepcopy(parse_test_config(entry))
    algorithm = FeatureActivationMap if LayerGradCam in algorithms else algorithms[0]
    model = score_of(encoder, **args)
    names = [f"encoder.{name}" for name in names] if isinstance(names, list) else f"encoder.{names}"
    if break_layer:
        _set_deep_layer_value(model, names[0] if isinstance(names, list) else names, Broken())
    method = algorithm(model, get_target_layer(model, names))
    return NoiseTunnel(method) if noise_tunnel else method, model, args


class Broken(nn.Module):
    def forward(self, *args):
        raise AssertionError("this layer fails")


@shipped
def test_captum_has_entries_for_grad_cam():
    names = [entry["name"] for entry in ENTRIES]
    assert len(names) == len(set(names))
    assert any(not name.startswith("fam_") for name in names)


@shipped
@each_entry(ENTRIES)
@pytest.mark.parametrize("mode", ["normal", "incorrect_target", "invalid_module"])
@pytest.mark.filterwarnings("ignore:The embedding does not depend", "ignore:The activations")
def test_no_hook_is_left_behind(mode, entry):
    method, model, args = prepared(entry, break_layer=mode == "invalid_module")
    if mode == "normal":
        method.attribute(**args)
    elif mode == "invalid_module":
        with pytest.raises(AssertionError, match="this layer fails"):
            method.attribute(**args)
    else:
        for target in ((9999,) * 20, 9999, [9999] * len(args["inputs"])):
            with pytest.raises((AssertionError, IndexError, TypeError, ValueError)):
                method.attribute(**{**args, "target": target})
    left = [(module, name) for module in model.modules() for name, v in vars(module).items() if "_hooks" in name and v]
    assert not left


def rows(value, b):
    """One example of the tensors in a value."""
    if isinstance(value, torch.Tensor):
        return value[b : b + 1]
    return type(value)(rows(v, b) if isinstance(v, torch.Tensor) else v for v in value)


def several_targets(entry):
    return isinstance(entry["attribute_args"]["target"], (list, torch.Tensor))


def as_list(maps):
    return [maps] if isinstance(maps, torch.Tensor) else list(maps)


@shipped
@each_entry([entry for entry in ENTRIES if several_targets(entry)])
@pytest.mark.filterwarnings("ignore:The activations")
def test_each_example_of_a_batch_is_explained_with_its_own_target(entry):
    method, _, args = prepared(entry)
    together, targets, B = as_list(method.attribute(**args)), args["target"], len(args["inputs"])
    assert all(maps.any() for maps in together)
    for b in range(B):
        for target in [targets[b], targets[b : b + 1]] if len(targets) == B else [targets]:
            alone = method.attribute(**{**args, "inputs": rows(args["inputs"], b), "target": target})
            torch.testing.assert_close([rows(maps, b) for maps in together], as_list(alone))


@shipped
@each_entry([entry for entry in ENTRIES if entry["name"].startswith("fam_")])
def test_another_target_has_another_map(entry):
    method, _, args = prepared(entry)
    results = [as_list(method.attribute(**{**args, "target": target})) for target in (0, 2)]
    for one, other in zip(*results, strict=True):
        assert not any(torch.allclose(a, b) for a, b in zip(one, other, strict=True))


@shipped
@each_entry(ENTRIES)
@pytest.mark.parametrize("mode", ["device", "data_parallel", "device_ids"])
@pytest.mark.filterwarnings("ignore:The embedding does not depend", "ignore:The activations")
def test_a_configuration_gives_the_same_on_each_device_and_in_parallel(mode, entry):
    method, model, args = prepared(entry)
    expected = method.attribute(**args)
    model = model.to(DEVICE)
    layered = method.attribution_method if isinstance(method, NoiseTunnel) else method
    if mode != "device":
        ids = list(range(torch.cuda.device_count()))
        ids = ids[:1] + ids[:0:-1] if mode == "device_ids" else ids
        layered.forward_func = nn.DataParallel(model, ids or None)

    def moved(value):
        if isinstance(value, torch.Tensor):
            return value.to(DEVICE)
        return tuple(moved(v) for v in value) if isinstance(value, tuple) else value

    result = method.attribute(**{name: moved(value) for name, value in args.items()})
    # Of activations in the hundreds, single precision keeps 1e-5, and a GPU adds up in another order.
    atol = 1e-5 if DEVICE == "cpu" else 1e-4
    torch.testing.assert_close(result, expected, check_device=False, rtol=1.3e-6, atol=atol)
