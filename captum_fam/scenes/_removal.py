"""How much of a similarity goes with each object of a scene."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_fam._checks import check_callable, check_positive, check_rows, describe, warn_once
from captum_fam.engine.untouched import buffers_restored, warnings_of_training
from captum_fam.scenes._shared_objects import Scenes
from captum_fam.score import select_embedding
from captum_fam.similarity import Similarity, channel_contributions, check_similarity, widen


def removal_effects(
    encoder: Callable[[Tensor], Any],
    scenes: Scenes,
    similarity: Similarity = "cosine",
    *,
    output_selector: Callable[[Any], Tensor] | None = None,
    batch_size: int = 32,
) -> Tensor:
    r"""
    How much of the similarity of each pair is lost when one object of its image is removed?

    .. math:: e_j = \sum_k c_k(z, s) - \sum_k c_k(z_{-j}, s)

    with the embeddings z of the image, z\ :sub:`-j` of the image without object j, and s of the
    reference. If the similarity of an encoder comes from the shared object, column 0 has the
    largest effect. If it does not, no explanation can be blamed for missing that object. By chance,
    column 0 is the largest in 1 / n of the pairs. Effects of the size of rounding errors, as mean
    colours give, are ties: count an effect as the largest only if it leads by a margin.

    Args:
        encoder (Callable or torch.nn.Module): A function from images (B, 3, size, size) in [0, 1]
                    to embeddings (B, D); put a normalisation in front with ``nn.Sequential``.
        scenes (Scenes): The pairs.
        similarity (str or Callable): As in :func:`~captum_fam.channel_contributions`.
                    Default: ``"cosine"``
        output_selector (Callable, optional): Takes the encoder's output to the embeddings.
                    Default: None
        batch_size (int): Number of images in one call of the encoder.
                    Default: 32

    Returns:
        *Tensor*: effects (N, n), in the embeddings' dtype (float32 for half precision),
        detached; column j is object j + 1.

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> import numpy as np
        >>> from PIL import Image
        >>> from captum_fam.scenes import removal_effects, shared_object_scenes
        >>> noise = np.random.default_rng(0).integers(0, 256, (14, 24, 24, 3), dtype=np.uint8)
        >>> pictures, labels = [Image.fromarray(a) for a in noise], [i // 2 for i in range(14)]
        >>> scenes = shared_object_scenes(pictures, labels, n_pairs=2, size=64)
        >>> mean_colour = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> effects = removal_effects(mean_colour, scenes)
        >>> effects.shape, bool((effects.abs() < 1e-4).all())
        (torch.Size([2, 4]), True)
        >>> used = effects[:, 0] > effects[:, 1:].amax(1) + 1e-6
        >>> scenes[used]  # what mean colours solve: nothing
        Scenes(images=(0, 3, 64, 64), n_objects=4)
    """
    check_callable("encoder", encoder)
    if not isinstance(scenes, Scenes):
        raise TypeError(f"Expected `scenes` to be Scenes of shared_object_scenes, but got {describe(scenes)}.")
    check_similarity(similarity)
    check_positive("batch_size", batch_size)

    def embed(images: Tensor) -> Tensor:
        parts = [
            check_rows("scenes", (x,), select_embedding(encoder(x), output_selector)) for x in images.split(batch_size)
        ]
        return widen(torch.cat(parts))

    with torch.no_grad(), buffers_restored(encoder) as guard:
        s = embed(scenes.references)
        images = (scenes.images, *(scenes.without(j + 1) for j in range(scenes.labels.shape[1])))
        scores = [channel_contributions(embed(x), s, similarity).sum(-1) for x in images]
    warn_once(warnings_of_training(encoder, guard.called))
    return torch.stack([scores[0] - score for score in scores[1:]], 1)
