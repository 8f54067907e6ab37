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
from scipy.stats import bootstrap, false_discovery_control, norm, t, wilcoxon

from benchmarks.report_text import TEXT
from benchmarks.study import CONTROLS, FAMILIES, GROUPS, LITE, OTHERS

Values = NDArray[np.float64]
Triple = tuple[float, float, float]  # a mean and its interval

FAM = "FAM cosine"
MANY = "RELAX, many masks"
FAME = "FAME"
BY_MASKS = ("RELAX", "Distance Explainer")
LESS = tuple(f"{m} less others" for m in BY_MASKS)
BY_PARTS = ("SharedParts", "FFAM")
SEES_OTHERS = ("match less others", "contrast with the rest", *LESS)
KINDS = {  # of good encoders
    "EfficientNets": tuple(LITE),
    "students": tuple(name for name in GROUPS["good"] if name not in LITE),
}
KNOWN = ("outline of the shared object", "outline of all objects")
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
    "contrast with the rest",
    *BY_PARTS,
    FAME,
    *BY_MASKS,
    MANY,
    *LESS,
    *CONTROLS,
)
LEAST_USED = 5  # pairs that an encoder must use to count among those that do
RIGHT = "right object"


def mean_over(samples: Sequence[Values]) -> tuple[float, float, float]:
    """
    The mean over encoders of their means, with a 95 % interval, from values (N,) of each; NaN: the pair does not count.

    Pairs are drawn anew for all encoders together, because pair i is the same for those that share pictures. The
    percentiles of few pairs lie too near each other; they are stretched as Student's interval of the mean is.
    """
    samples = [np.asarray(s, float) for s in samples if np.isfinite(s).any()]
    if not samples:
        return (float("nan"),) * 3
    values = np.full((len(samples), max(map(len, samples))), np.nan)
    for row, sample in zip(values, samples):
        row[: len(sample)] = sample

    def statistic(drawn: NDArray[np.int64], axis: int) -> Values:
        return np.nanmean(np.nanmean(values[:, drawn], axis=-1), axis=0)

    centre, pairs = float(np.nanmean(values, axis=1).mean()), np.arange(values.shape[1])
    if len(pairs) < 2 or np.nanmax(np.ptp(np.nan_to_num(values, nan=centre), axis=1)) == 0:
        return centre, centre, centre
    rng = np.random.default_rng(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # encoders of which no pair was drawn
        found = bootstrap((pairs,), statistic, n_resamples=RESAMPLES, vectorized=True, method="percentile", rng=rng)
    ends = np.nanquantile(found.bootstrap_distribution, (0.025, 0.975))
    n = len(pairs)
    stretch = (n / (n - 1)) ** 0.5 * t.ppf(0.975, n - 1) / norm.ppf(0.975)
    low, high = np.clip(centre + stretch * (ends - centre), np.nanmin(values), np.nanmax(values)).tolist()
    return centre, low, high


def shown(triple: tuple[float, float, float], sign: bool = False) -> str:
    form = "+.2f" if sign else ".2f"
    if np.isnan(triple[0]):
        return "-"
    return f"{triple[0]:{form}} [{triple[1]:.2f}, {triple[2]:.2f}]"


class Study:
    """The cells, and samples of per-example values from them."""

    def __init__(self, cells: list[dict[str, Any]]) -> None:
        self.cells = {tuple(c["cell"][k] for k in ("encoder", "weights", "source", "half")): c for c in cells}
        self.settings = cells[0]["settings"]

    def group(self, group: str) -> list[str]:
        """Its encoders, of which there are cells; "all" has the good and the weak, and good ones are of two kinds."""
        names = (GROUPS | KINDS | {"all": GROUPS["good"] + GROUPS["weak"]})[group]
        return [name for name in names if any(key[0] == name for key in self.cells)]

    def samples(
        self,
        method: str,
        metric: str,
        source: str = "hard",
        group: str = "good",
        weights: str = "trained",
        half: int = 1,
        used: bool | None = None,
        of: str = "values",
    ) -> dict[str, Values]:
        """Values by encoder; ``used``: of the pairs whose similarity comes from the shared object, or does not."""
        found = {}
        for encoder in self.group(group):
            cell = self.cells.get((encoder, weights, source, half), {})
            values = cell.get(of, {}).get(method, {}).get(metric)
            if values is None:
                continue
            found[encoder] = np.array(values, float)
            if used is not None:
                keep = np.array(cell["used"]) == used
                found[encoder][~keep[: len(values)]] = np.nan
                if keep.sum() < LEAST_USED:
                    del found[encoder]
        return found

    def mean(self, method: str, metric: str, **of: Any) -> Triple:
        return mean_over(list(self.samples(method, metric, **of).values()))

    def used(self, encoder: str, source: str, weights: str = "trained") -> float:
        cell = self.cells.get((encoder, weights, source, 1))
        return float(np.mean(cell["used"])) if cell else float("nan")

    def methods(self, source: str, group: str) -> list[str]:
        return [m for m in ORDER if self.samples(m, RIGHT, source, group)]

    def passes(self, method: str) -> Triple:
        """
        Forward passes for a pair, with gradients, and once a call, in the mean over the good encoders.

        References of other pairs are embedded once for all.
        """
        masks = {MANY: "many", **dict.fromkeys((*BY_MASKS, *LESS), "masks")}.get(method)
        others = {"contrast with the rest": self.settings["pairs"] - 1}.get(method, OTHERS)
        first = float(others) if method in SEES_OTHERS else 0.0
        if method == FAME:  # a backward pass has about two forward passes
            return self.settings["descent"] + 1.0, 3.0 * self.settings["descent"] + 1.0, first
        if masks:
            return self.settings[masks] + 1.0, self.settings[masks] + 1.0, first
        costs = [c["costs"][method] for c in self.cells.values() if method in c.get("costs", {})]
        forward, in_all, once = np.mean(costs, 0) if costs else (np.nan,) * 3
        return float(forward), float(in_all), float(once) + first

    def p_value(self, method: str, source: str) -> float:
        """Wilcoxon's signed-rank test of the mean differences to FAM of the families of encoders, two-sided."""
        margins: dict[str, list[float]] = {}
        one, two = (self.samples(m, RIGHT, source, "all") for m in (method, FAM))
        for encoder, values in less(one, two).items():
            margins.setdefault(FAMILIES[encoder], []).append(float(np.mean(values)))
        means = [np.mean(found) for found in margins.values()]
        return float(wilcoxon(means).pvalue) if np.any(means) else 1.0


def less(one: dict[str, Values], two: dict[str, Values]) -> dict[str, Values]:
    """The difference by encoder, of the pairs that both have."""
    both = {e: min(len(one[e]), len(two[e])) for e in one if e in two}
    return {e: one[e][:n] - two[e][:n] for e, n in both.items()}


def margin(one: dict[str, Values], two: dict[str, Values]) -> Triple:
    return mean_over(list(less(one, two).values()))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def title(method: str, study: Study) -> str:
    """The name of a method, with a mark for what it sees more than an embedding of one reference."""
    return {
        "best match": "best match ¹",
        "match less others": "match less others ¹ ²",
        "contrast with the rest": "contrast with the rest ²",
        "SharedParts": "SharedParts ¹",
        **{m: f"{m}, {study.settings['masks']:,} masks" for m in BY_MASKS},
        **{m: f"{m} ²" for m in LESS},
        FAME: f"FAME, {study.settings['descent']:,} steps",
        MANY: f"RELAX, {study.settings['many']:,} masks",
    }.get(method, method)


def number(value: float, form: str = ".1f") -> str:
    return "-" if np.isnan(value) else f"{value:{form}}"


def main_table(study: Study) -> str:
    """Hard scenes that can be solved, good encoders: does the map find the shared object?"""
    rows = []
    for m in study.methods("hard", "good"):
        found = study.samples(m, RIGHT)
        rows.append(
            [
                title(m, study),
                shown(mean_over(list(found.values()))),
                shown(margin(found, study.samples(m, RIGHT, weights="untrained")), sign=True),
                shown(study.mean(m, RIGHT, used=True)),
                shown(study.mean(m, RIGHT, used=False)),
                shown(study.mean(m, "used object")),
                shown(margin(found, study.samples(m, f"{RIGHT}, swapped")), sign=True),
                shown(margin(found, study.samples(m, RIGHT, weights="shuffled")), sign=True),
                shown(study.mean(m, RIGHT, half=0)),
                shown(study.mean(m, RIGHT, source="hard, all")),
                *("-" if m in CONTROLS else number(x) for x in study.passes(m)),
            ]
        )
    header = ["method", RIGHT, "over untrained", "where used", "where not used", "used object", "over swapped"]
    more = ["over shuffled", "half 0", "all hard scenes", "passes", "with gradients", "once a call"]
    return table([*header, *more], rows)


def kinds_table(study: Study) -> str:
    """Hard scenes that can be solved: encoders that others trained, and those that were trained for this study."""
    rows = []
    for m in study.methods("hard", "good"):
        row = [title(m, study)]
        for kind in KINDS:
            found = study.samples(m, RIGHT, group=kind)
            untrained = study.samples(m, RIGHT, group=kind, weights="untrained")
            row += [shown(mean_over(list(found.values()))), shown(margin(found, untrained), sign=True)]
            row.append(shown(study.mean(m, RIGHT, group=kind, used=True)))
        rows.append(row)
    return table(["method", *(f"{kind}: {x}" for kind in KINDS for x in (RIGHT, "over untrained", "where used"))], rows)


def scenes_table(study: Study, source: str, group: str) -> str:
    rows = []
    for m in study.methods(source, group):
        found = study.samples(m, RIGHT, source, group)
        untrained = study.samples(m, RIGHT, source, group, "untrained")
        rows.append(
            [
                title(m, study),
                shown(mean_over(list(found.values()))),
                shown(margin(found, untrained), sign=True),
                shown(study.mean(m, RIGHT, source=source, group=group, used=True)),
            ]
        )
    return table(["method", RIGHT, "over untrained", "where used"], rows)


def families_table(study: Study) -> str:
    """Over FAM, over all encoders, tested over their families."""
    tested = [m for m in study.methods("medium", "all") if m != FAM]
    p_values = [study.p_value(m, "medium") for m in tested]
    rows = []
    for m, p in zip(tested, false_discovery_control(p_values, method="by")):
        one, two = (study.samples(x, RIGHT, "medium", "all") for x in (m, FAM))
        rows.append([title(m, study), shown(margin(one, two), sign=True), f"{p:.3f}"])
    return table(["method", "over FAM cosine", "p"], rows)


def gap(study: Study, method: str, kind: str, baseline: str, group: str = "good") -> dict[str, Values]:
    """Insertion less deletion by encoder; ``kind`` is "pair " or nothing."""
    names = (f"{kind}{name}, {baseline}" for name in ("insertion", "deletion"))
    return less(*(study.samples(method, name, group=group) for name in names))


def faithfulness_table(study: Study) -> str:
    """The metrics that change the images: each map's margin over a random one, and the integrated map's over each."""

    def over(m: str, other: str, baseline: str, kind: str = "") -> str:
        return shown(margin(gap(study, m, kind, baseline), gap(study, other, kind, baseline)), sign=True)

    rows = []
    for m in (*ORDER, *KNOWN):
        if not gap(study, m, "", "blur"):
            continue
        ahead = ["", ""] if m == "integrated" else [over("integrated", m, b) for b in ("blur", "mean")]
        forward = "-" if m in CONTROLS else number(study.passes(m)[0])
        own = [over(m, "random", "blur"), over(m, "random", "mean"), over(m, "random", "mean", "pair ")]
        rows.append([title(m, study), *own, *ahead, forward])
    header = ["method", "blur", "mean", "both images, mean", "integrated over it, blur", "the same, mean", "passes"]
    return table(header, rows)


def places_table(study: Study) -> str:
    """Do places find each other? Untrained encoders in brackets."""
    metrics = ("strongest pair", "found in the reference", "found in the image")
    rows = []
    for m in ("CorrespondenceMap", "SimilarityDecomposition", "chance"):
        row = [m if m == "chance" else f"`{m}`"]
        for source in ("hard", "medium"):
            for metric in metrics:
                value = shown(study.mean(m, metric, source=source, of="places"))
                untrained = study.mean(m, metric, source=source, of="places", weights="untrained")[0]
                row.append(value if m == "chance" else f"{value} ({number(untrained, '.2f')})")
        rows.append(row)
    return table(["matrix", *(f"{s}: {metric}" for s in ("hard", "medium") for metric in metrics)], rows)


def summary_table(study: Study) -> str:
    """A number of each kind, for the good encoders."""
    rows = []
    for m in study.methods("hard", "good"):
        untrained = study.mean(m, RIGHT, weights="untrained")[0]
        rows.append(
            [
                title(m, study),
                f"{shown(study.mean(m, RIGHT))} ({number(untrained, '.2f')})",
                shown(margin(gap(study, m, "", "blur"), gap(study, "random", "", "blur")), sign=True),
                shown(study.mean(m, "used object")),
                shown(study.mean(m, RIGHT, source="medium")),
                shown(study.mean(m, "rank accuracy", source="photos")),
                "-" if m in CONTROLS else number(study.passes(m)[0]),
            ]
        )
    return table(["method", RIGHT, "faithfulness", "used object", "medium scenes", "photos", "passes"], rows)


def encoders_table(study: Study, group: str, sources: Sequence[str]) -> str:
    """By encoder: what it uses, and which maps find it."""
    names = [FAM, "decomposition self", "integrated", "best match", "match less others", "contrast with the rest"]
    asked, rows = sources[0], []
    for encoder in study.group(group):
        found = [study.samples(m, RIGHT, asked, group).get(encoder) for m in (*names, *BY_MASKS)]
        rows.append(
            [
                encoder,
                *(number(study.used(encoder, source), ".2f") for source in sources),
                number(study.used(encoder, asked, "untrained"), ".2f"),
                *("-" if v is None else f"{np.mean(v):.2f}" for v in found),
            ]
        )
    head = ["encoder", *(f"used, {source}" for source in sources), f"untrained, {asked}"]
    return table([*head, *(title(m, study) for m in (*names, *BY_MASKS))], rows)


def photos_table(study: Study) -> str:
    rows = []
    for m in study.methods("medium", "good"):
        values = [shown(study.mean(m, k, source="photos", group=g)) for g in ("good", "weak") for k in PHOTO_METRICS]
        if m not in (FAME, *BY_MASKS, *LESS):
            rows.append([title(m, study), *values])
    return table(["method", *(f"{g}: {k}" for g in ("good", "weak") for k in PHOTO_METRICS)], rows)


PHOTO_METRICS = ("rank accuracy", "pointing game")


def mean_colour_table(study: Study) -> str:
    rows = []
    for m in study.methods("hard", "control"):
        values = [study.mean(m, RIGHT, source=source, group="control")[0] for source in ("hard", "medium")]
        rows.append([title(m, study), *(number(v, ".2f") for v in values)])
    return table(["method", "hard", "medium"], rows)


def goals(study: Study, group: str) -> str:
    """What was to be reached, judged from the numbers; the map is chosen on half 0 and judged on half 1."""
    apart = (FAME, *BY_MASKS, MANY, *LESS, *CONTROLS, *BY_PARTS, "LaFAM")
    all_maps = [m for m in study.methods("hard", group) if m not in apart]
    few = [m for m in all_maps if study.passes(m)[0] <= 3.05]  # beyond passes, places are compared
    judged: dict[str, Sequence[str]] = {}  # maps, and what each is measured against
    for names, rivals in (([m for m in few if m not in SEES_OTHERS], BY_MASKS), (few, (*BY_MASKS, *LESS))):
        if names and all(study.samples(m, RIGHT, group=group) for m in rivals):
            judged[max(names, key=lambda m: study.mean(m, RIGHT, group=group, half=0)[0])] = rivals
    lines = [line for best, rivals in judged.items() for line in _of_map(study, group, best, rivals)]
    for m in ("RELAX", MANY):
        found = {b: less(gap(study, "integrated", "", b, group), gap(study, m, "", b, group)) for b in ("blur", "mean")}
        margins = {b: mean_over(list(one.values())) for b, one in found.items()}
        numbers = "; ".join(f"{b} {shown(value, sign=True)}" for b, value in margins.items())
        goal = f"*integrated* more faithful than {title(m, study)}, the margin's interval above 0"
        lines.append((goal, all(value[1] > 0 for value in margins.values()), f"{numbers}; {seen(found['blur'])}"))
    forward, in_all, once = study.passes("integrated")
    measured = f"{forward:.1f}; {in_all:.1f} with gradients, and {once:.1f} once a call"
    lines.append(("*integrated* at no more than ten passes", forward <= 10, measured))
    return table(["goal", "", "measured"], [[g, "reached" if ok else "**not reached**", n] for g, ok, n in lines])


def _of_map(study: Study, group: str, best: str, rivals: Sequence[str]) -> list[tuple[str, bool, str]]:
    """Goals of one map."""
    found, cost = study.samples(best, RIGHT, group=group), study.passes(best)
    all_pairs, where_used = mean_over(list(found.values())), study.mean(best, RIGHT, group=group, used=True)
    learned = margin(found, study.samples(best, RIGHT, group=group, weights="untrained"))
    of_rivals = {m: study.samples(m, RIGHT, group=group) for m in rivals}
    means = {m: mean_over(list(v.values())) for m, v in of_rivals.items()}
    against = "; ".join(
        f"{title(m, study)}: {shown(means[m])}, on the same pairs {shown(margin(found, v), sign=True)}"
        for m, v in of_rivals.items()
    )
    apart = all(all_pairs[1] > mean[2] for mean in means.values())
    name = f"*{title(best, study)}*"
    return [
        (f"{name} over untrained encoders, the margin's interval above 0", learned[1] > 0, shown(learned, sign=True)),
        (f"{name}: right object at least 0.65", all_pairs[0] >= 0.65, f"{shown(all_pairs)}; {seen(found)}"),
        (f"{name}: where used at least 0.85", where_used[0] >= 0.85, shown(where_used)),
        (f"{name} above {' and '.join(rivals)}, intervals that do not overlap", apart, against),
        (f"{name}: at most three passes", cost[0] <= 3.05, f"{cost[0]:.2f}, and {cost[2]:.1f} once a call"),
    ]


def seen(samples: dict[str, Values]) -> str:
    encoders = "one encoder" if len(samples) == 1 else f"{len(samples)} encoders"
    return f"{encoders}, {sum(map(len, samples.values()))} pairs"


def write_csv(study: Study, path: Path) -> None:
    """A row for each encoder, weights, source, half, method and metric: mean, 95 % interval, number of pairs."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        head = ["encoder", "weights", "source", "half"]
        writer.writerow([*head, "method", "metric", "pairs", "mean", "low", "high"])
        for key, cell in sorted(study.cells.items()):
            for method, by_metric in [*cell["values"].items(), *cell.get("places", {}).items()]:
                for metric, values in by_metric.items():
                    numbers = [f"{x:.4f}" for x in mean_over([np.array(values)])]
                    writer.writerow([*key, method, metric, len(values), *numbers])
            if "used" in cell:
                share = f"{np.mean(cell['used']):.4f}"
                writer.writerow([*key, "", "used by the encoder", len(cell["used"]), share, "", ""])


def draw_scenes(study: Study, path: Path) -> None:
    """Right objects by method: trained, untrained, another reference."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    methods = study.methods("hard", "good")[::-1]
    for axis, used, name in zip(axes, (None, True), ("all pairs", "pairs whose shared object the encoder uses")):
        series: list[tuple[str, str, str, Callable[[str], Triple]]] = [
            ("trained", "C0", "o", lambda m, used=used: study.mean(m, RIGHT, used=used)),
            ("another reference", "C1", "s", lambda m, used=used: study.mean(m, f"{RIGHT}, swapped", used=used)),
            ("untrained encoder", "0.6", "^", lambda m, used=used: study.mean(m, RIGHT, weights="untrained")),
        ]
        for row, (label, colour, marker, mean) in enumerate(series[: 2 if used else 3]):
            values = np.array([mean(m) for m in methods]).reshape(-1, 3)
            y = np.arange(len(methods)) + (1 - row) * 0.2
            error = np.abs(values[:, 1:] - values[:, :1]).T
            axis.errorbar(values[:, 0], y, xerr=error, fmt=marker, color=colour, label=label, markersize=4, lw=1)
        axis.axvline(0.25, color="black", lw=0.8, ls=":")
        axis.set(title=name, xlabel="the shared object has the largest mean (chance 0.25)", xlim=(0, 1))
        axis.set_yticks(range(len(methods)), methods)
    axes[0].legend(loc="lower right", fontsize=8)
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
    cells: list[dict[str, Any]], missing: Sequence[str], drawn: dict[str, Any], output: Path, command: str
) -> None:
    """
    README.md, results.csv and figures in a folder.

    ``missing``: names of cells that are not finished; ``drawn``: which hard scenes were kept, by half.
    """
    study = Study(cells)
    write_csv(study, output / "results.csv")
    draw_scenes(study, output / "scenes.png")
    s = study.settings
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "captum", "scipy", "numpy", "timm", "transformers"))
    photos = [len(v) for v in study.samples(FAM, "rank accuracy", "photos", "all").values()]
    families = len({FAMILIES[encoder] for encoder in study.group("all")})
    text = TEXT.format(
        command=command,
        python=platform.python_version(),
        packages=packages,
        settings=", ".join(f"{k} {v}" for k, v in s.items()),
        good=len(study.group("good")),
        weak=len(study.group("weak")),
        families=families,
        least_p=f"{0.5 ** (families - 1):.3f}",
        photos=max(photos, default=0),
        resamples=RESAMPLES,
        least_used=LEAST_USED,
        kept="; ".join(f"half {half}: {len(d['kept'])} of {d['drawn']}" for half, d in drawn.items()),
        goals=goals(study, "good"),
        goals_of_others=goals(study, "EfficientNets"),
        kinds=kinds_table(study),
        summary=summary_table(study),
        main=main_table(study),
        by_encoder=encoders_table(study, "good", ("hard", "medium", "hard, all")),
        by_weak_encoder=encoders_table(study, "weak", ("medium",)),
        both=places_table(study),
        faithfulness=faithfulness_table(study),
        medium=scenes_table(study, "medium", "good"),
        weak_medium=scenes_table(study, "medium", "weak"),
        missing=f"\n**Not measured yet**: {', '.join(missing)}.\n" if missing else "",
        family_tests=families_table(study),
        photo_places=photos_table(study),
        mean_colour=mean_colour_table(study),
        **{name: s[name] for name in ("pairs", "masks", "descended", "descent", "faithful", "steps", "many")},
    )
    (output / "README.md").write_text(text)
