"""The command ``captum-fam``."""

import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image
from torch import Tensor

from captum_fam import __version__, _interrupt
from captum_fam._files import printable, recorded_warnings, utf8
from captum_fam.comparison import DEFAULT, compare_attributions
from captum_fam.encoders import find_layer, one_line
from captum_fam.encoders._ready import planes, ready_encoder, running
from captum_fam.images import check_output, read_image, write_png
from captum_fam.methods.correspondence_map import CorrespondenceMap, less_the_others
from captum_fam.methods.feature_activation_map import FeatureActivationMap
from captum_fam.methods.integrated_decomposition import IntegratedDecomposition
from captum_fam.methods.similarity_decomposition import SimilarityDecomposition
from captum_fam.score import SimilarityScore
from captum_fam.similarity import channel_contributions, widen
from captum_fam.visualization import explanation_figure, visualize_comparison

# The rows of a figure.
_COMMON, _OWN = "in common: FAM", 'particular to this match: "self"'


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def command() -> None:
    """Which parts of an image make its embedding similar to another's."""


@command.command()
@click.option("-o", "--output", type=Path, default=Path("captum_fam_demo.png"), show_default=True, help="PNG to write.")
def demo(output: Path) -> None:
    """Explain a collage of photographs with the bundled encoder; needs no network."""
    from captum_fam.demo import demo_figure

    check_output(output, ".png")
    figure, table = demo_figure()
    write_png(figure, output)
    click.echo("\n".join(table))
    click.echo()
    _say(f"wrote {output}")


def _encoder_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of commands that explain images with an encoder."""
    options = [
        click.option(
            "--encoder",
            default="bundled",
            show_default=True,
            help="bundled, torchvision:NAME, timm:NAME, hf:PATH (a folder of transformers, or a name on"
            " huggingface.co) or module.path:factory, a function without arguments: its code is run, of a module in the"
            " current folder first.",
        ),
        click.option("--weights", type=Path, help="State dict of the encoder, as torch.save writes it."),
        click.option(
            "--layer",
            help="Dotted name.  [default: the last module with a map, or tokens of one, that the embedding depends on]",
        ),
        click.option(
            "--similarity", type=click.Choice(["cosine", "dot", "euclidean"]), default="cosine", show_default=True
        ),
        click.option(
            "--size",
            type=click.IntRange(1, 4096),
            help="Side in pixels that images are resized to.  [default: the encoder's]",
        ),
        click.option("--device", default="cpu", show_default=True, help="A torch device, such as cuda."),
        click.option(
            "--mean", type=float, nargs=3, help="Mean of the RGB channels in [0, 1].  [default: the encoder's]"
        ),
        click.option(
            "--std", type=float, nargs=3, help="Standard deviation of the RGB channels.  [default: the encoder's]"
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@dataclass(frozen=True)
class Loaded:
    """Images as an encoder sees them, their embeddings, and the layer to explain."""

    model: torch.nn.Module
    layer_name: str
    layer: torch.nn.Module
    tensors: Tensor
    embeddings: Tensor
    size: int


@contextmanager
def _loaded(
    images: Sequence[Image.Image], encoder: str, layer: str | None, size: int | None, **loading: Any
) -> Iterator[Loaded]:
    """Loads the encoder and embeds the images; in this context, whatever the encoder raises becomes one line."""
    with running(encoder, size):
        ready = ready_encoder(encoder, size=size, **loading)
        tensors = ready.batch([ready.tensor(image) for image in images])
        named = find_layer(ready.model, layer, tensors[:1]) if layer is not None else None  # before the encoder runs
        embeddings = torch.cat([ready.embed(t) for t in (tensors[:1], tensors[1:])])
        layer_name, module = named or find_layer(ready.model, None, tensors[:1])
        yield Loaded(ready.model, layer_name, module, tensors, embeddings, ready.size)


@command.command()
@click.argument("query", type=Path)
@click.argument("references", type=Path, nargs=-1, required=True, metavar="REFERENCE...")
@click.option("-o", "--output", type=Path, help="PNG to write.  [default: QUERY_fam.png beside the query]")
@click.option("--json", "as_json", is_flag=True, help="Print scores, layer, encoder and map statistics as JSON.")
@click.option("--contrast", help='Why each reference rather than another: its number, from 1, or "rest" for the mean.')
@_encoder_options
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

    with _loaded(images, encoder, layer=layer, **loading) as loaded:
        layer_name, tensors = loaded.layer_name, loaded.tensors
        fam = FeatureActivationMap(loaded.model, loaded.layer, similarity=similarity)
        z, s = loaded.embeddings[:1], loaded.embeddings[1:]
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
            match = SimilarityDecomposition(loaded.model, loaded.layer, similarity=similarity)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The places of layer")  # a figure shows no sum
                maps = match.attribute_all(tensors[:1], reference_embedding=s, contrast="self")
                back = match.attribute(tensors[1:], reference_embedding=z, contrast="self")
            rows[_OWN], reference_rows[_OWN] = planes(maps, layer_name), planes(back, layer_name)
        alike = "what looks alike" + (", less the others" if len(s) > 1 else "")
        rows[alike], reference_rows[alike] = (
            planes(maps, layer_name)
            for maps in less_the_others(CorrespondenceMap(loaded.model, loaded.layer), tensors[:1], tensors[1:])
        )
        route = fam.route(tensors[:1])

    margins = _margins(scores, other)
    captions = [
        f"for {i + 1}: {similarity} {score:.3f}" + (f", margin {margins[i]:+.3f}" if margins else "")
        for i, score in enumerate(scores)
    ]
    named = [f"{i + 1}: {_short(path)}" for i, path in enumerate(references)]
    write_png(explanation_figure(images[0], images[1:], rows, reference_rows, captions, named), output)
    if as_json:
        report = {
            "figure": utf8(output),
            "encoder": utf8(encoder),
            "layer": utf8(layer_name),
            "route": route,
            "similarity": similarity,
            "contrast": contrast,
            "size": loaded.size,
            "query": utf8(query),
            "references": [
                {
                    "number": i + 1,
                    "path": utf8(path),
                    "score": _number(scores[i]),
                    "margin": _number(margins[i]) if margins else None,
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
    _say(f"encoder {encoder}, layer {layer_name} ({type(loaded.layer).__name__}){found}; {route} weights")
    for i, path in enumerate(references):
        _say(
            f"{i + 1}  {similarity} {scores[i]: .4f}" + (f"  margin {margins[i]: .4f}" if margins else "") + f"  {path}"
        )
    _say(f"wrote {output}")


@command.command()
@click.argument("query", type=Path)
@click.argument("reference", type=Path)
@click.option("-o", "--output", type=Path, help="PNG to write.  [default: QUERY_compare.png beside the query]")
@click.option(
    "--method",
    "methods",
    multiple=True,
    help=f"A class of captum_fam or captum.attr, any number of times.  [default: {', '.join(DEFAULT)}]",
)
@_encoder_options
def compare(
    query: Path,
    reference: Path,
    output: Path | None,
    methods: Sequence[str],
    encoder: str,
    layer: str | None,
    similarity: str,
    **loading: Any,
) -> None:
    """
    Compare attribution methods on the similarity of the images QUERY and REFERENCE.

    Writes one figure: a row for each of the two images, a column for each method.
    """
    images = [read_image(path) for path in (query, reference)]
    output = output or query.with_name(f"{query.stem}_compare.png")
    check_output(output, ".png", (query, reference))
    with _loaded(images, encoder, layer=layer, **loading) as loaded:
        score = SimilarityScore(loaded.model, loaded.embeddings, similarity)
        value = score(loaded.tensors[:1])[0, 1].item()
        maps = compare_attributions(
            score,
            loaded.layer,
            loaded.tensors,
            [1, 0],
            methods or None,
            reference=loaded.tensors,
            show_progress=sys.stderr.isatty(),
        )
        integrated = IntegratedDecomposition.__name__
        own = IntegratedDecomposition(score).layer_of(loaded.tensors) if integrated in maps else ""
    titles = [f"query: {_short(query)}\n{similarity} {value:.3f}", f"reference: {_short(reference)}"]
    figure, _ = visualize_comparison(images, maps, titles=titles, use_pyplot=False)
    write_png(figure, output)
    found = "" if layer else ", the last with a map"
    _say(f"encoder {encoder}, layer {loaded.layer_name} ({type(loaded.layer).__name__}){found}")
    if own:
        _say(f"{integrated}: layer {own}, which it found")
    _say(f"{similarity} {value: .4f}  {', '.join(maps)}")
    _say(f"wrote {output}")


@command.command()
@click.argument("pairs", type=Path)
@click.option("-o", "--output", type=Path, required=True, help="Folder of Parquet files to write, or to finish.")
@click.option("--root", type=Path, default=Path(), help="Where relative paths start.  [default: the current folder]")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Processes, each with its own encoder.  [default: one for each CPU, or each GPU with --device cuda]",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Pairs that are explained at once."
)
@click.option(
    "--part-size",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Pairs in each file: what a stop can cost each worker.",
)
@_encoder_options
def batch(pairs: Path, output: Path, **options: Any) -> None:
    """
    Explain each pair of images that the file PAIRS lists.

    PAIRS is Parquet or CSV with the columns query, reference and, if there is one, id. The
    folder OUTPUT gets a row for each pair: its score, the query's map for the reference, or
    the error. Stopped at any moment and started again, it finishes what is left.
    """
    try:
        from captum_fam.batch import explain_pairs
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'captum-fam[batch]'") from error

    found = explain_pairs(pairs, output, **options)
    if not found.explained:
        raise ValueError(f"none of {found.failed} pairs could be explained, see {output}; the first: {found.error}")
    _say(f"encoder {options['encoder']}, layer {found.layer}")
    _say(f"explained {found.explained} pairs, {found.failed} failed" + (f": {found.error}" if found.error else ""))
    _say(f"wrote {output}")


def main() -> None:
    """Runs the command; an error is one line on stderr and exit status 2."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of each glyph that a font lacks
    try:
        with _interrupt.raised(), recorded_warnings() as warned:
            status = command.main(sys.argv[1:] or ["--help"], "captum-fam", standalone_mode=False) or 0
            for text, path in () if status else warned:
                _say(f"captum-fam: warning: {text}" + (f" ({path})" if path else ""), err=True)
    except (click.Abort, KeyboardInterrupt):
        _say("captum-fam: interrupted", err=True)
        status = _interrupt.STATUS
    except Exception as error:
        _say(f"captum-fam: {_message(error)}", err=True)
        status = 2
    sys.exit(status)


def _say(line: object, err: bool = False) -> None:
    """A line of ours, with names and messages of others in it."""
    encoding = (sys.stderr if err else sys.stdout).encoding or "utf-8"
    click.echo(printable(line).encode(encoding, "backslashreplace").decode(encoding), err=err)


def _message(error: Exception) -> str:
    if isinstance(error, click.ClickException):
        return " ".join(error.format_message().split())
    return " ".join(str(error).split()) if isinstance(error, ValueError) else one_line(error)


def _margins(scores: list[float], other: Any) -> list[float]:
    """What a contrast map explains: each score less the other's, or the mean of the others'."""
    if other is None:
        return []
    if other == "rest":
        return [score - (sum(scores) - score) / (len(scores) - 1) for score in scores]
    return [score - scores[other] for score in scores]


def _short(path: Path, longest: int = 30) -> str:
    name = printable(path.name)
    return name if len(name) <= longest else f"{name[: longest // 2]}\N{HORIZONTAL ELLIPSIS}{name[-longest // 2 :]}"


def _number(value: float) -> float | None:
    """JSON has no infinities."""
    return value if math.isfinite(value) else None


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
        "min": _number(values.min().item()),
        "max": _number(values.max().item()),
        "mean": _number(values.mean().item()),
    }
