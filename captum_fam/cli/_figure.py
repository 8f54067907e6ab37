"""The figure of ``captum-fam explain``."""

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from captum_fam._files import printable
from captum_fam.cli._rows import Maps, Row
from captum_fam.visualization import draw_maps, new_figure, show

_ACROSS, _LINES = 20, 9  # characters and lines of a sentence that is drawn in place of a picture
_WIDTH = 26  # characters of a caption that fit below a picture


def explanation_figure(
    query: Image.Image,
    references: Sequence[Image.Image | str],
    rows: Sequence[Row],
    captions: Sequence[Sequence[str]],
    reference_captions: Sequence[str],
) -> Figure:
    """
    Draws the query and its maps: a row for each method, with captions, and a column for each
    reference. Below are the references with their own maps, and sentences instead of pictures.
    A single reference with maps of its own stands below the query, and each method is a column.
    """
    there = [row for row in rows if any(M is not None for M in row.there)]
    one_scale = all(row.label == row.there_label for row in there)
    if there and one_scale and len(references) == 1 and isinstance(references[0], Image.Image):
        return _pair_figure((query, references[0]), rows, captions, reference_captions[0])
    sentences = [isinstance(reference, str) for reference in references]
    below = len(there) or any(sentences)
    figure = new_figure(len(references) + 1, len(rows) + below, use_pyplot=False)
    axes = figure.subplots(len(rows) + below, len(references) + 1, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    axes[0, 0].axis("on")
    show(axes[0, 0], query, "query")
    for line, row, words in zip(axes, rows, captions):
        _draw(figure, line[1:], [query] * len(references), row.here, words, row.label)
    for axis, reference, caption in zip(axes[len(rows) :][:1, 1:].flat, references, reference_captions):
        if isinstance(reference, str):
            _write(axis, reference, caption)
    for line, row in zip(axes[len(rows) :], there):
        _draw(figure, line[1:], references, row.there, reference_captions, row.there_label)
    return figure


def _pair_figure(
    images: Sequence[Image.Image], rows: Sequence[Row], captions: Sequence[Sequence[str]], reference_caption: str
) -> Figure:
    figure = new_figure(len(rows) + 1, 2, use_pyplot=False)
    axes = figure.subplots(2, len(rows) + 1, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes[:, 0], images, ("query", "\n".join(textwrap.wrap(reference_caption, _WIDTH)))):
        axis.axis("on")
        show(axis, image, caption)
    for column, row, (caption, *_) in zip(axes.T[1:], rows, captions):
        sides = [n for n, maps in enumerate((row.here, row.there)) if any(M is not None for M in maps)]
        maps = [(row.here, row.there)[n][0] for n in sides]
        _draw(figure, column[sides], [images[n] for n in sides], maps, [(caption, "")[n] for n in sides], row.label)
    return figure


def _draw(
    figure: Figure,
    axes: Sequence[Axes],
    images: Sequence[Image.Image | str],
    maps: Maps,
    captions: Sequence[str],
    label: str,
) -> None:
    """Draws the maps of a row, which may be fewer than its axes; the bar stands beside the whole row."""
    drawn = [M for M in maps if M is not None]
    pictures = [image for image in images[: len(drawn)] if not isinstance(image, str)]
    for axis in axes[: len(drawn)]:
        axis.axis("on")
    draw_maps(figure, axes, pictures, drawn, captions, label)


def _write(axis: Axes, sentence: str, caption: str) -> None:
    """Writes a sentence in the place of a picture."""
    lines = textwrap.wrap(f'"{printable(sentence)}"', _ACROSS)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], "\N{HORIZONTAL ELLIPSIS}"]
    axis.axis("on")
    axis.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", parse_math=False)
    axis.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axis.set_xlabel(caption, parse_math=False)
