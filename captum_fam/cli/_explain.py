"""``captum-fam explain``: why an image is similar to others."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from captum_fam._files import utf8
from captum_fam.cli._common import encoder_options, loaded, number, say, short
from captum_fam.encoders._ready import planes
from captum_fam.images import check_output, read_image, write_figure
from captum_fam.methods.correspondence_map import CorrespondenceMap, less_the_others
from captum_fam.methods.feature_activation_map import FeatureActivationMap
from captum_fam.methods.similarity_decomposition import SimilarityDecomposition
from captum_fam.similarity import channel_contributions, widen
from captum_fam.visualization import explanation_figure

# The rows of a figure.
_COMMON, _OWN = "in common: FAM", 'particular to this match: "self"'


@click.command()
@click.argument("query", type=Path)
@click.argument("references", type=Path, nargs=-1, required=True, metavar="REFERENCE...")
@click.option("-o", "--output", type=Path, help="PNG to write.  [default: QUERY_fam.png beside the query]")
@click.option("--json", "as_json", is_flag=True, help="Print scores, layer, encoder and map statistics as JSON.")
@click.option("--contrast", help='Why each reference rather than another: its number, from 1, or "rest" for the mean.')
@encoder_options
def explain(
    query: Path,
    references: Sequence[Path],
    output: Path | None,
    as_json: bool,
    contrast: str | None,
    encoder: str,
    layer: str | None,
    similarity: str,
    **loading: Any,
) -> None:
    """
    Explain the similarity of the image QUERY to each REFERENCE.

    Writes one figure with the scores: what the query has in common with each reference (FAM),
    what is particular to this match ("self", not for euclidean), which places look alike (less the
    other references, if there are any), and all this on the references.
    """
    images = [read_image(path) for path in (query, *references)]
    output = output or query.with_name(f"{query.stem}_fam.png")
    check_output(output, ".png", (query, *references))
    other = _contrast(contrast, len(references))

    with loaded(images, encoder, layer=layer, **loading) as ready:
        layer_name, tensors = ready.layer_name, ready.tensors
        fam = FeatureActivationMap(ready.model, ready.layer, similarity=similarity)
        z, s = ready.embeddings[:1], ready.embeddings[1:]
        scores = channel_contributions(widen(z), widen(s), similarity).sum(1).tolist()
        if isinstance(other, int):
            queries = tensors[:1].expand(len(s), -1, -1, -1)
            maps = fam.attribute(queries, list(range(len(s))), reference_embedding=s, contrast=other)
        else:
            maps = fam.attribute_all(tensors[:1], reference_embedding=s, contrast=other)
        first = (
            _COMMON if other is None else f"contrast to {'the rest' if other == 'rest' else f'reference {other + 1}'}"
        )
        rows = {first: planes(maps, layer_name)}
        reference_rows = {_COMMON: planes(fam.attribute(tensors[1:], reference_embedding=z), layer_name)}
        if similarity != "euclidean":  # by which nothing is particular to a match
            match = SimilarityDecomposition(ready.model, ready.layer, similarity=similarity)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The places of layer")  # a figure shows no sum
                maps = match.attribute_all(tensors[:1], reference_embedding=s, contrast="self")
                back = match.attribute(tensors[1:], reference_embedding=z, contrast="self")
            rows[_OWN], reference_rows[_OWN] = planes(maps, layer_name), planes(back, layer_name)
        alike = "what looks alike" + (", less the others" if len(s) > 1 else "")
        rows[alike], reference_rows[alike] = (
            planes(maps, layer_name)
            for maps in less_the_others(CorrespondenceMap(ready.model, ready.layer), tensors[:1], tensors[1:])
        )
        route = fam.route(tensors[:1])

    margins = _margins(scores, other)
    captions = [
        f"for {i + 1}: {similarity} {score:.3f}" + (f", margin {margins[i]:+.3f}" if margins else "")
        for i, score in enumerate(scores)
    ]
    named = [f"{i + 1}: {short(path)}" for i, path in enumerate(references)]
    write_figure(explanation_figure(images[0], images[1:], rows, reference_rows, captions, named), output)
    if as_json:
        report = {
            "figure": utf8(output),
            "encoder": utf8(encoder),
            "layer": utf8(layer_name),
            "route": route,
            "similarity": similarity,
            "contrast": contrast,
            "size": ready.size,
            "query": utf8(query),
            "references": [
                {
                    "number": i + 1,
                    "path": utf8(path),
                    "score": number(scores[i]),
                    "margin": number(margins[i]) if margins else None,
                    "map": _statistics(rows[first][i]),
                    "self": _statistics(rows[_OWN][i]) if _OWN in rows else None,
                    "alike": _statistics(rows[alike][i]),
                    "reference_alike": _statistics(reference_rows[alike][i]),
                    "reference_map": _statistics(reference_rows[_COMMON][i]),
                }
                for i, path in enumerate(references)
            ],
        }
        click.echo(json.dumps(report, indent=2, allow_nan=False))
        return
    found = "" if layer else ", the last with a map"
    say(f"encoder {encoder}, layer {layer_name} ({type(ready.layer).__name__}){found}; {route} weights")
    for i, path in enumerate(references):
        say(
            f"{i + 1}  {similarity} {scores[i]: .4f}" + (f"  margin {margins[i]: .4f}" if margins else "") + f"  {path}"
        )
    say(f"wrote {output}")


def _margins(scores: list[float], other: Any) -> list[float]:
    """What a contrast map explains: each score less the other's, or the mean of the others'."""
    if other is None:
        return []
    if other == "rest":
        return [score - (sum(scores) - score) / (len(scores) - 1) for score in scores]
    return [score - scores[other] for score in scores]


def _contrast(contrast: str | None, references: int) -> Any:
    """None, "rest", or the index of a reference given by its number from 1."""
    if contrast is None or (contrast == "rest" and references > 1):
        return contrast
    if references < 2:
        raise ValueError("--contrast needs at least two references: name another image")
    if not contrast.isdecimal() or not 1 <= int(contrast) <= references:
        raise ValueError(f'--contrast must be "rest" or a reference\'s number, 1 to {references}, but got {contrast}')
    return int(contrast) - 1


def _statistics(values: Tensor) -> dict[str, Any]:
    return {
        "shape": list(values.shape),
        "min": number(values.min().item()),
        "max": number(values.max().item()),
        "mean": number(values.mean().item()),
    }
