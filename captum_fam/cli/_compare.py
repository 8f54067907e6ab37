"""``captum-fam compare``: attribution methods side by side."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from captum_fam.cli._common import encoder_options, loaded, say, short
from captum_fam.comparison import DEFAULT, compare_attributions
from captum_fam.images import FIGURES, check_output, read_image, write_figure
from captum_fam.methods.integrated_decomposition import IntegratedDecomposition
from captum_fam.score import SimilarityScore
from captum_fam.visualization import visualize_comparison


@click.command()
@click.argument("query", type=Path)
@click.argument("reference", type=Path)
@click.option(
    "-o", "--output", type=Path, help="PNG, PDF or SVG to write.  [default: QUERY_compare.png beside the query]"
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    help=f"A class of captum_fam or captum.attr, any number of times.  [default: {', '.join(DEFAULT)}]",
)
@encoder_options
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
    check_output(output, FIGURES, (query, reference))
    with loaded(images, encoder, layer=layer, **loading) as ready:
        score = SimilarityScore(ready.model, ready.embeddings, similarity)
        value = score(ready.tensors[:1])[0, 1].item()
        maps = compare_attributions(
            score,
            ready.layer,
            ready.tensors,
            [1, 0],
            methods or None,
            reference=ready.tensors,
            show_progress=sys.stderr.isatty(),
        )
        integrated = IntegratedDecomposition.__name__
        own = IntegratedDecomposition(score).layer_of(ready.tensors) if integrated in maps else ""
    titles = [f"query: {short(query)}\n{similarity} {value:.3f}", f"reference: {short(reference)}"]
    figure, _ = visualize_comparison(images, maps, titles=titles, use_pyplot=False)
    write_figure(figure, output)
    found = "" if layer else ", the last with a map"
    say(f"encoder {encoder}, layer {ready.layer_name} ({type(ready.layer).__name__}){found}")
    if own:
        say(f"{integrated}: layer {own}, which it found")
    say(f"{similarity} {value: .4f}  {', '.join(maps)}")
    say(f"wrote {output}")
