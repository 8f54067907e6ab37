"""The command ``captum-fam``."""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from torch import Tensor

from captum_fam.encoders import find_layer, load_encoder
from captum_fam.feature_activation_map import FeatureActivationMap
from captum_fam.figures import explanation_figure
from captum_fam.images import read_image, to_tensor
from captum_fam.similarity import channel_contributions


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="captum-fam")
def command() -> None:
    """Which parts of an image make its embedding similar to another's."""


@command.command()
@click.option("-o", "--output", type=Path, default=Path("captum_fam_demo.png"), show_default=True, help="PNG to write.")
def demo(output: Path) -> None:
    """Explain a collage of photographs with the bundled encoder; needs no network."""
    from captum_fam.demo import demo_figure

    _check_output(output)
    figure, table = demo_figure()
    _write(figure, output)
    click.echo("\n".join(table))
    click.echo(f"\nwrote {output}")


@command.command()
@click.argument("query", type=Path)
@click.argument("references", type=Path, nargs=-1, required=True, metavar="REFERENCE...")
@click.option("-o", "--output", type=Path, help="PNG to write.  [default: QUERY_fam.png beside the query]")
@click.option("--json", "as_json", is_flag=True, help="Print scores, layer, encoder and map statistics as JSON.")
@click.option(
    "--encoder", default="bundled", show_default=True, help="bundled, torchvision:NAME or module.path:factory."
)
@click.option("--weights", type=Path, help="State dict of the encoder, as torch.save writes it.")
@click.option("--layer", help="Dotted name.  [default: the last module that returns a map]")
@click.option("--similarity", type=click.Choice(["cosine", "dot", "euclidean"]), default="cosine", show_default=True)
@click.option("--contrast", help='Why each reference rather than another: its number, from 1, or "rest" for the mean.')
@click.option(
    "--size", type=click.IntRange(min=1), help="Side in pixels that images are resized to.  [default: the encoder's]"
)
@click.option("--device", default="cpu", show_default=True, help="A torch device, such as cuda.")
@click.option("--mean", type=float, nargs=3, help="Mean of the RGB channels in [0, 1].  [default: the encoder's]")
@click.option("--std", type=float, nargs=3, help="Standard deviation of the RGB channels.  [default: the encoder's]")
def explain(
    query: Path,
    references: Sequence[Path],
    output: Path | None,
    as_json: bool,
    encoder: str,
    weights: Path | None,
    layer: str | None,
    similarity: str,
    contrast: str | None,
    size: int | None,
    device: str,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> None:
    """
    Explain the similarity of the image QUERY to each REFERENCE.

    Writes one figure: the query's map for each reference, each reference's own map, and the
    scores.
    """
    output = output or query.with_name(f"{query.stem}_fam.png")
    _check_output(output)
    other = _contrast(contrast, len(references))
    if std is not None and min(std) <= 0:
        raise ValueError(f"--std must be positive, but got {' '.join(map(str, std))}")
    images = [read_image(path) for path in (query, *references)]
    loaded = load_encoder(encoder, weights)
    model = _to_device(loaded.model, device)
    size = size or loaded.size
    tensors = torch.stack([to_tensor(i, size, mean or loaded.mean, std or loaded.std) for i in images]).to(device)
    layer_name, module = find_layer(model, layer, tensors[:1])

    K = len(references)
    fam = FeatureActivationMap(model, module, similarity=similarity)
    z, s = fam.embed(tensors[:1]), fam.embed(tensors[1:])
    scores = channel_contributions(z, s, similarity).sum(1).tolist()
    if isinstance(other, int):
        queries = tensors[:1].expand(K, -1, -1, -1)
        maps = fam.attribute(queries, list(range(K)), reference_embedding=s, contrast=other)
    else:
        maps = fam.attribute_all(tensors[:1], reference_embedding=s, contrast=other)
    reference_maps = fam.attribute(tensors[1:], reference_embedding=z)
    maps, reference_maps = _planes(maps, layer_name), _planes(reference_maps, layer_name)

    label = "FAM" if other is None else f"contrast to {'the rest' if other == 'rest' else f'reference {other + 1}'}"
    figure = explanation_figure(
        images[0],
        images[1:],
        maps,
        reference_maps,
        [f"{similarity} {score:.3f}" for score in scores],
        [f"{i + 1}: {path.name}" for i, path in enumerate(references)],
        label,
    )
    _write(figure, output)
    report = {
        "figure": str(output),
        "encoder": encoder,
        "layer": layer_name,
        "similarity": similarity,
        "contrast": contrast,
        "size": size,
        "query": str(query),
        "references": [
            {
                "number": i + 1,
                "path": str(path),
                "score": scores[i],
                "map": _statistics(maps[i]),
                "reference_map": _statistics(reference_maps[i]),
            }
            for i, path in enumerate(references)
        ],
    }
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    click.echo(
        f"encoder {encoder}, layer {layer_name} ({type(module).__name__}){'' if layer else ', the last with a map'}"
    )
    for i, path in enumerate(references):
        click.echo(f"{i + 1}  {similarity} {scores[i]: .4f}  {path}")
    click.echo(f"wrote {output}")


def main() -> None:
    """Runs the command; an error is one line on stderr and exit status 2."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            status = command.main(prog_name="captum-fam", standalone_mode=False) or 0
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            status = 2
        except click.Abort:
            click.echo("captum-fam: interrupted", err=True)
            status = 130
        except (click.ClickException, ValueError, TypeError, RuntimeError) as error:
            message = error.format_message() if isinstance(error, click.ClickException) else str(error)
            click.echo(f"captum-fam: {' '.join(message.split())}", err=True)
            status = 2
    for message in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
        click.echo(f"captum-fam: warning: {' '.join(message.split())}", err=True)
    sys.exit(status)


def _contrast(contrast: str | None, references: int) -> Any:
    """None, "rest", or the index of a reference given by its number from 1."""
    if contrast is None or (contrast == "rest" and references > 1):
        return contrast
    if references < 2:
        raise ValueError("--contrast needs at least two references: name another image")
    if not contrast.isdecimal() or not 1 <= int(contrast) <= references:
        raise ValueError(f'--contrast must be "rest" or a reference\'s number, 1 to {references}, but got {contrast}')
    return int(contrast) - 1


def _to_device(model: torch.nn.Module, device: str) -> torch.nn.Module:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"cannot use device {device}: {str(error).splitlines()[0]}") from error


def _planes(maps: object, layer: str) -> Tensor:
    """Maps (N, h, w) of single maps, however attributed."""
    if not isinstance(maps, Tensor) or maps.ndim != 4:
        raise ValueError(f"layer {layer} does not give one map (B, C, h, w): name another with --layer")
    return maps.flatten(0, 1).float().cpu()


def _statistics(values: Tensor) -> dict[str, Any]:
    return {
        "shape": list(values.shape),
        "min": values.min().item(),
        "max": values.max().item(),
        "mean": values.mean().item(),
    }


def _check_output(output: Path) -> None:
    if output.suffix.lower() != ".png":
        raise ValueError(f"cannot write {output}: name a file that ends in .png with -o")
    if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise ValueError(f"cannot write {output}: name a file in a folder that can be written to with -o")


def _write(figure: Figure, output: Path) -> None:
    """Writes the whole file or none."""
    content = BytesIO()
    figure.savefig(content, format="png", dpi=110)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        partial.write_bytes(content.getvalue())
        partial.replace(output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"cannot write {output}: {error.strerror}") from error
