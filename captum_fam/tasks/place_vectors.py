"""A vector for each place of an image: products of two images' vectors are the matrix of their places."""

import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_fam._checks import describe, format_inputs, warn_once
from captum_fam.engine.correspondence import Call, known
from captum_fam.engine.question import Pairs, Question
from captum_fam.engine.report import SIDES, Report
from captum_fam.engine.untouched import eagerly
from captum_fam.engine.ways import Way, by_the_cheapest_way
from captum_fam.methods.correspondence_map import CorrespondenceMap
from captum_fam.methods.dimension_attribution import check_sum
from captum_fam.methods.similarity_attribution import Inputs
from captum_fam.methods.similarity_decomposition import SimilarityDecomposition
from captum_fam.tasks._stored import write_array

PlaceMethod = CorrespondenceMap | SimilarityDecomposition


def place_vectors(method: PlaceMethod, inputs: Inputs) -> Tensor:
    r"""
    How do I store places, so that a matrix of two images takes one product? Makes a vector for each place of each
    input. The products of two inputs' vectors are the method's ``attribute_matrix`` of the two:

    .. math:: P_{ij} = v_i \cdot v'_j

    With a :class:`~captum_fam.CorrespondenceMap`, the vector is the unit vector of the layer's activations, of C
    channels. With a :class:`~captum_fam.SimilarityDecomposition`, it is the place's part of the embedding (for the
    cosine, of the unit embedding), of D dimensions. :func:`~captum_fam.store_places` writes the vectors of many images
    to a file.

    Args:
        method (CorrespondenceMap or SimilarityDecomposition): A method with one layer that gives one tensor. Its
                    ``background`` is not subtracted.
        inputs (Tensor or tuple[Tensor, ...]): B inputs of the encoder.

    Returns:
        *Tensor*: (B, \*spatial, C), or (B, \*spatial, D), at least float32. The vectors of an input whose activations,
        or embedding, are not finite are zero, with a warning.

    Raises:
        TypeError, ValueError, RuntimeError: As in ``attribute_matrix`` of the method.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> decomposition = SimilarityDecomposition(encoder, encoder[1])
        >>> a, b = torch.rand(1, 3, 9, 9), torch.rand(1, 3, 9, 9)
        >>> v, w = place_vectors(decomposition, a), place_vectors(decomposition, b)
        >>> v.shape
        torch.Size([1, 7, 7, 8])
        >>> torch.allclose(v.flatten(1, 2) @ w.flatten(1, 2).mT, decomposition.attribute_matrix(a, b), atol=1e-6)
        True
    """
    vectors, texts = _of(method, format_inputs("inputs", inputs), 0)
    warn_once(texts)
    return vectors


def store_places(
    file: str | os.PathLike[str],
    images: Tensor | Iterable[Any],
    method: PlaceMethod,
    *,
    dtype: torch.dtype = torch.float16,
) -> Any:
    r"""
    How do I store the places of many images to match them later? Writes their vectors to a file, batch by batch, for
    :func:`~captum_fam.match_places`.

    float16 keeps 11 bits of a value down to 6e-5, and steps of 6e-8 below. That is enough for the unit vectors of a
    :class:`~captum_fam.CorrespondenceMap`. The values of a :class:`~captum_fam.SimilarityDecomposition` are about
    :math:`1 / (N \sqrt{D})` for N places: for large grids, pass float32.

    Args:
        file (str or Path): File to write; its name ends in .npy. It appears when it is complete.
        images (Tensor or iterable): A batch of inputs of the encoder; or an iterable of batches, or of tuples that
                    begin with one, such as a DataLoader.
        method (CorrespondenceMap or SimilarityDecomposition): As in :func:`~captum_fam.place_vectors`.
        dtype (torch.dtype): ``torch.float16`` or ``torch.float32``.
                    Default: ``torch.float16``

    Returns:
        *numpy.memmap*: the array (G, \*spatial, C), as ``numpy.load(file, mmap_mode="r")`` gives it.

    Raises:
        TypeError, ValueError: an argument is not as described above, images have different numbers of places, or there
                    are none.
        RuntimeError: As in :func:`~captum_fam.place_vectors`.

    Examples::

        >>> import tempfile
        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> folder, batches = tempfile.TemporaryDirectory(), (torch.rand(4, 3, 9, 9) for _ in range(3))
        >>> stored = store_places(f"{folder.name}/shoes.npy", batches, CorrespondenceMap(encoder, encoder[1]))
        >>> stored.shape, stored.dtype
        ((12, 7, 7, 8), dtype('float16'))
    """
    path = Path(file)
    if path.suffix.lower() != ".npy":
        raise ValueError(f"Expected `file` to end in .npy, but got {str(path)!r}.")
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"Expected `dtype` to be torch.float16 or torch.float32, but got {dtype}.")
    texts: list[str] = []
    write_array(path, _batches(images, method, dtype, texts))
    warn_once(texts)
    return np.load(path, mmap_mode="r")


def _batches(
    images: Tensor | Iterable[Any], method: PlaceMethod, dtype: torch.dtype, texts: list[str]
) -> Iterator[Tensor]:
    """Yields the vectors of each batch, on the CPU; warnings about them are added to the texts."""
    done, shape = 0, None
    for batch in (images,) if isinstance(images, Tensor) else images:
        (inputs,) = format_inputs("images", batch[0] if isinstance(batch, (tuple, list)) else batch)
        vectors, found = _of(method, (inputs,), done)
        if shape not in (None, vectors.shape[1:]):
            raise ValueError(
                f"Expected `images` with equally many places, but got {tuple(shape)} and {tuple(vectors.shape[1:])};"
                " resize them to one size."
            )
        shape, done = vectors.shape[1:], done + len(vectors)
        texts += [text for text in found if text not in texts]
        vectors = vectors.to("cpu", dtype).contiguous()
        if not vectors.isfinite().all():
            raise ValueError("The vectors of places are too large for float16; pass dtype=torch.float32.")
        yield vectors
    if not done:
        raise ValueError("Expected `images` to hold a batch of images, but it is empty.")


@eagerly
def _of(method: PlaceMethod, inputs: tuple[Tensor, ...], first: int) -> tuple[Tensor, list[str]]:
    """Vectors (B, *spatial, C), and warnings about the inputs; ``first`` is the number of the first of them."""
    if isinstance(method, CorrespondenceMap):
        vectors, shape, texts = _of_activations(method, inputs, first)
    elif isinstance(method, SimilarityDecomposition):
        vectors, shape, texts = _of_embedding(method, inputs, first)
    else:
        raise TypeError(
            "Expected `method` to be a CorrespondenceMap or a SimilarityDecomposition, whose attribute_matrix is a"
            f" product of places, but got {describe(method)}."
        )
    return vectors.reshape(len(vectors), *shape, vectors.shape[2]), texts


def _of_activations(
    method: CorrespondenceMap, inputs: tuple[Tensor, ...], first: int
) -> tuple[Tensor, torch.Size, list[str]]:
    call = Call(len(inputs[0]))
    ((_, places),) = method._stream(inputs, call, SIDES[0], len(inputs[0]) or 1)
    _check_one(places.sizes)
    call.unusable = {side: {first + number for number in rows} for side, rows in call.unusable.items()}
    return known(places.units[0], (1, 2)), places.shapes[0], call.warnings()


def _of_embedding(
    method: SimilarityDecomposition, inputs: tuple[Tensor, ...], first: int
) -> tuple[Tensor, torch.Size, list[str]]:
    if method._similarity() not in ("cosine", "dot"):
        raise ValueError(
            'place_vectors needs a similarity that is a sum over pairs of places, "cosine" or "dot", but got'
            f" {'`dimension_weights`' if method.dimension_weights is not None else describe(method._similarity())}."
        )

    def found(layers: list[nn.Module], way: Way) -> tuple[Tensor, torch.Size, list[str]]:
        report = Report()
        path = method._paths(None, False)[0]
        with method._record(inputs, None, report, way=way, path=path, layers=layers) as recording, torch.no_grad():
            _check_one(recording.sizes)
            own = torch.arange(len(recording.embedding), device=recording.embedding.device)[:, None]
            pairs = Pairs(recording, Question(recording.embedding, own), 1, method)  # of each input with itself
            if not pairs.valid.all():
                report.note_unusable(SIDES[0], ~pairs.valid[:, 0], first)
            (v,) = method._place_embeddings(recording)
            if method.n_steps is None:
                z = method._of_unit(recording, pairs.z)
                check_sum((v.sum(2) * z).sum(1, keepdim=True), pairs, recording.names[0], recording.partial[0])
            return v.mT.masked_fill(~pairs.valid[..., None], 0), recording.activations[0].shape[2:], report.texts()

    return by_the_cheapest_way(partial(found, method._layers(inputs, None)))


def _check_one(sizes: list[int]) -> None:
    """Raises an error if there are several layers, or one that gave several tensors."""
    if sizes != [1]:
        raise ValueError(f"place_vectors needs one layer with one tensor, but `method` has {sum(sizes)} of them.")
