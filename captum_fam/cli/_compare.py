"""``captum-fam compare``: attribution methods side by side."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captum_fam.cli._common import loaded
from captum_fam.cli._say import say, short
from captum_fam.comparison import compare_attributions
from captum_fam.images import FIGURES, check_output, read_image, write_figure
from captum_fam.methods.integrated_decomposition import IntegratedDecomposition
from captum_fam.score import SimilarityScore
from captum_fam.visualization import visualize_comparison


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
