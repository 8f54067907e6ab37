"""Pictures of a query of tokens, and of where they are found in a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from captum_fam.matches import draw_boxes
from captum_fam.visualization import draw_maps, new_figure, show

_COLUMNS = 5  # of maps of tokens
_WIDE = 3  # columns that the page and its map take together
_LINE, _TEXT = 32, 18  # pixels: the height of a token in the picture of a query, and of its letters
_BOX = "gold"


def maxsim_figure(
    image: Image.Image,
    whole: Tensor,
    similarities: Tensor,
    matches: Tensor,
    caption: str,
    titles: Sequence[str],
    captions: Sequence[str],
    explained: str,
    use_pyplot: bool,
) -> tuple[Figure, NDArray[Any]]:
    """
    Draws a page with the map (h, w) of what is explained, and beside it the similarities (T, h, w)
    of tokens, with boxes around their matches.
    """
    T, columns = len(titles), min(len(titles), _COLUMNS)
    rows = -(-T // columns)
    figure = new_figure(_WIDE + columns, rows, use_pyplot)
    sides: Any = figure.subfigures(1, 2, width_ratios=[_WIDE, columns])
    left, right = sides
    grid = right.subplots(rows, columns, squeeze=False).flatten()
    for axis in grid[T:]:
        axis.axis("off")
    axes = np.concatenate([left.subplots(1, 2), grid[:T]])
    show(axes[0], image, "page")
    draw_maps(left, axes[1:2], [image], [whole], [caption], f"adds to the {explained}")
    draw_maps(right, axes[2:], [image] * T, list(similarities), captions, "similarity")
    for axis, title, shares in zip(axes[1:], [f"the {explained}", *titles], [matches.sum(0), *matches]):
        axis.set_title(title, fontsize="medium", parse_math=False)
        places = shares.flatten().nonzero().flatten().tolist()
        draw_boxes(axis, axis.images[0].get_array().shape[:2], shares.shape, places, [_BOX] * len(places))
    return figure, axes


def as_words(tokens: Sequence[str] | None, count: int) -> list[str]:
    """Each token as a word in one line."""
    if tokens is None:
        return [f"token {t + 1}" for t in range(count)]
    if isinstance(tokens, str) or len(tokens) != count:
        raise ValueError(
            f"Expected `tokens` to be a list of {count}, one for each row of the query, but got {tokens!r}; those that"
            " are masked are not drawn."
        )
    return ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(token)) for token in tokens]


def written(words: Sequence[str]) -> Image.Image:
    """Words one below another, in lines of one height."""
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), _TEXT)
    width = max(2 * _LINE, _LINE + round(max(font.getlength(word) for word in words)))
    image = Image.new("RGB", (width, _LINE * len(words)), "white")
    draw = ImageDraw.Draw(image)
    for line, word in enumerate(words):
        draw.text((_LINE / 2, _LINE * (line + 0.5)), word, "black", font, anchor="lm")
    return image


def check_upright(name: str, places: Tensor, shown: Sequence[Image.Image]) -> None:
    """Raises an error if a grid (h, w) does not fit its picture, but (w, h) would."""

    def fits(h: int, w: int, shape: float) -> bool:
        return max(abs(h - w * shape), abs(w - h / shape)) < 1

    h, w = places.shape
    for image in shown:
        shape = image.height / image.width
        if fits(w, h, shape) and not fits(h, w, shape):
            raise ValueError(
                f"Expected `{name}` to be rows and columns, but {h} x {w} lies across an image of {image.height} x"
                f" {image.width} pixels, which {w} x {h} fits; pass {name}[::-1], or, if the encoder was given the"
                " image in another form, the image in that form."
            )
