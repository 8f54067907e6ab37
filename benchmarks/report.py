"""Tables and figures of the study from the files of its cells."""

import csv
import platform
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, false_discovery_control, wilcoxon

from benchmarks.study import CONTROLS, FAMILIES

Values = NDArray[np.float64]
Cells = dict[tuple[str, str, str], dict[str, Any]]  # by encoder, weights, source

FAM = "FAM cosine"
RESAMPLES, SEED = 2000, 0
ORDER = (
    FAM,
    "FAM signed",
    "FAM Euclidean",
    "FAM self",
    "SimilarityDecomposition",
    "decomposition self",
    "LaFAM",
    "residual 0.9",
    "Grad-CAM",
    "integrated",
    "best match",
    "match less others",
    "RELAX",
    "Distance Explainer",
    "contrast with the rest",
    *CONTROLS,
)
TEXT = """# Which map can be trusted?

Made by `{command}` (Python {python}, {packages}; CPU, one thread a process). All seeds are fixed in the code.
Settings: {settings}. All numbers by encoder, with their intervals: [results.csv](results.csv).

What is compared, and how: [study.py](../study.py) (encoders, pairs, methods), [faithfulness.py](../faithfulness.py)
(metrics). The score is the cosine of the embeddings for every encoder, also for ProtoNets, which are trained with
Euclidean distance. {encoders} encoders count the same. Intervals are 95 % percentile bootstrap intervals of the mean
over encoders; pairs are drawn anew ({resamples} times), the same for all encoders, because encoders share scenes and
photos: they say how sure the mean over *these* encoders is. p: Wilcoxon's signed-rank test of the mean differences to
FAM cosine of {families} families of encoders, adjusted for the number of methods (Benjamini and Yekutieli); before that
it cannot be smaller than 0.008.

FAM cosine stands for FAM with the dot product too: the contributions differ by a factor, so the weights are the same.
FAM signed differs from it by an offset of the weights only; where one channel contributes nothing, that is zero, and
the maps are the same but for a factor. *self*: `contrast="self"`, what a match has beyond what the image has with
itself; for the decomposition it is Grad-CAM by place, so the two differ only where a head treats places differently.
Grad-CAM is signed here (the paper's has a ReLU). RELAX and Distance Explainer
take {masks} masks of 7 x 7 cells and paint with the mean colour instead of black, because black would be one more
object. *integrated*: `IntegratedDecomposition`. *best match* and *match less others*: `CorrespondenceMap`.
¹ sees the reference's map, not only its embedding, and looks for like places: it does not explain the score.
² sees the other references and explains the difference to their mean.

*residual 0.9* and *best match* were chosen on the other half of the pictures, with the same encoders:
[weightings.md](weightings.md).

## In short

*Right object* (chance 0.25; untrained encoders in brackets), *faithfulness* (insertion less deletion with blur, over a
random map) and *reference dependence* are measured on shared-object scenes, *photos* is the rank accuracy in the masks
of objects in photos; all are explained below.

{summary}

## Shared-object scenes

Two scenes of four objects share one, in another view (mirrored, turned, resized, other gamma), all objects in one
palette (`shared_object_scenes(..., difficulty="medium")`; {pairs} pairs for each encoder). *Right object*: the mean of
the map on the shared object is larger than on each other object; chance is 0.25. *Where used*: among pairs where taking
away the shared object lowers the similarity more than taking away any other (encoders with at least {least_used} such
pairs); taking away paints with the background, as the masks of RELAX and Distance Explainer do, which is in their
favour here. *Over untrained*: less the same encoders with random weights. *Over swapped*: less the map for a reference
of another pair without the shared class, which shows what the reference is good for.

{medium}

![Right objects by method](scenes.png)

![Examples of maps](maps.png)

*The first scenes of the bundled encoder (clothing photos, CC0); the shared object is outlined. Signed maps are red and
blue. Best match also finds that background is like background.*

By encoder: the mean cosine of a pair and of scenes without a common object, how often the encoder uses the shared
object (trained, untrained, shuffled weights; chance 0.25), and how often a map finds it:

{by_encoder}

Where on the map, untrained encoders in brackets (the shared object covers 6 to 20 % of a scene). Methods on pixels
(RELAX, Distance Explainer) are finer than the layer's 4 x 4 to 16 x 16 cells. *Energy* and *IoU at 0.5* depend on the
offset of a map: where a map is positive everywhere, energy is about the object's share of the scene, whatever the map;
*energy above the mean* takes the offset away.

{medium_places}

The mean-colour encoder (embedding: the mean of the three colours), right object; all objects have one mean colour, so
its similarities are all equal and its maps rounding, and what is left is best match's comparison of pixels:

{mean_colour}

## Harder scenes

Another picture of the same class instead of another view (`difficulty="hard"`). These encoders hardly use the shared
object here (*used, hard* above), so there is little that a map could find: no ranking should be drawn from it.

{hard}

## Photos

{photos} COCO photos, each with a reference that shares a category, objects of the shared categories covering 3 to 50 %.
Untrained encoders in brackets. What the encoder sees in common need not be the annotated objects, and photographers put
their subject in the middle: compare with the blob.

{photo_places}

## Faithfulness

Margins over a random map, in units of the cosine ({faithful} pairs for each encoder, {steps} steps). ROAD: 25, 50 and
75 % of the pixels. Average drop and increase, with the mean colour for nothing, are no margins; wide maps do well in
them (see random). Scenes:

{medium_faithfulness}

Photos:

{photo_faithfulness}

## Sanity and agreement

*Reference dependence*: correlation of the map's change, when the reference changes, with the change that occlusion
shows. *Random weights*: rank correlation with the trained map while the encoder loses its weights from the top down,
mean over the steps ({cascaded} photos for each encoder); references are embedded by the same weights. RELAX and
Distance Explainer were left out for their cost, contrast because its rest would be another one.

{sanity}

![Agreement of methods](agreement.png)

## What to object to

* Encoders see scenes at a size other than that of their training (MobileNets 128 pixels, CIFAR encoders 64), in a
  palette of few colours; transformers were trained here, for minutes, on CIFAR-10, and see objects of 16 pixels.
* The palette, the plain background and the rectangles around photographs are not natural.
* TensorFlow's padding shifts the maps of MobileNets by half a cell against the image; it was not corrected.
* An untrained encoder's explanation need not show the shared object: *over untrained* tests encoder and map together.
* One draw of random weights for each encoder; the mean is over {encoders}.
* Medium scenes favour methods that find the same picture again.
"""
LEAST_USED = 5  # pairs that an encoder must use to count among those that do


def mean_over(samples: Sequence[Values]) -> tuple[float, float, float]:
    """
    The mean over encoders of their means, with a 95 % interval, from values (N,) of each; NaN: the pair does not count.

    Pairs are drawn anew for all encoders together, because pair i is the same for those that share pictures.
    """
    samples = [np.asarray(s, float) for s in samples if np.isfinite(s).any()]
    if not samples:
        return (float("nan"),) * 3
    values = np.full((len(samples), max(map(len, samples))), np.nan)
    for row, sample in zip(values, samples):
        row[: len(sample)] = sample

    def statistic(drawn: NDArray[np.int64], axis: int) -> Values:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # encoders of which no pair was drawn
            return np.nanmean(np.nanmean(values[:, drawn], axis=-1), axis=0)

    centre, pairs = float(np.nanmean(values, axis=1).mean()), np.arange(values.shape[1])
    if len(pairs) < 2 or np.nanmax(np.ptp(np.nan_to_num(values, nan=centre), axis=1)) == 0:
        return centre, centre, centre
    found = bootstrap(
        (pairs,),
        statistic,
        n_resamples=RESAMPLES,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    return centre, float(found.confidence_interval.low), float(found.confidence_interval.high)


def shown(triple: tuple[float, float, float], sign: bool = False) -> str:
    form = "+.2f" if sign else ".2f"
    if np.isnan(triple[0]):
        return "-"
    return f"{triple[0]:{form}} [{triple[1]:.2f}, {triple[2]:.2f}]"


class Study:
    """The cells, and samples of per-example values from them."""

    def __init__(self, cells: list[dict[str, Any]]) -> None:
        self.cells: Cells = {tuple(c["cell"][k] for k in ("encoder", "weights", "source")): c for c in cells}
        found = {encoder: None for encoder, weights, _ in self.cells if encoder != "mean_colour"}
        self.encoders = list(found)
        self.settings = cells[0]["settings"]

    def of(self, encoder: str, weights: str, source: str, method: str, metric: str) -> Values | None:
        """Values of one encoder, or None where there are none."""
        values = self.cells.get((encoder, weights, source), {"values": {}})["values"].get(method, {}).get(metric)
        return None if values is None else np.array(values)

    def samples(self, weights: str, source: str, method: str, metric: str, used: bool = False) -> dict[str, Values]:
        """Values by encoder; ``used``: of the pairs whose similarity comes from the shared object."""
        found = {}
        for encoder in self.encoders:
            values = self.of(encoder, weights, source, method, metric)
            if values is None:
                continue
            if used:
                keep = np.array(self.cells[encoder, weights, source]["used"])
                if keep.sum() < LEAST_USED:
                    continue
                values = np.where(keep, values, np.nan)
            found[encoder] = values
        return found

    def mean(
        self, weights: str, source: str, method: str, metric: str, used: bool = False
    ) -> tuple[float, float, float]:
        return mean_over(list(self.samples(weights, source, method, metric, used).values()))

    def margin(
        self,
        source: str,
        method: str,
        metric: str,
        other: str,
        other_metric: str | None = None,
        weights: str = "trained",
    ) -> tuple[float, float, float]:
        """How much more than another method or metric of the same encoder and pairs."""
        one = self.samples(weights, source, method, metric)
        two = self.samples(weights, source, other, other_metric or metric)
        return mean_over([one[e] - two[e] for e in one if e in two])

    def p_value(self, source: str, method: str, metric: str) -> float:
        """Wilcoxon's signed-rank test of the mean differences to FAM of the families of encoders, two-sided."""
        one, two = (self.samples("trained", source, m, metric) for m in (method, FAM))
        differences: dict[str, list[float]] = {}
        for encoder in one.keys() & two.keys():
            differences.setdefault(FAMILIES[encoder], []).append(float(one[encoder].mean() - two[encoder].mean()))
        means = [np.mean(found) for found in differences.values()]
        return float(wilcoxon(means).pvalue) if np.any(means) else 1.0

    def over_untrained(self, source: str, method: str, metric: str) -> tuple[float, float, float]:
        one, two = (self.samples(weights, source, method, metric) for weights in ("trained", "untrained"))
        return mean_over([one[e] - two[e] for e in one if e in two])

    def methods(self, source: str) -> list[str]:
        return [m for m in ORDER if self.samples("trained", source, m, "energy")]

    def used_share(self, encoder: str, weights: str, source: str) -> float:
        cell = self.cells.get((encoder, weights, source))
        return float(np.mean(cell["used"])) if cell else float("nan")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def scenes_table(study: Study, source: str) -> str:
    """Does the map find the shared object?"""
    metric, rows = "right object", []
    methods = study.methods(source)
    tested = [m for m in methods if m != FAM]
    p_values = [study.p_value(source, m, metric) for m in tested]
    adjusted = dict(zip(tested, false_discovery_control(p_values, method="by")))
    for m in methods:
        over_fam = ["", ""]
        if m != FAM:
            over_fam = [shown(study.margin(source, m, metric, FAM), sign=True), f"{adjusted[m]:.3f}"]
        rows.append(
            [
                title(m),
                shown(study.mean("trained", source, m, metric)),
                shown(study.mean("trained", source, m, metric, used=True)),
                shown(study.over_untrained(source, m, metric), sign=True),
                shown(study.margin(source, m, metric, m, f"{metric}, swapped"), sign=True),
                *over_fam,
            ]
        )
    header = ["method", "right object", "where used", "over untrained", "over swapped", "over FAM", "p"]
    return table(header, rows)


def summary_table(study: Study) -> str:
    """A number of each kind."""

    def gap(m: str) -> str:
        one, two, zero, other = (
            study.samples("trained", "medium", x, f"{k}, blur")
            for x in (m, "random")
            for k in ("insertion", "deletion")
        )
        return shown(mean_over([one[e] - two[e] - zero[e] + other[e] for e in one]), sign=True)

    rows = []
    for m in study.methods("medium"):
        untrained = study.mean("untrained", "medium", m, "right object")[0]
        rows.append(
            [
                title(m),
                f"{shown(study.mean('trained', 'medium', m, 'right object'))} ({untrained:.2f})",
                gap(m),
                shown(study.mean("trained", "medium", m, "reference dependence")),
                shown(study.mean("trained", "photos", m, "rank accuracy")),
            ]
        )
    return table(["method", "right object", "faithfulness", "reference dependence", "photos"], rows)


def title(method: str) -> str:
    """The name of a method, with a mark for what it sees more than an embedding of one reference."""
    return {
        "best match": "best match ¹",
        "match less others": "match less others ¹ ²",
        "contrast with the rest": "contrast with the rest ²",
    }.get(method, method)


def places_table(study: Study, source: str) -> str:
    """The metrics that need to know where; untrained encoders in brackets."""
    names = ["pointing game", "energy", "energy above the mean", "rank accuracy", "IoU at 0.5", "best IoU"]

    def entry(m: str, name: str) -> str:
        untrained = study.mean("untrained", source, m, name)[0]
        control = "" if np.isnan(untrained) else f" ({untrained:.2f})"
        return shown(study.mean("trained", source, m, name)) + control

    return table(["method", *names], [[title(m), *(entry(m, name) for name in names)] for m in study.methods(source)])


def faithfulness_table(study: Study, source: str) -> str:
    """The metrics that change the images, as the margin over a random map."""
    sums = {f"insertion less deletion, {b}": (f"insertion, {b}", f"deletion, {b}") for b in ("blur", "mean", "zero")}
    rows = []
    for m in study.methods(source):
        row = [title(m)]
        for plus, minus in sums.values():
            one, two, zero, other = (
                study.samples("trained", source, x, k) for x in (m, "random") for k in (plus, minus)
            )
            gaps = [(one[e] - two[e]) - (zero[e] - other[e]) for e in one]
            row.append(shown(mean_over(gaps), sign=True))
        row.append(shown(study.margin(source, m, "ROAD", "random"), sign=True))
        row += [shown(study.mean("trained", source, m, name)) for name in ("average drop", "average increase")]
        rows.append(row)
    return table(["method", *sums, "ROAD", "average drop ↓", "average increase"], rows)


def sanity_table(study: Study) -> str:
    """Does the map depend on what it should?"""
    agreements = [c["agreement"] for c in study.cells.values() if "agreement" in c]

    def with_fam(m: str) -> str:
        values = [
            a["rank correlation"][a["methods"].index(FAM)][a["methods"].index(m)]
            for a in agreements
            if m in a["methods"]
        ]
        return f"{np.mean(values):.2f}" if values else "-"

    rows = [
        [
            title(m),
            *(shown(study.mean("trained", s, m, "reference dependence")) for s in ("medium", "photos")),
            shown(study.mean("trained", "photos", m, "cascading randomisation")),
            with_fam(m),
        ]
        for m in study.methods("medium")
    ]
    header = [
        "method",
        "reference dependence, scenes",
        "the same, photos",
        "random weights",
        "rank correlation with FAM",
    ]
    return table(header, rows)


def encoders_table(study: Study, cosines: dict[str, tuple[float, float]]) -> str:
    """By encoder: what it uses, and which maps find it."""
    names = [
        FAM,
        "SimilarityDecomposition",
        "decomposition self",
        "Grad-CAM",
        "integrated",
        "best match",
        "match less others",
        "RELAX",
        "contrast with the rest",
    ]
    rows = []
    for encoder in study.encoders:
        values = [study.of(encoder, "trained", "medium", m, "right object") for m in names]
        rows.append(
            [
                encoder,
                *(f"{cosine:.2f}" for cosine in cosines[encoder]),
                *(f"{study.used_share(encoder, w, 'medium'):.2f}" for w in ("trained", "untrained", "shuffled")),
                f"{study.used_share(encoder, 'trained', 'hard'):.2f}",
                *("-" if v is None else f"{v.mean():.2f}" for v in values),
            ]
        )
    means = [np.nanmean([float(row[i]) if row[i] != "-" else np.nan for row in rows]) for i in range(1, len(rows[0]))]
    rows.append(["mean", *(f"{mean:.2f}" for mean in means)])
    return table(["encoder", "cosine", "of others", "used", "untrained", "shuffled", "used, hard", *names], rows)


def mean_colour_table(study: Study) -> str:
    names = ("medium", "hard")
    rows = []
    for m in study.methods("medium"):
        values = [study.of("mean_colour", "trained", s, m, "right object") for s in names]
        if any(v is not None for v in values):
            rows.append([title(m), *("-" if v is None else f"{v.mean():.2f}" for v in values)])
    return table(["method", *names], rows)


def write_csv(study: Study, path: Path) -> None:
    """A row for each encoder, weights, source, method and metric: mean, 95 % interval, number of pairs."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["encoder", "weights", "source", "method", "metric", "pairs", "mean", "low", "high"])
        for (encoder, weights, source), cell in sorted(study.cells.items()):
            for method, by_metric in cell["values"].items():
                for metric, values in by_metric.items():
                    if metric.endswith("swapped") and not metric.startswith("right object"):
                        continue
                    numbers = [f"{x:.4f}" for x in mean_over([np.array(values)])]
                    writer.writerow([encoder, weights, source, method, metric, len(values), *numbers])
            if "used" in cell:
                share = f"{np.mean(cell['used']):.4f}"
                writer.writerow([encoder, weights, source, "", "used by the encoder", len(cell["used"]), share, "", ""])


def draw_scenes(study: Study, path: Path) -> None:
    """Right objects by method: trained, untrained, another reference."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    methods = study.methods("medium")[::-1]
    for axis, used, title in zip(axes, (False, True), ("all pairs", "pairs whose shared object the encoder uses")):
        series: list[tuple[str, str, str, Callable[[str], tuple[float, float, float]]]] = [
            ("trained", "C0", "o", lambda m, used=used: study.mean("trained", "medium", m, "right object", used)),
            (
                "another reference",
                "C1",
                "s",
                lambda m, used=used: study.mean("trained", "medium", m, "right object, swapped", used),
            ),
            (
                "untrained encoder",
                "0.6",
                "^",
                lambda m, used=used: study.mean("untrained", "medium", m, "right object"),
            ),
        ]
        for number, (label, colour, marker, mean) in enumerate(series):
            values = np.array([mean(m) for m in methods])
            y = np.arange(len(methods)) + (1 - number) * 0.2
            error = np.abs(values[:, 1:] - values[:, :1]).T
            axis.errorbar(values[:, 0], y, xerr=error, fmt=marker, color=colour, label=label, markersize=4, lw=1)
        axis.axvline(0.25, color="black", lw=0.8, ls=":")
        axis.set(title=title, xlabel="the shared object has the largest mean (chance 0.25)", xlim=(0, 1))
        axis.set_yticks(range(len(methods)), methods)
    axes[0].legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_agreement(study: Study, path: Path) -> None:
    """Mean rank correlation of the methods' maps, over encoders and sources."""
    agreements = [c["agreement"] for c in study.cells.values() if "agreement" in c]
    names = [m for m in ORDER if all(m in a["methods"] for a in agreements)]
    order = [[a["methods"].index(m) for m in names] for a in agreements]
    mean = np.mean([np.array(a["rank correlation"])[np.ix_(o, o)] for a, o in zip(agreements, order)], 0)
    figure, axis = plt.subplots(figsize=(8, 7), layout="constrained")
    image = axis.imshow(mean, vmin=-1, vmax=1, cmap="RdBu_r")
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axis.set_yticks(range(len(names)), names)
    for i, j in np.ndindex(mean.shape):
        text = f"{mean[i, j] + 0.0:.2f}"
        axis.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if mean[i, j] > 0.7 else "black")
    figure.colorbar(image, label="Spearman's rank correlation")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_maps(columns: dict[str, NDArray[np.float64]], outlines: dict[str, NDArray[np.bool_]], path: Path) -> None:
    """
    Pairs in rows: images (N, H, W, 3) and signed or positive maps (N, H, W) in columns, with the outline (N, H, W) of
    the shared object.
    """
    rows = len(next(iter(columns.values())))
    figure, axes = plt.subplots(rows, len(columns), figsize=(1.5 * len(columns), 1.6 * rows), layout="constrained")
    for row, (name, values) in ((row, item) for row in range(rows) for item in columns.items()):
        axis, value = axes[row, list(columns).index(name)], values[row]
        if value.ndim == 3:
            axis.imshow(value)
        else:
            low, high = min(value.min(), 0), value.max()
            signed = low < -1e-6 * high
            limit = max(-low, high)
            axis.imshow(
                value, cmap="RdBu_r" if signed else "viridis", vmin=-limit if signed else value.min(), vmax=limit
            )
        outline = outlines.get(name, outlines["image"])[row]
        axis.contour(
            outline, levels=[0.5], colors="black" if value.ndim == 3 else "white" if value.min() >= 0 else "black"
        )
        axis.set(xticks=[], yticks=[])
        if not row:
            axis.set_title(name, fontsize=8)
    figure.savefig(path, dpi=75)
    plt.close(figure)


def write_report(
    cells: list[dict[str, Any]], cosines: dict[str, tuple[float, float]], output: Path, command: str
) -> None:
    """README.md, results.csv and figures in a folder."""
    study = Study(cells)
    write_csv(study, output / "results.csv")
    draw_scenes(study, output / "scenes.png")
    draw_agreement(study, output / "agreement.png")
    s = study.settings
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "captum", "scipy", "numpy", "timm", "transformers"))
    photos = len(next(iter(study.samples("trained", "photos", FAM, "energy").values())))
    text = TEXT.format(
        command=command,
        python=platform.python_version(),
        packages=packages,
        settings=", ".join(f"{k} {v}" for k, v in s.items()),
        encoders=len(study.encoders),
        families=len({FAMILIES[encoder] for encoder in study.encoders}),
        photos=photos,
        resamples=RESAMPLES,
        least_used=LEAST_USED,
        summary=summary_table(study),
        medium=scenes_table(study, "medium"),
        hard=scenes_table(study, "hard"),
        medium_places=places_table(study, "medium"),
        photo_places=places_table(study, "photos"),
        by_encoder=encoders_table(study, cosines),
        mean_colour=mean_colour_table(study),
        medium_faithfulness=faithfulness_table(study, "medium"),
        photo_faithfulness=faithfulness_table(study, "photos"),
        sanity=sanity_table(study),
        **{name: s[name] for name in ("pairs", "faithful", "steps", "cascaded", "masks")},
    )
    (output / "README.md").write_text(text)
