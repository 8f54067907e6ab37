"""An encoder and its references as a K-way classifier, which every Captum method can explain."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_fam._checks import check_callable, check_labels, check_reference_embedding, describe, embeddings_in
from captum_fam._misfit import in_plain_words
from captum_fam.similarity import Similarity, channel_contributions, check_similarity, widen


class SimilarityScore(nn.Module):
    r"""
    How similar are inputs to K references? An encoder and reference embeddings as a K-way
    classifier, whose logits are similarity scores.

    Any Captum method can explain it, with the number of the reference as ``target``;
    :class:`~captum_fam.FeatureActivationMap` uses its encoder, references and similarity. Embed the
    references first: Captum's hooks keep only the last call of a layer, so a function that embeds
    query and reference would explain the reference.

    Args:
        encoder (Callable or torch.nn.Module): Maps inputs to embeddings (B, D).
        reference_embedding (Tensor): (K, D), floating point; kept, detached, as a buffer.
        similarity (str or Callable): As in :func:`~captum_fam.channel_contributions`.
                    Default: ``"cosine"``
        output_selector (Callable, optional): Takes the encoder's output (a dict, a
                    ``ModelOutput``, a tuple, ...) to the embeddings (B, D).
                    Default: None, the output is the embeddings

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> encoder = nn.Flatten()
        >>> score = SimilarityScore(encoder, torch.eye(4), "dot")
        >>> score(torch.ones(2, 1, 2, 2)).shape
        torch.Size([2, 4])
    """

    reference_embedding: Tensor

    def __init__(
        self,
        encoder: Callable[..., Any],
        reference_embedding: Tensor,
        similarity: Similarity = "cosine",
        output_selector: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        check_callable("encoder", encoder)
        check_reference_embedding(reference_embedding)
        check_similarity(similarity)
        if output_selector is not None:
            check_callable("output_selector", output_selector)
        self.encoder = encoder
        self.similarity = similarity
        self.output_selector = output_selector
        self.register_buffer("reference_embedding", reference_embedding.detach().clone())

    def forward(self, *inputs: Any) -> Tensor:
        r"""
        How similar is each input to each reference?

        Args:
            *inputs (Any): What the encoder takes.

        Returns:
            *Tensor*: scores (B, K), in the embeddings' dtype.
        """
        with in_plain_words(self.encoder, inputs):
            output = self.encoder(*inputs)
        z = select_embedding(output, self.output_selector)
        s = self.reference_embedding.to(z.device)
        return channel_contributions(widen(z)[:, None], widen(s), self.similarity).sum(-1).to(z.dtype)


def prototypes(embeddings: Tensor, labels: Tensor | Sequence[int]) -> Tensor:
    r"""
    Which embedding stands for each class? Its prototype, the mean embedding (Prototypical Networks,
    https://arxiv.org/abs/1703.05175, equation 1).

    Args:
        embeddings (Tensor): Support embeddings (N, D), floating point.
        labels (Tensor or sequence of int): N integer labels, any values.

    Returns:
        *Tensor*: prototypes (n_classes, D), in the sorted order of the labels and the embeddings'
        dtype, detached.

    Raises:
        TypeError: ``embeddings`` is no floating-point tensor, or the labels are no integers.
        ValueError: the shapes do not fit, or there is no embedding.

    Examples::

        >>> prototypes(torch.tensor([[1.0], [3.0], [7.0]]), [5, 5, 2])
        tensor([[7.],
                [2.]])
    """
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        raise TypeError(f"Expected `embeddings` to be a floating-point tensor (N, D), but got {describe(embeddings)}.")
    if embeddings.ndim != 2 or not len(embeddings):
        raise ValueError(
            "Expected `embeddings` (N, D) and one label for each, with N > 0, but got embeddings of shape"
            f" {tuple(embeddings.shape)}{'; embed images first' if embeddings.ndim > 2 else ''}."
        )
    label = check_labels("labels", labels, len(embeddings), "`embeddings`", embeddings.device)
    classes, index, count = torch.unique(label, sorted=True, return_inverse=True, return_counts=True)
    wide = widen(embeddings.detach())
    sums = wide.new_zeros(len(classes), wide.shape[1]).index_add_(0, index, wide)
    means: Tensor = sums / count[:, None]
    return means.to(embeddings.dtype)


def select_embedding(output: Any, output_selector: Callable[[Any], Tensor] | None) -> Tensor:
    """The embeddings (B, D) in an encoder's output, or an error that says how to select them."""
    if output_selector is None:
        z, origin = output, "the encoder"
    else:
        try:
            z, origin = output_selector(output), "`output_selector`"
        except (AttributeError, LookupError, TypeError) as error:
            got, advice = _of_output(output)
            raise TypeError(
                f"`output_selector` fails on what the encoder returns, {got}: {error!r}; {advice}."
            ) from error
    if _is_embedding(z):
        return z  # type: ignore[no-any-return]  # checked
    got, advice = _of_output(z)
    kind = ValueError if isinstance(z, Tensor) and z.is_floating_point() else TypeError
    raise kind(f"Expected {origin} to return floating-point embeddings (B, D), but got {got}; {advice}.")


def _is_embedding(z: object) -> bool:
    return isinstance(z, Tensor) and z.is_floating_point() and z.ndim == 2


def _of_output(z: Any) -> tuple[str, str]:
    """What an encoder has returned, and how to select the embeddings from it."""
    inside = embeddings_in(z)
    if isinstance(z, Tensor):
        advice = "return one row per input; if this is a loss or a score, pass the part of the encoder that embeds"
        if _is_embedding(z):
            advice = "these are embeddings (B, D), so leave it out"
        elif z.ndim == 3:
            advice = "select a token, output_selector=lambda z: z[:, 0], or their mean, z.mean(1)"
        elif z.ndim > 3:
            advice = "pool, output_selector=lambda z: z.mean((2, 3)), or flatten, z.flatten(1)"
        return describe(z), advice
    select = "pass output_selector=lambda output: output"
    if isinstance(z, Mapping):
        one = f"{inside[0]}, of" if len(inside) == 1 else "[key] with one of"
        return type(z).__name__, f"{select}{one} the keys {list(z)}"
    if isinstance(z, (tuple, list)):
        one = inside[0] if len(inside) == 1 else "[i]"
        return f"a {type(z).__name__} of {len(z)}", f"{select}{one}, or call model.eval() if it is longer in training"
    return describe(z), "pass an output_selector that returns the embeddings"
