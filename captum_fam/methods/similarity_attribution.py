"""What all methods that explain similarities share: where references come from, and the terms of a pair."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_fam._captum import TargetType
from captum_fam._checks import (
    check_callable,
    check_reference_embedding,
    check_rows_fit,
    check_same_form,
    format_inputs,
    reference_index,
)
from captum_fam._distances import canonical
from captum_fam.engine.chunks import Tensors, cut, cut_arguments, slices
from captum_fam.engine.question import Once, Question, References, less_of
from captum_fam.engine.untouched import embed, has_batch_statistics
from captum_fam.score import SimilarityScore
from captum_fam.similarity import Similarity, channel_contributions, check_similarity, widen

Inputs: TypeAlias = Tensor | Tensors
Selector: TypeAlias = Callable[[Any], Tensor] | None


class SimilarityAttribution(Attribution):
    """A method that explains the similarity of the inputs' embeddings to references."""

    _of_terms = True  # whether the input's own share can be subtracted ("self", threshold)

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *captum_args: Any,
        similarity: Similarity | None = None,
        output_selector: Selector = None,
    ) -> None:
        check_callable("forward_func", forward_func)
        if similarity is not None:
            check_similarity(similarity)
        if output_selector is not None:
            check_callable("output_selector", output_selector)
        super().__init__(forward_func, *captum_args)
        self.similarity = similarity
        self.output_selector = output_selector

    def embed(self, inputs: Inputs, additional_forward_args: object | None = None) -> Tensor:
        r"""
        Which embeddings does :meth:`attribute` compare?

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs of the encoder, batch first.
            additional_forward_args (Any, optional): As in :meth:`attribute`.
                        Default: None

        Returns:
            *Tensor*: embeddings (B, D), detached.

        Raises:
            TypeError, ValueError: the encoder does not return embeddings (B, D), and no ``output_selector`` makes them
                        of its output.
        """
        return embed(
            self._encoder(), "inputs", format_inputs("inputs", inputs), additional_forward_args, self._selector()
        )

    def attribute_future(self) -> None:
        r"""This method is not implemented."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def terms(self, z: Tensor, s: Tensor) -> Tensor:
        """The terms t(z, s) (..., D) that weights are made of; the map of a contrast is that of their difference."""
        return channel_contributions(z, s, self._similarity())

    def contributions(self, z: Tensor, t: Tensor) -> Tensor:
        """What terms t (..., D) contribute to their score."""
        return t

    def _references(self, inputs: Tensors, reference: Inputs | None, reference_embedding: Tensor | None) -> References:
        """The references, from the one argument or score that gives them."""
        score = self._score()
        given = {
            "reference": reference,
            "reference_embedding": reference_embedding,
            "the references of the SimilarityScore": score,
        }
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise ValueError(
                "Expected exactly one of `reference`, `reference_embedding` and the references of a SimilarityScore,"
                f" but got {' and '.join(named) or 'none; pass them by these names (the second argument is `target`)'}."
                + ("" if named else " To explain a classifier, pass SimilarityScore(model, torch.eye(n), 'dot').")
            )
        if reference is not None:
            tensors = format_inputs("reference", reference)
            check_same_form(tensors, inputs)
            return References(tensors, are_inputs=True)
        if score is not None:
            return References((score.reference_embedding,))
        check_reference_embedding(reference_embedding)
        return References((reference_embedding,))  # type: ignore[arg-type]  # checked

    def _embedded(
        self, references: References, inputs: Tensors, additional_forward_args: object | None, most: int | None
    ) -> Tensor:
        """The embeddings s (K, D) of the references; at most ``most`` go through the encoder at a time."""
        if not references.are_inputs:
            return references.tensors[0].detach()
        B, K = len(inputs[0]), len(references)
        check_rows_fit(additional_forward_args, B, K)
        parts = [
            embed(
                self._encoder(),
                "reference",
                cut(references.tensors, rows),
                cut_arguments(additional_forward_args, rows, B) if B == K else additional_forward_args,
                self._selector(),
            )
            for rows in slices(K, most)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _question(
        self,
        inputs: Tensors,
        additional_forward_args: object | None,
        most: int | None = None,
        *,
        target: TargetType = None,
        reference: Inputs | None = None,
        reference_embedding: Tensor | None = None,
        contrast: TargetType | str = None,
        threshold: float | None = None,
        every: bool = False,
    ) -> Question:
        """The question about one reference for each input, or about every reference."""
        B, references = len(inputs[0]), self._references(inputs, reference, reference_embedding)
        K = len(references)
        if every and not K:
            raise ValueError("Expected at least one reference, but got none; pass embeddings (K, D) with K > 0.")
        if not every:
            self._before_target(target, K, inputs, additional_forward_args)
        own = torch.arange(K)[None] if every else self._own(target, references, B)[:, None]
        less = self._less(contrast, threshold, K, B)
        s = self._embedded(references, inputs, additional_forward_args, most)
        return Question(s, own.to(s.device), less.to(s.device) if isinstance(less, Tensor) else less)

    def _before_target(self, target: Any, references: int, inputs: Tensors, additional_forward_args: Any) -> None:
        """If a needed target is missing, runs the encoder first: its own errors come before that one."""
        B = len(inputs[0])
        if target is None and B and references not in (1, B):
            rows = slice(0, B if has_batch_statistics(self._encoder()) else 1)
            self._run(cut(inputs, rows), cut_arguments(additional_forward_args, rows, B))

    def _run(self, inputs: Tensors, additional_forward_args: Any) -> None:
        """Runs for inputs what the method would run, to raise its errors."""
        self.embed(inputs, additional_forward_args)

    def _own(self, target: TargetType, references: References, inputs: int) -> Tensor:
        """The number of the reference that each input takes, (B,)."""
        return reference_index("target", target, len(references), inputs)

    def _less(self, contrast: Any, threshold: Any, references: int, inputs: int) -> Any:
        """What is subtracted from the scores, as in Question."""
        self.check_own_share(contrast, threshold)
        return less_of(contrast, threshold, self._similarity(), references, inputs)

    def check_own_share(self, contrast: Any, threshold: Any) -> None:
        """Raises an error for contrast="self" or a threshold where the method cannot subtract the input's own share."""
        if not self._of_terms and (threshold is not None or (isinstance(contrast, str) and contrast == "self")):
            raise ValueError(
                f"{type(self).__name__} has no {'contrast=' + repr(contrast) if threshold is None else 'threshold'};"
                " FeatureActivationMap and SimilarityDecomposition have it."
            )

    def _embed_changed(
        self,
        changed: Tensor,
        rows: Tensor,
        inputs: int,
        additional_forward_args: Any,
        warned: list[str] | None = None,
    ) -> Tensor:
        """Embeddings (N, D) of changed inputs (N, ...), each made from the input of its row; ``warned``: see embed."""
        args = cut_arguments(additional_forward_args, rows, inputs)
        return widen(embed(self._encoder(), "inputs", (changed,), args, self._selector(), warned))

    def _scores(
        self,
        z: Tensor,
        rows: Tensor,
        question: Question,
        warnings: list[str],
        once: Once = lambda _, compute: compute(),
    ) -> Tensor:
        """Scores (N, P) of the embeddings z (N, D) of changed inputs; ``once`` as in Question."""
        scores = question.of(rows).scores(z, self, once)
        if scores.isfinite().all():
            return scores
        warnings.append("Scores of masked inputs are not finite; they count as zero.")
        return torch.where(scores.isfinite(), scores, torch.zeros_like(scores))

    def _score(self) -> SimilarityScore | None:
        func = uncompiled(self.forward_func)
        if getattr(func, "__name__", "") in ("forward", "_wrapped_call_impl"):  # score.forward, score.__call__
            func = getattr(func, "__self__", func)
        module = func.module if isinstance(func, nn.DataParallel) else func
        return module if isinstance(module, SimilarityScore) else None

    def _encoder(self) -> Callable[..., Any]:
        score, func = self._score(), uncompiled(self.forward_func)
        if score is None:
            encoder = func
        elif isinstance(func, nn.DataParallel) and func.device_ids:
            encoder = nn.DataParallel(func.module.encoder, func.device_ids, func.output_device, func.dim)
        else:
            encoder = uncompiled(score.encoder)
        return encoder  # type: ignore[no-any-return]  # what the user gave

    def _similarity(self) -> Similarity:
        score = self._score()
        given = score.similarity if score is not None and self.similarity is None else self.similarity
        return "cosine" if given is None else canonical(given)

    def _selector(self) -> Selector:
        if self.output_selector is not None:
            return self.output_selector
        score = self._score()
        return None if score is None else score.output_selector


def uncompiled(func: Any) -> Any:
    """The module behind torch.compile, whose compiled code ignores hooks that are set after its first call."""
    return getattr(func, "_orig_mod", func)
