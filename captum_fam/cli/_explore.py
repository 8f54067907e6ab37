"""``captum-fam explore``: a page where the user points at a place to see its match."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from captum_fam.cli._common import Loaded, loaded, read_references
from captum_fam.cli._say import say, short
from captum_fam.demo import photographs
from captum_fam.explorer import PairExplorer, explore_pair
from captum_fam.explorer._computed import BASELINE, STEPS
from captum_fam.images import check_output, read_image
from captum_fam.methods.similarity_decomposition import SimilarityDecomposition
from captum_fam.similarity import channel_contributions, widen


def explore(
    query: Path,
    references: Sequence[Path],
    output: Path | None,
    control: Path | None,
    encoder: str,
    layer: str | None,
    similarity: str,
    **loading: Any,
) -> int:
    paths = [query, *references, *([] if control is None else [control])]
    output = output or query.with_name(f"{query.stem}_explore.html")
    check_output(output, ".html", paths)
    image = read_image(query)
    beside, beside_names = controls(control)
    given = read_references(references)
    kept = [reference for reference in given if reference.image is not None]
    images = [image, *(reference.image for reference in kept if reference.image is not None), *beside]
    names = [short(query), *(short(Path(reference.name)) for reference in kept), *beside_names]

    with loaded(images, encoder, layer=layer, **loading) as ready:
        page, scores, chosen = page_of(ready, images, names, len(kept), similarity)
    page.save(output)
    found = "" if layer else ", the last with a map"
    say(f"encoder {encoder}, layer {ready.layer_name} ({type(ready.layer).__name__}){found}")
    for reference, score in zip(kept, scores):
        say(f"{reference.number}  {similarity} {score: .4f}  {reference.name}")
    say(f"control  {similarity} {scores[chosen]: .4f}  {names[chosen + 1]}")
    say(f"wrote {output}")
    return int(len(kept) < len(given))


def controls(control: Path | None) -> tuple[list[Image.Image], list[str]]:
    """Images to choose a control from, and their names: the user's image, or those of the package."""
    if control is not None:
        return [read_image(control)], [short(control)]
    offered = photographs()
    return [*offered.values()], [*offered]


def page_of(
    ready: Loaded, images: Sequence[Image.Image], names: Sequence[str], K: int, similarity: str
) -> tuple[PairExplorer, list[float], int]:
    """
    The page of a query, K references and images to choose a control from; their scores; and which
    is the control: the least similar of these images.
    """
    z, s = widen(ready.embeddings[:1]), widen(ready.embeddings[1:])
    scores = channel_contributions(z, s, similarity).sum(1).tolist()
    chosen = K + min(range(len(scores) - K), key=scores[K:].__getitem__)
    kept = [*range(K + 1), chosen + 1]
    page = explore_pair(
        ready.tensors[:1],
        ready.tensors[1 : K + 1],
        SimilarityDecomposition(ready.model, ready.layer, similarity=similarity, n_steps=STEPS, baseline=BASELINE),
        control=ready.tensors[chosen + 1 : chosen + 2],
        photos=[images[k] for k in kept],
        titles=[names[k] for k in kept],
    )
    return page, scores, chosen
