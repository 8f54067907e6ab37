"""``captum-fam explore``: a page on which one points at a place and sees its match."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from captum_fam.cli._common import encoder_options, loaded, say, short
from captum_fam.demo import photographs
from captum_fam.explorer import explore_pair
from captum_fam.explorer._computed import BASELINE, STEPS
from captum_fam.images import check_output, read_image
from captum_fam.methods.similarity_decomposition import SimilarityDecomposition
from captum_fam.similarity import channel_contributions, widen


@click.command()
@click.argument("query", type=Path)
@click.argument("references", type=Path, nargs=-1, required=True, metavar="REFERENCE...")
@click.option("-o", "--output", type=Path, help="HTML to write.  [default: QUERY_explore.html beside the query]")
@click.option(
    "--control",
    type=Path,
    help="An image that has nothing to do with the query.  [default: the least similar of the package's photographs]",
)
@encoder_options
def explore(
    query: Path,
    references: Sequence[Path],
    output: Path | None,
    control: Path | None,
    encoder: str,
    layer: str | None,
    similarity: str,
    **loading: Any,
) -> None:
    """
    Make a page to explore which places of the image QUERY match those of each REFERENCE.

    The page is one file, which any browser opens without a network. Transformers take a minute or more on a CPU.
    """
    paths = [query, *references, *([] if control is None else [control])]
    images, names = [read_image(path) for path in paths], [short(path) for path in paths]
    output = output or query.with_name(f"{query.stem}_explore.html")
    check_output(output, ".html", paths)
    if control is None:
        offered = photographs()
        images, names = [*images, *offered.values()], [*names, *offered]

    with loaded(images, encoder, layer=layer, **loading) as ready:
        z, s = widen(ready.embeddings[:1]), widen(ready.embeddings[1:])
        scores = channel_contributions(z, s, similarity).sum(1).tolist()
        K = len(references)
        chosen = K + min(range(len(scores) - K), key=scores[K:].__getitem__)  # of several, the least similar
        kept = [0, *range(1, K + 1), chosen + 1]
        page = explore_pair(
            ready.tensors[:1],
            ready.tensors[1 : K + 1],
            SimilarityDecomposition(ready.model, ready.layer, similarity=similarity, n_steps=STEPS, baseline=BASELINE),
            control=ready.tensors[chosen + 1 : chosen + 2],
            photos=[images[k] for k in kept],
            titles=[names[k] for k in kept],
        )
    page.save(output)
    found = "" if layer else ", the last with a map"
    say(f"encoder {encoder}, layer {ready.layer_name} ({type(ready.layer).__name__}){found}")
    for i, path in enumerate(references):
        say(f"{i + 1}  {similarity} {scores[i]: .4f}  {path}")
    say(f"control  {similarity} {scores[chosen]: .4f}  {names[chosen + 1]}")
    say(f"wrote {output}")
