"""``captum-fam explain``: why an image is similar to others, or to sentences."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from captum_fam._files import utf8
from captum_fam.cli._common import Reference, loaded, number, read_references
from captum_fam.cli._explore import controls, page_of
from captum_fam.cli._figure import explanation_figure
from captum_fam.cli._rows import ITSELF, NOTHING, USUAL, Asked, Compared, Row, check_method, rows_of, usual_rows
from captum_fam.cli._say import say, short
from captum_fam.images import FIGURES, check_output, read_image, write_figure
from captum_fam.methods.integrated_decomposition import IntegratedDecomposition
from captum_fam.methods.margins import why_opposite
from captum_fam.similarity import channel_contributions, widen

_PAGE = ".html"


def explain(
    query: Path,
    references: Sequence[Path],
    output: Path | None,
    texts: Sequence[str],
    methods: Sequence[str],
    contrast: str | None,
    threshold: float | None,
    as_json: bool,
    json_maps: bool,
    encoder: str,
    layer: str | None,
    similarity: str,
    **loading: Any,
) -> int:
    output = output or query.with_name(f"{query.stem}_fam.png")
    check_output(output, (*FIGURES, _PAGE), (query, *references))
    is_page = output.suffix.lower() == _PAGE
    if is_page and (methods or texts or contrast is not None or threshold is not None):
        raise ValueError(
            f"cannot write {output}: a page has no --method, --text, --contrast and --threshold; leave them out, or"
            " name a file that ends in .png, .pdf or .svg with -o"
        )
    image = read_image(query)
    given = read_references(references, needed=0 if texts else 1)
    given += [Reference(len(references) + i, text) for i, text in enumerate(texts, 1)]
    kept = [reference for reference in given if not reference.error]
    pictures = [reference.image for reference in kept if reference.image is not None]
    asked, methods = asked_of(contrast, threshold, given, kept), list(dict.fromkeys(methods))
    for name in methods or ["FeatureActivationMap"]:
        check_method(name, asked, similarity, len(pictures))
    beside, beside_names = controls(None) if is_page else ([], [])

    with loaded([image, *pictures, *beside], encoder, layer=layer, texts=texts, **loading) as ready:
        end = len(pictures) + 1
        z, s = ready.embeddings[:1], torch.cat([ready.embeddings[1:end], ready.texts])
        compared = Compared(
            ready.model,
            ready.layer,
            ready.layer_name,
            similarity,
            ready.tensors[:1],
            ready.tensors[1:end],
            z,
            s,
            [reference.number for reference in kept],
        )
        scores = channel_contributions(widen(z), widen(s), similarity).sum(1).tolist()
        rows = rows_of(methods, encoder, compared, asked, not layer) if methods else usual_rows(compared, asked)
        found = {
            row.name: row.method.layer_of(compared.query)
            for row in rows
            if isinstance(row.method, IntegratedDecomposition) and not layer
        }
        if is_page:
            names = [short(query), *(short(Path(reference.name)) for reference in kept), *beside_names]
            page, *_ = page_of(ready, [image, *pictures, *beside], names, len(pictures), similarity)

    margins = asked.margins(scores)
    notes = _notes([row for row in rows if row.asked == asked], scores, margins, kept, asked)
    if is_page:
        page.save(output)
    else:
        plain = [f"for {reference.number}: {similarity} {scores[k]:.3f}" for k, reference in enumerate(kept)]
        of_margins = [f"{text}\nmargin {margin:+.3f}" for text, margin in zip(plain, margins)] or plain
        captions = [of_margins if row.asked == asked else plain for row in rows]  # others explain no margin
        shown = [str(reference.name) if reference.image is None else reference.image for reference in kept]
        figure = explanation_figure(image, shown, rows, captions, [reference.caption for reference in kept])
        write_figure(figure, output)
    if as_json or json_maps:
        parts = {
            reference.number: {
                "score": number(scores[k]),
                "margin": number(margins[k]) if margins else None,
                **_maps_of(rows, k, nested=bool(methods), whole=json_maps),
            }
            for k, reference in enumerate(kept)
        }
        report = {
            "figure": utf8(output),
            "encoder": utf8(encoder),
            "layer": utf8(ready.layer_name),
            "layers": found,
            "route": rows[0].route,
            "similarity": similarity,
            "contrast": contrast,
            "threshold": threshold,
            "size": ready.size,
            "query": utf8(query),
            "notes": notes,
            "references": [
                {
                    "number": reference.number,
                    "text" if isinstance(reference.name, str) else "path": utf8(reference.name),
                    "error": utf8(reference.error) or None,
                    **parts.get(reference.number, {"score": None, "margin": None}),
                }
                for reference in given
            ],
        }
        click.echo(json.dumps(report, indent=None if json_maps else 2, allow_nan=False))
    else:
        last = "" if layer else ", the last with a map"
        route = "" if methods else f"; {rows[0].route} route"
        say(f"encoder {encoder}, layer {ready.layer_name} ({type(ready.layer).__name__}){last}{route}")
        for name, own in found.items():
            say(f"{name}: layer {own}, which it found")
        for k, reference in enumerate(kept):
            margin = f"  margin {margins[k]: .4f}" if margins else ""
            say(f"{reference.number}  {similarity} {scores[k]: .4f}{margin}  {reference.shown}")
        for note in notes:
            say(f"note: {note}")
        say(f"wrote {output}")
        if encoder == "bundled":
            say("bundled is a small encoder for trying out: name yours with --encoder")
    return int(len(kept) < len(given))


def asked_of(
    contrast: str | None, threshold: float | None, given: Sequence[Reference], kept: Sequence[Reference]
) -> Asked:
    """What is subtracted from the scores, from the options; a reference is given by its number from 1."""
    if threshold is not None:
        if contrast is not None:
            raise ValueError("--contrast and --threshold were both given: name one")
        if not math.isfinite(threshold):
            raise ValueError(f"--threshold must be a finite score, but got {threshold}")
        return Asked(None, threshold, "--threshold", f"less the threshold {threshold:g}")
    if contrast is None:
        return NOTHING
    if contrast == "self":
        return ITSELF
    option, numbered = f"--contrast {contrast}", contrast.isdecimal() and 1 <= int(contrast) <= len(given)
    if numbered and given[int(contrast) - 1].error:
        raise ValueError(f"{option} is an image that cannot be read: name another reference")
    if len(kept) < 2:
        but = ", of which all but one can be read" if len(kept) < len(given) else ""
        raise ValueError(f"--contrast needs at least two references{but}: name another image, or give --contrast self")
    if contrast == "rest":
        return Asked("rest", None, option, "contrast to the rest")
    if not numbered:
        raise ValueError(
            f'--contrast must be "rest", "self" or a reference\'s number, 1 to {len(given)}, but got {contrast}'
        )
    other = given[int(contrast) - 1]
    return Asked(kept.index(other), None, option, f"contrast to reference {other.number}")


def _notes(
    rows: Sequence[Row], scores: Sequence[float], margins: Sequence[float], kept: Sequence[Reference], asked: Asked
) -> list[str]:
    """Notes about the rows, to know before reading them."""
    notes = []
    texts = [reference.number for reference in kept if reference.image is None]
    if texts:
        notes.append("sentences have no places: there are no maps of them, and nothing that looks like them")
    other = kept[asked.contrast].image if isinstance(asked.contrast, int) else None
    unlike = [r.number for r in kept if isinstance(asked.contrast, int) and (r.image is None) != (other is None)]
    if asked.contrast == "rest" and 0 < len(texts) < len(kept):
        unlike = [reference.number for reference in kept]
    if unlike:
        notes.append(
            f"{asked.option}: for {_listed(unlike)}, scores of images and of sentences are compared, which"
            " differ in most encoders, whatever they show; contrast images with images, and sentences with sentences"
        )
    sides = {"for": False} | ({"of": True} if asked.of_each_side else {})
    for row in rows:
        found = {word: [kept[k].number for k in row.against(margins, scores, there)] for word, there in sides.items()}
        words = [f"the map {word} {_listed(numbers)}" for word, numbers in found.items() if numbers]
        if words:
            label = " ".join(row.label.split())
            adds = "adds" if len(words) == 1 else "add"
            why = why_opposite(type(row.method), row.method.similarity)
            notes.append(f"{label}: {' and '.join(words)} {adds} up to the opposite sign of the margin: {why}")
    return notes


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _maps_of(rows: Sequence[Row], k: int, nested: bool, whole: bool) -> dict[str, Any]:
    """The maps for a reference, and those of the reference, by the names of their rows."""
    here = {row.name: _statistics(row.here[k], whole) for row in rows}
    there = {row.name: _statistics(row.there[k], whole) for row in rows}
    if nested:
        return {"maps": here, "reference_maps": there}
    return {name: here.get(name) for name in USUAL} | {f"reference_{name}": there.get(name) for name in USUAL}


def _statistics(values: Tensor | None, whole: bool) -> dict[str, Any] | None:
    if values is None:
        return None
    statistics = {
        "shape": list(values.shape),
        "min": number(values.min().item()),
        "max": number(values.max().item()),
        "mean": number(values.mean().item()),
    }
    return statistics | ({"values": [[number(v) for v in row] for row in values.tolist()]} if whole else {})
