"""
Which parts of Captum work with captum_fam. The script tries each of them on the installed version of Captum.

    python -m benchmarks.compatibility

prints the column of docs/compatibility.md for this version, and fails if something that should work does not.
"""

import itertools
import platform
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import captum.attr
import click
import torch
import torchvision
from captum.attr import LayerAttribution, LayerGradCam, NoiseTunnel, visualization
from captum.concept import TCAV, Classifier, Concept
from captum.metrics import infidelity, sensitivity_max
from captum.robust import FGSM, PGD
from torch import Tensor, nn

from captum_fam import (
    FeatureActivationMap,
    SimilarityDecomposition,
    SimilarityScore,
    compare_attributions,
    explanation_func,
    to_input_space,
)

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
S = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
TARGET = 1  # the reference of each explanation
BLACK = torch.zeros_like(X)
QUARTERS = torch.arange(4).reshape(1, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
CHANNELS = torch.arange(6).reshape(1, 6, 1, 1)
MIDDLES = [X * (step + 0.5) / 4 for step in range(4)]  # of four steps from a black input
Result = tuple[Tensor, Tensor | None]  # what came, and what should have; None: only its shape and values are looked at


class Encoder(nn.Module):
    """Two convolutions, the mean over the places, and a head."""

    def __init__(self, head: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv1, self.early = nn.Conv2d(3, 5, 3, padding=1), nn.ReLU()
            self.conv2, self.layer = nn.Conv2d(5, 6 if head else 4, 3, stride=2, padding=1), nn.ReLU()
            self.mean, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 4) if head else nn.Identity()
        self.double().eval()

    def features(self, x: Tensor) -> Tensor:
        A: Tensor = self.layer(self.conv2(self.early(self.conv1(x))))
        return A

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(self.mean(self.features(x)).flatten(1))
        return z


class Case:
    """An encoder, its score for three references, FAM, and the function ``f`` of ``x`` that a method explains."""

    def __init__(self, similarity: str = "cosine", of_layer: bool = False) -> None:
        self.encoder, self.of_layer = Encoder(), of_layer
        self.score = SimilarityScore(self.encoder, S, similarity)
        self.fam = FeatureActivationMap(self.score, self.encoder.layer)
        self.x, self.mask = self.at(X), CHANNELS if of_layer else QUARTERS

    def at(self, x: Tensor) -> Tensor:
        return self.activations(x).detach() if self.of_layer else x

    def activations(self, x: Tensor, relu: Callable[[Tensor], Tensor] = torch.relu) -> Tensor:
        return relu(self.encoder.conv2(relu(self.encoder.conv1(x))))

    def after(self, A: Tensor) -> Tensor:
        scores = SimilarityScore(lambda A: self.encoder.head(A.mean((2, 3))), S, self.score.similarity)
        return scores(A)[:, TARGET]

    def f(self, x: Tensor) -> Tensor:
        return self.after(x if self.of_layer else self.activations(x))

    @cached_property
    def maps(self) -> Tensor:
        found: Tensor = self.fam.attribute(X, TARGET)
        return found


# What the methods of captum.attr should give for f, without Captum and its hooks


def gradient(c: Case, x: Tensor = X) -> Tensor:
    x = c.at(x).clone().requires_grad_()
    return torch.autograd.grad(c.f(x).sum(), x)[0]


def gradient_x(c: Case) -> Tensor:
    return c.x * gradient(c)


def guided(c: Case, masked: bool = True) -> Tensor:
    """The gradient of which each ReLU lets only positive values through; deconvolution leaves out the ReLU's mask."""

    def relu(h: Tensor) -> Tensor:
        a = h.relu() if masked else h + (h.relu() - h).detach()
        a.register_hook(lambda g: g.clamp(min=0))
        return a

    x = X.clone().requires_grad_()
    return torch.autograd.grad(c.after(c.activations(x, relu)).sum(), x)[0]


def grad_cam(c: Case) -> Tensor:
    of_layer = Case(c.score.similarity, of_layer=True)
    return (gradient(of_layer).mean((2, 3), keepdim=True) * of_layer.x).sum(1, keepdim=True)


def without(c: Case, instead: Tensor = BLACK) -> Tensor:
    """By how much f falls when one part of x after another takes other values, at the places of the part."""
    other = c.at(instead) if instead is not BLACK else torch.zeros_like(c.x)
    parts = [c.mask == part for part in c.mask.unique()]
    return sum((column(c.f(c.x) - c.f(torch.where(p, other, c.x))) * p for p in parts), torch.zeros_like(c.x))


def shapley(c: Case) -> Tensor:
    values = torch.zeros_like(c.x)
    for order in itertools.permutations(range(4)):
        x = BLACK
        for part in order:
            before, x = x, torch.where(c.mask == part, c.x, x)
            values = values + column(c.f(x) - c.f(before)) * (c.mask == part) / 24
    return values


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def enlarged(maps: Tensor) -> Tensor:
    return maps.repeat_interleave(2, 2).repeat_interleave(2, 3)


SUM = "its sum"  # over all values, or one of each part, should be the change of the score from a black input


def method(name: str, similarity: str, expected: Any, arguments: dict[str, Any]) -> Result:
    """A method of captum.attr on a SimilarityScore."""
    if not hasattr(captum.attr, name):
        raise NotImplementedError(f"not in Captum {captum.__version__}")
    c = Case(similarity, of_layer=name.startswith(("Layer", "Internal")))
    layer = c.encoder.conv2 if name == "LayerLRP" else c.encoder.layer  # a ReLU has no rule; its relevance is the same
    where = (layer,) if c.of_layer or name == "GuidedGradCam" else ()
    target = {} if name == "LayerActivation" else {"target": TARGET}
    found = getattr(captum.attr, name)(c.score, *where).attribute(X, **target, **arguments).detach()
    assert found.shape in (c.x.shape, (2, 1, *c.x.shape[2:])), f"a shape of {tuple(found.shape)}"
    if expected == SUM:
        places = 48 if "feature_mask" in arguments else 1
        return found.flatten(1).sum(1) / places, c.f(c.x) - c.f(c.at(BLACK))
    return found, expected and expected(c)


FROM_BLACK: dict[str, Any] = {"baselines": BLACK}
PARTS: dict[str, Any] = {"feature_mask": QUARTERS}
LAYER_PARTS: dict[str, Any] = {"layer_mask": CHANNELS}
STEPS: dict[str, Any] = {"n_steps": 4, "method": "riemann_middle"}
WINDOW: dict[str, Any] = {"sliding_window_shapes": (3, 4, 4), "strides": (3, 4, 4)}
swapped = partial(without, instead=X.flip(0))
METHODS: list[tuple[str, str, Any, dict[str, Any]]] = [
    ("Saliency", "cosine", lambda c: gradient(c).abs(), {}),
    ("InputXGradient", "cosine", gradient_x, {}),
    ("IntegratedGradients", "cosine", lambda c: c.x * torch.stack([gradient(c, x) for x in MIDDLES]).mean(0), STEPS),
    ("GuidedBackprop", "cosine", guided, {}),
    ("Deconvolution", "cosine", partial(guided, masked=False), {}),
    ("GuidedGradCam", "cosine", lambda c: guided(c) * enlarged(grad_cam(c).clamp(min=0)), {}),
    ("DeepLift", "dot", SUM, {}),
    ("DeepLift", "cosine", SUM, {}),
    ("DeepLiftShap", "dot", SUM, FROM_BLACK),
    ("DeepLiftShap", "cosine", SUM, FROM_BLACK),
    ("GradientShap", "cosine", None, FROM_BLACK),
    ("LRP", "dot", gradient_x, {}),
    ("LRP", "cosine", gradient_x, {}),
    ("Occlusion", "cosine", without, WINDOW),
    ("FeatureAblation", "cosine", without, PARTS),
    ("FeaturePermutation", "cosine", swapped, PARTS),
    ("ShapleyValues", "cosine", shapley, PARTS),
    ("ShapleyValueSampling", "cosine", SUM, PARTS),
    ("KernelShap", "cosine", SUM, PARTS),
    ("Lime", "cosine", None, PARTS),
    ("LayerActivation", "cosine", lambda c: c.x, {}),
    ("LayerGradCam", "cosine", grad_cam, {}),
    ("LayerGradientXActivation", "cosine", gradient_x, {}),
    ("LayerIntegratedGradients", "cosine", SUM, {}),
    ("LayerConductance", "cosine", SUM, {"n_steps": 1000}),
    ("InternalInfluence", "cosine", lambda c: torch.stack([gradient(c, x) for x in MIDDLES]).mean(0), STEPS),
    ("LayerDeepLift", "dot", SUM, {}),
    ("LayerDeepLift", "cosine", SUM, {}),
    ("LayerDeepLiftShap", "dot", SUM, FROM_BLACK),
    ("LayerDeepLiftShap", "cosine", SUM, FROM_BLACK),
    ("LayerGradientShap", "cosine", None, FROM_BLACK),
    ("LayerLRP", "dot", gradient_x, {}),
    ("LayerLRP", "cosine", gradient_x, {}),
    ("LayerFeatureAblation", "cosine", without, LAYER_PARTS),
    ("LayerFeaturePermutation", "cosine", swapped, LAYER_PARTS),
]


# Captum's other tools


def fam_in_guided_grad_cam() -> Result:
    c = Case()
    guided_grad_cam = captum.attr.GuidedGradCam(c.score, c.encoder.layer)
    guided_grad_cam.grad_cam = c.fam
    return guided_grad_cam.attribute(X, TARGET), guided(c) * enlarged(c.fam.attribute(X, TARGET).clamp(min=0))


def grad_cam_as_decomposition() -> Result:
    score = SimilarityScore(Encoder(head=False), S, "dot")
    maps = LayerGradCam(score, score.encoder.layer).attribute(X, TARGET)
    return maps * 16, SimilarityDecomposition(score, score.encoder.layer).attribute(X, TARGET)  # 16 places


def noise_tunnel(kind: str, expected: Callable[[Tensor], Tensor]) -> Result:
    fam, targets = Case().fam, torch.tensor([TARGET, 0])
    found = NoiseTunnel(fam).attribute(X, kind, nt_samples=3, stdevs=0.0, target=targets)
    return found, expected(fam.attribute(X, targets))


def infidelity_of_a_map() -> Result:
    c = Case()
    values = to_input_space(c.maps, X)
    found = infidelity(c.score, lambda x: (torch.full_like(x, 0.1), x - 0.1), X, values, target=TARGET)
    return found, (0.1 * values.sum((1, 2, 3)) - c.f(X) + c.f(X - 0.1)).square()


def sensitivity_of_a_map() -> Result:
    c = Case()
    change = c.maps - c.fam.attribute(1.1 * X, TARGET)
    options: dict[str, Any] = {"perturb_func": lambda x, _: 1.1 * x, "n_perturb_samples": 1}
    found = sensitivity_max(explanation_func(c.fam), X, target=TARGET, **options)
    return found, change.flatten(1).norm(dim=1) / c.maps.flatten(1).norm(dim=1)


def picture(several: bool) -> Result:
    shown = enlarged(Case().fam.attribute(X, TARGET, contrast="rest"))[0].permute(1, 2, 0).numpy()
    photo = X[0].permute(1, 2, 0).sigmoid().numpy()
    options = {"use_pyplot": False, "outlier_perc": 1e-6}  # with 0, Captum fails where a sum is rounded
    if several:
        how = ["original_image", "heat_map"], ["all", "all"]
        axes = visualization.visualize_image_attr_multiple(shown, photo, *how, **options)[1]
    else:
        axes = [visualization.visualize_image_attr(shown, photo, "heat_map", "all", **options)[1]]
    return torch.tensor(axes[-1].images[-1].get_array()), torch.tensor(shown[..., 0] / abs(shown).max())


class Given(Classifier):
    """Two concepts whose vectors are known."""

    def __init__(self) -> None: ...

    def train_and_eval(self, dataloader: Any, **options: Any) -> None: ...

    def weights(self) -> Tensor:
        return torch.linspace(-1, 1, 192).reshape(2, 96)

    def classes(self) -> list[int]:
        return [0, 1]


def concepts() -> Result:
    c, layer = Case(), "encoder.layer"
    terms = c.fam.attribute(X, TARGET, attr_dim_summation=False).flatten(1).float()
    with tempfile.TemporaryDirectory() as folder:
        tcav = TCAV(c.score, [layer], classifier=Given(), layer_attr_method=c.fam, save_path=folder)
        examples = [Concept(i, str(i), [X + i]) for i in (0, 1)]
        found = tcav.interpret(X, [examples], target=TARGET, attr_dim_summation=False)["0-1"]
    return found[layer]["magnitude"], (terms @ Given().weights().T).mean(0)


def summary() -> Result:
    maps, summarizer = Case().maps, captum.attr.Summarizer([captum.attr.Mean()])
    for one in maps:
        summarizer.update(one)
    return summarizer.summary["mean"], maps.mean(0)


def attack(kind: Any, **options: Any) -> Result:
    score, target, x = Case().score, torch.tensor([TARGET, 0]), X.clone().requires_grad_()
    (change,) = torch.autograd.grad(nn.functional.cross_entropy(score(x), target, reduction="sum"), x)
    found = kind(score, nn.CrossEntropyLoss(reduction="none")).perturb(X, target=target, **options)
    return found, X + 0.1 * change.sign()


def data_loader() -> Result:
    c = Case()
    ablation = captum.attr.DataLoaderAttribution(captum.attr.FeatureAblation(lambda x: c.score(x)[:, TARGET]))
    return ablation.attribute([[x] for x in X.split(1)], feature_mask=QUARTERS)[0], without(c)


def permutation_of_one_score() -> Result:
    if not hasattr(captum.attr, "LayerFeaturePermutation"):
        raise NotImplementedError(f"not in Captum {captum.__version__}")
    c = Case(of_layer=True)
    permutation = captum.attr.LayerFeaturePermutation(lambda x: c.score(x)[:, TARGET], c.encoder.layer)
    return permutation.attribute(X, layer_mask=CHANNELS), swapped(c)


def neurons() -> Result:
    names = [name for name in captum.attr.__all__ if name.startswith("Neuron") and name != "NeuronAttribution"]
    found = []
    for name in names:
        c, options = Case(), {"target": TARGET} if name == "NeuronConductance" else {}
        options |= FROM_BLACK if name.endswith("Shap") else {}
        found.append(getattr(captum.attr, name)(c.score, c.encoder.layer).attribute(X, (2, 1, 1), **options).detach())
    assert all(values.any() for values in found)
    return torch.stack(found), None


def several_layers() -> Result:
    c = Case()
    one_by_one = [FeatureActivationMap(c.score, m).attribute(X, TARGET) for m in (c.encoder.early, c.encoder.layer)]
    c.fam.layer = [c.encoder.early, c.encoder.layer]
    return flat(c.fam.attribute(X, TARGET)), flat(one_by_one)


class Halves(nn.Module):
    """A layer that gives a tuple."""

    def forward(self, A: Tensor) -> tuple[Tensor, ...]:
        return A.chunk(2, 1)


def layer_with_a_tuple() -> Result:
    c, halves = Case(), Halves()
    score = SimilarityScore(lambda x: c.encoder.head(torch.cat(halves(c.encoder.features(x)), 1).mean((2, 3))), S)
    terms = c.fam.attribute(X, TARGET, attr_dim_summation=False)
    return flat(FeatureActivationMap(score, halves).attribute(X, TARGET)), flat(h.sum(1) for h in terms.chunk(2, 1))


def layer_input() -> Result:
    c = Case()
    c.fam.layer = c.encoder.conv2
    found = c.fam.attribute(X, TARGET, attribute_to_layer_input=True)
    return found, FeatureActivationMap(c.score, c.encoder.early).attribute(X, TARGET)


def data_parallel() -> Result:
    c, device = Case(), "cuda" if torch.cuda.is_available() else "cpu"
    expected = c.maps
    c.fam.forward_func = nn.DataParallel(c.score.to(device))
    return c.fam.attribute(X.to(device), TARGET).cpu(), expected


def comparison() -> Result:
    c = Case()
    methods = {"a": "LayerGradCam", "b": "Saliency", "c": NoiseTunnel(captum.attr.Saliency(c.score))}
    maps = compare_attributions(c.score, c.encoder.layer, X, TARGET, methods, show_progress=False)
    assert list(maps) == list(methods)
    expected = nn.functional.interpolate(grad_cam(c), (8, 8), mode="bilinear"), gradient(c).abs().sum(1, keepdim=True)
    return flat([maps["a"], maps["b"]]), flat(expected)


def both_in_one_function(kind: Any) -> Result:
    """A function that embeds query and reference should give what a SimilarityScore does."""
    c, query, reference = Case(), X[:1], X[1:]
    score = SimilarityScore(c.encoder, c.encoder(reference))
    found = kind(lambda x: nn.functional.cosine_similarity(c.encoder(x), c.encoder(reference)), c.encoder.layer)
    other_side = LayerGradCam(SimilarityScore(c.encoder, c.encoder(query)), c.encoder.layer).attribute(reference, 0)
    wrong = other_side if kind is LayerGradCam else torch.zeros(1, 6, 4, 4).double()
    torch.testing.assert_close(found.attribute(query), wrong)
    return found.attribute(query), kind(score, c.encoder.layer).attribute(query, target=0)


def flat(maps: Any) -> Tensor:
    return torch.cat([m.flatten() for m in maps])


def rows() -> dict[str, Callable[[], Result]]:
    """All that is tried, by what the table calls it."""
    words = {name: f", `{name}`" for name in ("cosine", "dot")}
    several = {name for name, *_ in METHODS if sum(name == other for other, *_ in METHODS) > 1}
    of_method = {f"`{m[0]}`{words[m[1]] if m[0] in several else ''}": partial(method, *m) for m in METHODS}
    return of_method | {
        "the methods named `Neuron...`": neurons,
        "`LayerFeaturePermutation` of one score": permutation_of_one_score,
        "`DataLoaderAttribution`": data_loader,
        "`LayerGradCam` of `dot` after mean pooling, against `SimilarityDecomposition`": grad_cam_as_decomposition,
        "`LayerGradCam` of query and reference in one function": partial(both_in_one_function, LayerGradCam),
        "`LayerIntegratedGradients` of the same": partial(both_in_one_function, captum.attr.LayerIntegratedGradients),
        "FAM: a list of layers": several_layers,
        "FAM: a layer that gives a tuple": layer_with_a_tuple,
        "FAM: `attribute_to_layer_input=True`": layer_input,
        "FAM: `attr_dim_summation=False`": lambda: (
            Case().fam.attribute(X, TARGET, attr_dim_summation=False).sum(1, keepdim=True),
            Case().maps,
        ),
        "FAM: `DataParallel`": data_parallel,
        "FAM in place of `GuidedGradCam.grad_cam`": fam_in_guided_grad_cam,
        "`LayerAttribution.interpolate`": lambda: (
            LayerAttribution.interpolate(Case().maps, (8, 8)),
            enlarged(Case().maps),
        ),
        "`NoiseTunnel(fam)`, `smoothgrad`": partial(noise_tunnel, "smoothgrad", lambda maps: maps),
        "`NoiseTunnel(fam)`, `smoothgrad_sq`": partial(noise_tunnel, "smoothgrad_sq", torch.square),
        "`NoiseTunnel(fam)`, `vargrad`": partial(noise_tunnel, "vargrad", torch.zeros_like),
        "`infidelity` by `to_input_space`": infidelity_of_a_map,
        "`sensitivity_max` by `explanation_func`": sensitivity_of_a_map,
        "`TCAV`, `Concept`, `layer_attr_method=fam`": concepts,
        "`visualize_image_attr`": partial(picture, several=False),
        "`visualize_image_attr_multiple`": partial(picture, several=True),
        "`Summarizer`": summary,
        "`FGSM`": partial(attack, FGSM, epsilon=0.1),
        "`PGD`": partial(attack, PGD, radius=0.1, step_size=0.1, step_num=1),
        "Captum's methods in `compare_attributions`": comparison,
    }


NO_SUM = "its values do not add up to the change of the score"
NO_LRP = "relevance does not start from the score"
LIMITS = {  # of Captum; those without a reason raise an error, which says it
    **{f"`{name}`, `cosine`": NO_SUM for name in ("DeepLift", "DeepLiftShap", "LayerDeepLift", "LayerDeepLiftShap")},
    **{f"`{name}`, `{similarity}`": NO_LRP for name in ("LRP", "LayerLRP") for similarity in ("cosine", "dot")},
    "`LayerFeaturePermutation`": "",
    "`LayerGradCam` of query and reference in one function": "the map is the reference's",
    "`LayerIntegratedGradients` of the same": "all zero",
}


def outcome(what: str, function: Callable[[], Result]) -> tuple[str, bool]:
    """What the table says, and whether that is as it should be."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, expected = function()
    except NotImplementedError as error:
        return f"no: {error}", True
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return f"no: {textwrap.shorten(reason, 80, placeholder=' ...')}", what in LIMITS
    if expected is None:
        return ("yes", True) if found.isfinite().all() and found.any() else ("no: zero or not finite", False)
    try:  # Occlusion and others give float32
        torch.testing.assert_close(found.double(), expected.detach().double(), rtol=1e-3, atol=1e-6)
    except AssertionError:
        return f"no: {LIMITS.get(what) or 'not as computed by hand'}", what in LIMITS
    return "yes, checked", True


@click.command()
def main() -> None:
    """Print the table, and fail where something that should work does not."""
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}"
    click.echo(f"Captum {captum.__version__}, {versions}\n\n| what | {captum.__version__} |\n|---|---|")
    failed = []
    for what, function in rows().items():
        result, as_it_should_be = outcome(what, function)
        click.echo(f"| {what} | {result} |")
        failed += [] if as_it_should_be else [what]
    if failed:
        raise click.ClickException(f"should work, but does not: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
