"""What the attribution methods share: the rules of references, one recorded pass, and results in Captum's forms."""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from captum.attr import Attribution, LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_fam import _method, _recording
from captum_fam._captum import TargetType
from captum_fam._checks import (
    check_callable,
    check_dimensions,
    check_reference_embedding,
    check_rows_fit,
    check_same_form,
    describe,
    format_inputs,
    reference_index,
    warn_once,
)
from captum_fam._distances import canonical
from captum_fam._layers import last_map
from captum_fam._recording import Recording, Tensors
from captum_fam.score import SimilarityScore
from captum_fam.similarity import Similarity, check_similarity, widen

Inputs: TypeAlias = Tensor | Tensors
Maps: TypeAlias = Tensor | Tensors | list[Tensor | Tensors]
Other: TypeAlias = Tensor | Literal["rest"] | None
Selector: TypeAlias = Callable[[Any], Tensor] | None


@dataclass(frozen=True)
class References:
    """K references, as embeddings (K, D) or as inputs of the encoder, and the similarity to them."""

    tensors: Tensors
    are_inputs: bool
    similarity: Similarity
    are_classes: bool = False

    def __len__(self) -> int:
        return len(self.tensors[0])


@dataclass(frozen=True)
class Question:
    """
    Which similarities are explained.

    Attributes:
        s: embeddings (K, D) of the references.
        own: the numbers (B, P) of the references that each input is compared with.
        other: the references to contrast with, (B, 1), "rest" or none.
        similarity: as in channel_contributions.
    """

    s: Tensor
    own: Tensor
    other: Other
    similarity: Similarity

    def to(self, z: Tensor) -> "Question":
        """On the device of the embeddings z (B, D) and in their dtype."""
        check_dimensions(z, self.s)
        other = self.other.to(z.device) if isinstance(self.other, Tensor) else self.other
        return replace(self, s=self.s.to(z), own=self.own.to(z.device), other=other)

    def of(self, rows: Tensor) -> "Question":
        """The question about the inputs of these rows."""
        other = self.other[rows] if isinstance(self.other, Tensor) else self.other
        return replace(self, own=self.own[rows], other=other)

    def contributions(self, z: Tensor, similarity: Similarity | None = None) -> Tensor:
        """c (B, P, D) for embeddings z (B, D)."""
        return _method.contributions(z, self.s, self.own, self.other, similarity or self.similarity)


class Pairs:
    """
    A question about recorded inputs.

    Attributes:
        recording: of the inputs' forward pass.
        question: about them.
        z: embeddings (B, D) of the inputs.
        c: contributions (B, P, D).
    """

    def __init__(
        self, recording: Recording, question: Question, sides: tuple[str, str] = ("inputs", "references")
    ) -> None:
        self.recording = recording
        self.z = widen(recording.embedding)
        self.question = question.to(self.z)
        self.c = self.question.contributions(self.z)
        self._sides = sides

    def explainable(self) -> Tensor:
        """Which pairs (B, P) have a similarity that can be explained: their embeddings are finite and not zero."""
        s, own, other = self.question.s, self.question.own, self.question.other
        inputs = usable(self.z)
        references = torch.ones(len(s), dtype=torch.bool, device=s.device)
        used = own.unique() if other is None else slice(None)
        references[used] = usable(s[used])
        valid = inputs[:, None] & references[own] & self.c.abs().amax(2).isfinite()
        if isinstance(other, Tensor):
            valid &= references[other]
        if not valid.all():
            bad = [
                f"{side} {(~good).nonzero().flatten().tolist()}"
                for side, good in sorted(zip(self._sides, (inputs, references)))
                if not good.all()
            ]
            self.recording.doubts.append(unexplained(", ".join(bad) or "their contributions overflow"))
        return valid


class SimilarityAttribution(Attribution):
    """A method that explains the similarity of the inputs' embeddings to references."""

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
        The embeddings that :meth:`attribute` compares.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs of the encoder, batch first.
            additional_forward_args (Any, optional): As in :meth:`attribute`.
                        Default: None

        Returns:
            *Tensor*: embeddings (B, D), detached.

        Raises:
            TypeError, ValueError: the encoder does not return (B, D) and no ``output_selector``
                        takes its output there.
        """
        return _recording.embed(
            self._encoder(), "inputs", format_inputs("inputs", inputs), additional_forward_args, self._selector()
        )

    def attribute_future(self) -> None:
        r"""This method is not implemented."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def _references(
        self,
        inputs: Tensors,
        reference: Inputs | None,
        reference_embedding: Tensor | None,
        additional_forward_args: object | None,
    ) -> References:
        """The references from the one place that gives them."""
        score = self._score()
        given = [
            name
            for name, value in (
                ("reference", reference),
                ("reference_embedding", reference_embedding),
                ("the references of the SimilarityScore", score),
            )
            if value is not None
        ]
        if not given and self._explains_classifiers():
            classes = self.embed(inputs, additional_forward_args).shape[1]
            return References((self._classes(classes),), False, "dot", are_classes=True)
        if len(given) != 1:
            raise ValueError(
                "Expected exactly one of `reference`, `reference_embedding` and the references of a SimilarityScore,"
                f" but got {' and '.join(given) or 'none; pass them by these names'}."
            )
        similarity = self._similarity()
        if reference is not None:
            tensors = format_inputs("reference", reference)
            check_same_form(tensors, inputs)
            return References(tensors, True, similarity)
        if score is not None:
            return References((score.reference_embedding,), False, similarity)
        check_reference_embedding(reference_embedding)
        return References((reference_embedding,), False, similarity)  # type: ignore[arg-type]  # checked

    def _explains_classifiers(self) -> bool:
        """Whether references may be left out: the outputs are then an embedding, a class is one dimension of it."""
        return self.similarity is None

    def _embedded(self, references: References, inputs: Tensors, additional_forward_args: object | None) -> Tensor:
        """s (K, D)"""
        if not references.are_inputs:
            return references.tensors[0].detach()
        check_rows_fit(additional_forward_args, len(inputs[0]), len(references))
        return _recording.embed(
            self._encoder(), "reference", references.tensors, additional_forward_args, self._selector()
        )

    def _question(
        self,
        inputs: Tensors,
        target: TargetType,
        additional_forward_args: object | None,
        reference: Inputs | None,
        reference_embedding: Tensor | None,
        contrast: TargetType | str,
    ) -> Question:
        """The question about one reference for each input."""
        references = self._references(inputs, reference, reference_embedding, additional_forward_args)
        B, K = len(inputs[0]), len(references)
        own, other = self._own(target, references, B)[:, None], _other(contrast, K, B)
        s = self._embedded(references, inputs, additional_forward_args)
        return Question(s, own, other, references.similarity)

    def _scores(
        self,
        changed: Tensor,
        rows: Tensor,
        inputs: int,
        additional_forward_args: Any,
        question: Question,
        doubts: list[str],
    ) -> Tensor:
        """Scores (N, P) of changed inputs (N, ...), each made from the input of that row."""
        given = additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)
        args: Any = tuple(a[rows] if isinstance(a, Tensor) and a.ndim and len(a) == inputs else a for a in given)
        args = None if additional_forward_args is None else args
        z = _recording.embed(self._encoder(), "inputs", (changed,), args, self._selector())
        scores = question.to(widen(z)).of(rows).contributions(widen(z)).sum(2)
        if scores.isfinite().all():
            return scores
        doubts.append("Scores of masked inputs are not finite; they count as zero.")
        return torch.where(scores.isfinite(), scores, torch.zeros_like(scores))

    def _classes(self, classes: int) -> Tensor:
        """Embeddings (K, D) that stand for the classes of a classifier."""
        return torch.eye(classes)

    def _own(self, target: TargetType, references: References, inputs: int) -> Tensor:
        """The number of the reference that each input takes, (B,)."""
        if target is None and references.are_classes and len(references) > 1:
            raise ValueError(
                f"`target` is needed: a class, 0 to {len(references) - 1}, for all inputs, or a list of {inputs}."
                " (For the similarity to a reference, pass it as `reference` or in a SimilarityScore.)"
            )
        return reference_index("target", target, len(references), inputs)

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


class ChannelAttribution(SimilarityAttribution, LayerAttribution):
    r"""
    A method whose map is a weighted sum of a layer's activations,
    :math:`M = \sum_k \alpha_k A_k`: a method is its weights, :meth:`_channel_weights`.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None = None,
        *,
        similarity: Similarity | None = None,
        output_selector: Selector = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        _check_layer(layer)
        if reshape_transform is not None:
            check_callable("reshape_transform", reshape_transform)
        super().__init__(forward_func, layer, device_ids, similarity=similarity, output_selector=output_selector)
        self.reshape_transform = reshape_transform

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Inputs,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        *,
        reference: Inputs | None = None,
        reference_embedding: Tensor | None = None,
        contrast: TargetType | Literal["rest"] | str = None,
    ) -> Maps:
        r"""
        Explains each input's similarity to one reference.

        The references are exactly one of ``reference``, ``reference_embedding`` and those of
        a SimilarityScore. With ``target``, each input takes the reference that its target
        numbers. Without, one reference is shared by the batch, as many references as inputs
        are paired with them, and anything else is an error. (The methods that say that they
        explain classifiers too need no references then: ``target`` is a class.)

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs to explain, batch first.
            target (int, list, Tensor, optional): Number of the reference, in Captum's forms:
                        an int for all inputs, or a list or 1D tensor with one for each.
                        Default: None
            additional_forward_args (Any, optional): Further arguments of forward_func, as for
                        other Captum methods. They are also given to the forward pass of
                        ``reference``, which must then have as many rows as tensors among them.
                        Default: None
            attribute_to_layer_input (bool, optional): Explains the layer's input instead of
                        its output. In the jacobian case, the gradient is that through the
                        layer: other paths of the same tensor, around the layer, do not count.
                        Default: False
            relu_attributions (bool, optional): Drops the negative part of the maps.
                        Default: False
            attr_dim_summation (bool, optional): Whether to sum over the channels.
                        Default: True
            reference (Tensor or tuple[Tensor, ...], optional): K references in the form of
                        ``inputs``; embedded before any hook is set.
                        Default: None
            reference_embedding (Tensor, optional): K references as embeddings (K, D).
                        Default: None
            contrast (int, list, Tensor or str, optional): Number of the reference to contrast
                        with, in the forms of ``target``, or ``"rest"`` for the mean over all
                        the others. The weights are then signed, whatever ``normalize``. Default: None

        Where Captum repeats the inputs (NoiseTunnel, sensitivity_max), it expands ``target`` but
        not the references or ``contrast``: there, choose among the references with ``target``,
        and pass an int or ``"rest"`` as ``contrast``.

        Returns:
            *Tensor*, *tuple[Tensor, ...]* or *list* of **attributions**:
            - maps (B, 1, \*spatial), or (B, C, \*spatial) without the sum over channels, in the
              dtype of the layer's activations, detached; a tuple for a layer that gives several
              tensors, and a list of results for a list of layers.

        Raises:
            TypeError, ValueError: an argument is not as described above; the message names it.
            RuntimeError: the jacobian is needed under ``torch.inference_mode()``.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> support, labels = torch.rand(6, 3, 16, 16), [0, 0, 1, 1, 2, 2]
            >>> score = SimilarityScore(encoder, prototypes(encoder(support), labels), "euclidean")
            >>> fam = FeatureActivationMap(score, encoder[1])
            >>> fam.attribute(torch.rand(4, 3, 16, 16), target=2).shape
            torch.Size([4, 1, 14, 14])
        """
        inputs = format_inputs("inputs", inputs)
        question = self._question(inputs, target, additional_forward_args, reference, reference_embedding, contrast)
        with self._record(inputs, additional_forward_args, attribute_to_layer_input) as recording:
            maps = self._maps(Pairs(recording, question), relu_attributions, attr_dim_summation)
        return self._result(maps, recording.doubts)

    def attribute_all(
        self,
        inputs: Inputs,
        additional_forward_args: object | None = None,
        *,
        reference: Inputs | None = None,
        reference_embedding: Tensor | None = None,
        relu_attributions: bool = False,
        contrast: Literal["rest"] | str | None = None,
    ) -> Maps:
        r"""
        Explains each input's similarity to every reference, from one recorded forward pass of the inputs.

        Args:
            inputs, additional_forward_args, reference, reference_embedding, relu_attributions:
                        As in :meth:`attribute`.
            contrast (str, optional): ``"rest"`` contrasts each reference with the mean over
                        all the others.
                        Default: None

        Returns:
            *Tensor*, *tuple[Tensor, ...]* or *list*: maps (B, K, \*spatial), otherwise as
            :meth:`attribute`.

        Raises:
            TypeError, ValueError, RuntimeError: As in :meth:`attribute`.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> fam = FeatureActivationMap(encoder, encoder[1])
            >>> fam.attribute_all(torch.rand(2, 3, 16, 16), reference_embedding=torch.rand(100, 8)).shape
            torch.Size([2, 100, 14, 14])
        """
        inputs = format_inputs("inputs", inputs)
        references = self._references(inputs, reference, reference_embedding, additional_forward_args)
        B, K = len(inputs[0]), len(references)
        if not K:
            raise ValueError("Expected at least one reference, but got none.")
        if contrast not in (None, "rest"):
            raise ValueError(
                f'Expected `contrast` to be "rest" or None, but got {describe(contrast)}; `attribute` takes a number.'
            )
        own, other = torch.arange(K).expand(B, -1), _other(contrast, K, B)
        question = Question(
            self._embedded(references, inputs, additional_forward_args), own, other, references.similarity
        )
        with self._record(inputs, additional_forward_args) as recording:
            maps = self._maps(Pairs(recording, question), relu_attributions)
        return self._result(maps, recording.doubts)

    def attribute_pair(self, inputs: Inputs, reference: Inputs) -> tuple[Maps, Maps]:
        r"""
        Explains a similarity on both sides, with one forward pass of each.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): B inputs.
            reference (Tensor or tuple[Tensor, ...]): In the form of ``inputs``: B references,
                        paired with the inputs, or one that they share.

        Returns:
            *tuple*: maps of the inputs, and maps of the reference, each (B, 1, \*spatial),
            otherwise as :meth:`attribute`.

        Raises:
            TypeError, ValueError, RuntimeError: As in :meth:`attribute`.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> fam = FeatureActivationMap(encoder, encoder[1])
            >>> here, there = fam.attribute_pair(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 24, 24))
            >>> here.shape, there.shape
            (torch.Size([2, 1, 14, 14]), torch.Size([2, 1, 22, 22]))
        """
        inputs, reference = format_inputs("inputs", inputs), format_inputs("reference", reference)
        check_same_form(reference, inputs)
        B, K = len(inputs[0]), len(reference[0])
        own, similarity = pair_index(B, K), self._similarity()
        with self._record(inputs, None) as one, self._record(reference, None) as two:
            maps = self._maps(Pairs(one, Question(two.embedding, own, None, similarity)))
            # A shared reference has one map for each input: its P maps become B of one.
            back = Question(one.embedding, own if K == B else torch.arange(B)[None], None, similarity)
            reference_maps = [
                tuple(M if K == B else M.transpose(0, 1).contiguous() for M in layer)
                for layer in self._maps(Pairs(two, back, ("references", "inputs")))
            ]
        return self._result(maps, one.doubts + two.doubts), self._result(reference_maps, [])

    def _needs_graph(self) -> bool:
        """Whether the weights may need the gradient of the embedding with respect to the layer."""
        return False

    @abstractmethod
    def _channel_weights(self, pairs: Pairs, valid: Tensor) -> list[list[Tensor]]:
        """
        alpha (B, P, C) for each tensor of each layer. What it is for pairs that are not valid
        (B, P) does not matter.
        """

    def _weighted(self, pairs: Pairs, valid: Tensor, summed: bool) -> list[list[Tensor]]:
        """M (B, P, *spatial) for each tensor of each layer; not summed, for P = 1, its terms (B, C, *spatial)."""
        combine = _method.activation_maps if summed else _method.weighted_activations
        layers = zip(self._channel_weights(pairs, valid), pairs.recording.layers)
        return [[combine(alpha, A) for alpha, A in zip(*layer)] for layer in layers]

    def _maps(self, pairs: Pairs, relu: bool = False, summed: bool = True) -> list[Tensors]:
        """For each layer the maps, as _weighted, zero where they mean nothing, in the dtype of the activations."""
        maps: list[Tensors] = []
        with torch.no_grad():
            valid = self._valid(pairs)
            for found, layer in zip(self._weighted(pairs, valid, summed), pairs.recording.layers):
                shown = [valid.reshape(*valid.shape, *[1] * (M.ndim - 2)) for M in found]
                kept = [torch.where(v, F.relu(M) if relu else M, torch.zeros_like(M)) for v, M in zip(shown, found)]
                maps.append(tuple(M.to(A.dtype) for M, A in zip(kept, layer)))
        return maps

    def _valid(self, pairs: Pairs) -> Tensor:
        """Which maps (B, P) mean something; the others are zero."""
        return pairs.explainable()

    def _check_independent(self, recording: Recording, weights: list[list[Tensor]], w: Tensor, valid: Tensor) -> None:
        """
        Doubts, or an error with the layer to choose, where a layer's weights are all zero, though those w (B, P, D)
        of the embedding (for valid pairs) are not.
        """
        asked = torch.where(valid[..., None], w, torch.zeros_like(w))
        if not asked.any():
            return
        # One row for all: its terms do not cancel by chance.
        mixed = (asked * torch.linspace(1, 2, w.shape[1], dtype=w.dtype, device=w.device)[:, None]).sum(1)
        for i, (name, tensors) in enumerate(zip(recording.names, weights)):
            if any(alpha.any() for alpha in tensors):
                continue
            if recording.is_used(i, mixed):
                layer = last_map(self._encoder(), recording.inputs, recording.additional_forward_args, self._selector())
                raise ValueError(
                    f"The embedding depends on layer {name} only through tokens that are no patches, such as the class"
                    " token after the last attention, so it has no map; choose a layer before the last attention"
                    + (f", such as {layer!r}." if layer else ", such as the normalisation at its input.")
                )
            recording.doubts.append(
                f"The embedding does not depend on layer {name}, or the encoder cuts the gradient between them (detach,"
                " torch.no_grad): its map is zero. Choose a layer on the way to the embedding, after any such cut."
            )

    def _record(
        self, inputs: Tensors, additional_forward_args: object | None, layer_input: bool = False
    ) -> AbstractContextManager[Recording]:
        _check_layer(self.layer)
        return _recording.record(
            self._encoder(),
            self.layer if isinstance(self.layer, list) else [self.layer],
            inputs,
            additional_forward_args,
            output_selector=self._selector(),
            reshape_transform=self.reshape_transform,
            layer_input=layer_input,
            graph=self._needs_graph() and not torch.is_inference_mode_enabled(),
            device_ids=self.device_ids,
        )

    def _result(self, maps: list[Tensors], doubts: list[str]) -> Maps:
        """Captum's form: a tuple for several tensors, a list for a list of layers. Warns of each doubt once."""
        warn_once(doubts)
        results = [layer if len(layer) > 1 else layer[0] for layer in maps]
        return results if isinstance(self.layer, list) else results[0]


def unexplained(which: str) -> str:
    """The doubt about embeddings that are not usable."""
    return f"Embeddings are zero or not finite ({which}): the maps that depend on them are zero."


def usable(x: Tensor) -> Tensor:
    """Which embeddings (N, D) are finite and not zero."""
    largest = x.abs().amax(1)
    return largest.isfinite() & (largest > 0)


def uncompiled(func: Any) -> Any:
    """The module behind torch.compile, which runs past hooks that are set after its first call."""
    return getattr(func, "_orig_mod", func)


def _check_layer(layer: object) -> None:
    layers = layer if isinstance(layer, list) else [layer]
    if not layers or not all(isinstance(m, nn.Module) for m in layers):
        hint = "; pass model.get_submodule(name)" if any(isinstance(m, str) for m in layers) else ""
        got = f"a list of {[type(m).__name__ for m in layers]}" if isinstance(layer, list) else describe(layer)
        raise TypeError(f"Expected `layer` to be a module or a list of modules, but got {got}{hint}.")


def pair_index(inputs: int, references: int) -> Tensor:
    """The reference of each input (B, 1), where they are paired or share one."""
    if references not in (1, inputs):
        raise ValueError(
            f"Expected `reference` to hold one reference or {inputs}, one for each input, but got {references}."
        )
    return reference_index("reference", None, references, inputs)[:, None]


def _other(contrast: object, references: int, inputs: int) -> Other:
    """The references to contrast with: (B, 1), the rest, or none."""
    if contrast is None:
        return None
    if not isinstance(contrast, str):
        return reference_index("contrast", contrast, references, inputs)[:, None]
    if contrast != "rest":
        raise ValueError(f'Expected `contrast` to be the number of a reference or "rest", but got {contrast!r}.')
    if references < 2:
        raise ValueError(f'contrast="rest" needs at least two references, but there is {references}.')
    return "rest"
