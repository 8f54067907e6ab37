"""Feature Activation Map as a Captum layer attribution."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from captum.attr import LayerAttribution
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
    warn,
)
from captum_fam._recording import Recording, Tensors
from captum_fam.score import SimilarityScore
from captum_fam.similarity import (
    Normalize,
    Similarity,
    check_normalize,
    check_similarity,
    contribution_weights,
    widen,
)

Inputs: TypeAlias = Tensor | Tensors
Maps: TypeAlias = Tensor | Tensors | list[Tensor | Tensors]
Other: TypeAlias = Tensor | Literal["rest"] | None


class FeatureActivationMap(LayerAttribution):
    r"""
    Feature Activation Map (FAM): which parts of an input make its embedding similar to a
    reference's, for models that have no classifier (few-shot, contrastive, retrieval).

    Each embedding dimension's contribution :math:`c_k` to the similarity of the embedding z
    and the reference s (see :func:`~captum_fam.channel_contributions`) gives its weight
    :math:`w_k` (see :func:`~captum_fam.contribution_weights`), and the map is

    .. math:: M = \sum_k \alpha_k A_k

    over the channels of the layer's activations A, with :math:`\alpha` the weights carried
    to these channels:

    - *aligned*: :math:`\alpha = w`, where dimension k of z is channel k of A (z is a positive
      multiple of the spatial mean of A, for every input). No gradient is taken. This is the
      case of the paper, https://arxiv.org/abs/2307.05017.
    - *jacobian*: :math:`\alpha_k = \sum_{locations} \partial (w \cdot z) / \partial A_k`, with w
      held constant, for every other encoder and layer. Ours, not the paper's; where z is
      exactly the spatial mean of A, it equals the aligned case.

    With ``contrast``, the map says why reference a rather than b: :math:`\alpha` carries
    :math:`c(z, s_a) - c(z, s_b)`, signed, which adds up to the difference of the two scores.
    Ours, not the paper's.

    FAM says what two images have in common in absolute terms and depends only weakly on the
    reference; contrast says what decides. No ReLU is applied by default, because negative
    values are evidence too where activations or weights are signed; pass
    ``relu_attributions=True`` to drop them. Under ``"euclidean"``, channels near zero in
    both images get weights near one, and the map drifts to the plain sum of activations.

    Args:
        forward_func (Callable or torch.nn.Module): The encoder, from inputs to embeddings
                    (B, D), or a :class:`~captum_fam.SimilarityScore`, whose encoder,
                    references and similarity are used.
        layer (torch.nn.Module or list of torch.nn.Module): Layer whose activations
                    (B, C, \*spatial) make the map; any number of spatial dimensions.
                    A list of layers gives a list of results from one forward pass.
        device_ids (list[int]): Device ID list, necessary only if forward_func applies a
                    DataParallel model, as for other Captum layer methods.
                    Default: None
        similarity (str or Callable, optional): As in
                    :func:`~captum_fam.channel_contributions`.
                    Default: None, that of the SimilarityScore, else ``"cosine"``
        normalize (str, optional): ``"minmax"``, or None for signed weights w = c.
                    Default: ``"minmax"``
        channel_weights (str): ``"auto"`` takes *aligned* where it holds for every input of
                    the call (those with a zero embedding aside), else *jacobian*;
                    ``"aligned"`` and ``"jacobian"`` force one.
                    Default: ``"auto"``
        output_selector (Callable, optional): Takes the encoder's output (a dict, a
                    ``ModelOutput``, a tuple, ...) to the embeddings (B, D).
                    Default: None, that of the SimilarityScore, else the output itself
        reshape_transform (Callable, optional): Takes the layer's activations (tokens,
                    channels last) to (B, C, \*spatial) by selecting and reordering; it is
                    applied to their gradient as well.
                    Default: None

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> fam = FeatureActivationMap(encoder, encoder[1])
        >>> queries, reference = torch.rand(2, 3, 16, 16), torch.rand(1, 3, 16, 16)
        >>> fam.attribute(queries, reference=reference).shape
        torch.Size([2, 1, 14, 14])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None = None,
        *,
        similarity: Similarity | None = None,
        normalize: Normalize = "minmax",
        channel_weights: Literal["auto", "aligned", "jacobian"] | str = "auto",
        output_selector: Callable[[Any], Tensor] | None = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_callable("forward_func", forward_func)
        _check_layer(layer)
        if similarity is not None:
            check_similarity(similarity)
        check_normalize(normalize)
        if channel_weights not in ("auto", "aligned", "jacobian"):
            raise ValueError(
                f'Expected `channel_weights` to be "auto", "aligned" or "jacobian", but got {channel_weights!r}.'
            )
        for name, function in (("output_selector", output_selector), ("reshape_transform", reshape_transform)):
            if function is not None:
                check_callable(name, function)
        super().__init__(forward_func, layer, device_ids)
        self.similarity = similarity
        self.normalize = normalize
        self.channel_weights = channel_weights
        self.output_selector = output_selector
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
        are paired with them, and anything else is an error.

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
        references = self._references(inputs, reference, reference_embedding)
        B, K = len(inputs[0]), len(references[0])
        own = reference_index("target", target, K, B)[:, None]
        other = _other(contrast, K, B)
        s = self._embedded(references, B, reference is not None, additional_forward_args)
        with self._record(inputs, additional_forward_args, attribute_to_layer_input) as recording:
            maps = self._maps(recording, s, own, other, relu_attributions, attr_dim_summation)
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
        Explains each input's similarity to every reference, with one forward pass of the inputs.

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
        references = self._references(inputs, reference, reference_embedding)
        B, K = len(inputs[0]), len(references[0])
        if not K:
            raise ValueError("Expected at least one reference, but got none.")
        if contrast not in (None, "rest"):
            raise ValueError(
                f'Expected `contrast` to be "rest" or None, but got {describe(contrast)}; `attribute` takes a number.'
            )
        own, other = torch.arange(K).expand(B, -1), _other(contrast, K, B)
        s = self._embedded(references, B, reference is not None, additional_forward_args)
        with self._record(inputs, additional_forward_args) as recording:
            maps = self._maps(recording, s, own, other, relu_attributions)
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
        if K not in (1, B):
            raise ValueError(f"Expected `reference` to hold one reference or {B}, one for each input, but got {K}.")
        own = reference_index("reference", None, K, B)[:, None]
        with self._record(inputs, None) as one, self._record(reference, None) as two:
            maps = self._maps(one, two.embedding, own)
            # A shared reference has one map for each input: its P maps become B of one.
            back = own if K == B else torch.arange(B)[None]
            reference_maps = [
                tuple(M if K == B else M.transpose(0, 1).contiguous() for M in layer)
                for layer in self._maps(two, one.embedding, back, sides=("references", "inputs"))
            ]
        return self._result(maps, one.doubts + two.doubts), self._result(reference_maps, [])

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
        r"""This method is not implemented for FeatureActivationMap."""
        raise NotImplementedError("attribute_future is not implemented for FeatureActivationMap")

    def _maps(
        self,
        recording: Recording,
        s: Tensor,
        own: Tensor,
        other: Other = None,
        relu: bool = False,
        summed: bool = True,
        sides: tuple[str, str] = ("inputs", "references"),
    ) -> list[Tensors]:
        """
        For each layer the maps (B, P, *spatial) for references ``own`` (B, P) among s (K, D); not
        summed, for P = 1, their terms (B, C, *spatial).
        """
        z = widen(recording.embedding)
        check_dimensions(z, s)
        s, own = s.to(z), own.to(z.device)
        other = other.to(z.device) if isinstance(other, Tensor) else other
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            c = _method.contributions(z, s, own, other, self._similarity())
            w = contribution_weights(c, self.normalize) if other is None else c
            valid, doubt = _valid(z, s, own, other, c, sides)
            recording.doubts += doubt
            aligned = [[self._is_aligned(recording, A) for A in layer] for layer in recording.layers]
            if not all(map(all, aligned)):
                if not recording.has_graph:
                    raise RuntimeError(_NO_GRAPH)
                jacobian = _method.jacobian_weights(recording, w)
                recording.doubts += _independent(recording.names, jacobian, w, valid)
            maps: list[Tensors] = []
            for i, layer in enumerate(recording.layers):
                maps.append(())
                for j, A in enumerate(layer):
                    alpha = w if aligned[i][j] else jacobian[i][j]
                    M = _method.activation_maps(alpha, A) if summed else _method.weighted_activations(alpha, A)
                    M = torch.where(valid.reshape(*valid.shape, *[1] * (M.ndim - 2)), M, torch.zeros_like(M))
                    maps[-1] += ((F.relu(M) if relu else M).to(A.dtype),)
        return maps

    def _is_aligned(self, recording: Recording, A: Tensor) -> bool:
        z = recording.embedding
        if self.channel_weights == "aligned" and A.shape[1] != z.shape[1]:
            raise ValueError(
                'channel_weights="aligned" needs a channel for each embedding dimension, but the layer has'
                f' {A.shape[1]} and the embedding {z.shape[1]}; pass channel_weights="auto" or "jacobian".'
            )
        return self.channel_weights == "aligned" or (self.channel_weights == "auto" and _method.is_aligned(z, A))

    def _record(
        self, inputs: Tensors, additional_forward_args: object | None, layer_input: bool = False
    ) -> AbstractContextManager[Recording]:
        _check_layer(self.layer)
        inference = torch.is_inference_mode_enabled()
        if inference and self.channel_weights == "jacobian":
            raise RuntimeError(_NO_GRAPH)
        return _recording.record(
            self._encoder(),
            self.layer if isinstance(self.layer, list) else [self.layer],
            inputs,
            additional_forward_args,
            output_selector=self._selector(),
            reshape_transform=self.reshape_transform,
            layer_input=layer_input,
            graph=self.channel_weights != "aligned" and not inference,
            device_ids=self.device_ids,
        )

    def _references(self, inputs: Tensors, reference: Inputs | None, reference_embedding: Tensor | None) -> Tensors:
        """The references from the one place that gives them: as embeddings (K, D), or as inputs of the encoder."""
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
        if len(given) != 1:
            raise ValueError(
                "Expected exactly one of `reference`, `reference_embedding` and the references of a SimilarityScore,"
                f" but got {' and '.join(given) or 'none; pass them by these names'}."
            )
        if reference is not None:
            tensors = format_inputs("reference", reference)
            check_same_form(tensors, inputs)
            return tensors
        if score is not None:
            return (score.reference_embedding,)
        check_reference_embedding(reference_embedding)
        return (reference_embedding,)  # type: ignore[return-value]  # checked

    def _embedded(
        self, references: Tensors, inputs: int, are_inputs: bool, additional_forward_args: object | None
    ) -> Tensor:
        """s (K, D)"""
        if not are_inputs:
            return references[0].detach()
        check_rows_fit(additional_forward_args, inputs, len(references[0]))
        return _recording.embed(self._encoder(), "reference", references, additional_forward_args, self._selector())

    def _score(self) -> SimilarityScore | None:
        func = _uncompiled(self.forward_func)
        module = func.module if isinstance(func, nn.DataParallel) else func
        return module if isinstance(module, SimilarityScore) else None

    def _encoder(self) -> Callable[..., Any]:
        score, func = self._score(), _uncompiled(self.forward_func)
        if score is None:
            encoder = func
        elif isinstance(func, nn.DataParallel) and func.device_ids:
            encoder = nn.DataParallel(func.module.encoder, func.device_ids, func.output_device, func.dim)
        else:
            encoder = _uncompiled(score.encoder)
        return encoder  # type: ignore[no-any-return]  # what the user gave

    def _similarity(self) -> Similarity:
        if self.similarity is not None:
            return self.similarity
        score = self._score()
        return "cosine" if score is None else score.similarity

    def _selector(self) -> Callable[[Any], Tensor] | None:
        if self.output_selector is not None:
            return self.output_selector
        score = self._score()
        return None if score is None else score.output_selector

    def _result(self, maps: list[Tensors], doubts: list[str]) -> Maps:
        """Captum's form: a tuple for several tensors, a list for a list of layers. Warns of each doubt once."""
        for doubt in dict.fromkeys(doubts):
            warn(doubt)
        results = [layer if len(layer) > 1 else layer[0] for layer in maps]
        return results if isinstance(self.layer, list) else results[0]


_NO_GRAPH = (
    "The embedding's dimensions are not the layer's channels, so the weights need a gradient, which"
    " torch.inference_mode() rules out; use torch.no_grad() instead."
)


def _uncompiled(func: Any) -> Any:
    """The module behind torch.compile, which runs past hooks that are set after its first call."""
    return getattr(func, "_orig_mod", func)


def _check_layer(layer: object) -> None:
    layers = layer if isinstance(layer, list) else [layer]
    if not layers or not all(isinstance(m, nn.Module) for m in layers):
        hint = "; pass model.get_submodule(name)" if any(isinstance(m, str) for m in layers) else ""
        got = f"a list of {[type(m).__name__ for m in layers]}" if isinstance(layer, list) else describe(layer)
        raise TypeError(f"Expected `layer` to be a module or a list of modules, but got {got}{hint}.")


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


def _independent(names: list[str], jacobian: list[list[Tensor]], w: Tensor, valid: Tensor) -> list[str]:
    """Doubts about layers whose weights are all zero, though those of the embedding are not."""
    if not (w.any(2) & valid).any():
        return []
    return [
        f"The embedding does not depend on layer {name} (as on patch tokens after the last attention, where the class"
        " token is the embedding), or the encoder cuts the gradient between them (detach, torch.no_grad): its map is"
        " zero. Choose a layer on the way to the embedding, after any such cut."
        for name, tensors in zip(names, jacobian)
        if not any(alpha.any() for alpha in tensors)
    ]


def _valid(
    z: Tensor, s: Tensor, own: Tensor, other: Other, c: Tensor, sides: tuple[str, str]
) -> tuple[Tensor, list[str]]:
    """Whether each input's similarity to each of its references (B, P) can be explained, and a doubt if not."""

    def usable(x: Tensor) -> Tensor:
        largest = x.abs().amax(1)
        return largest.isfinite() & (largest > 0)

    inputs, references = usable(z), torch.ones(len(s), dtype=torch.bool, device=s.device)
    used = own.unique() if other is None else slice(None)
    references[used] = usable(s[used])
    valid = inputs[:, None] & references[own] & c.abs().amax(2).isfinite()
    if isinstance(other, Tensor):
        valid &= references[other]
    if valid.all():
        return valid, []
    bad = [
        f"{side} {(~good).nonzero().flatten().tolist()}"
        for side, good in sorted(zip(sides, (inputs, references)))
        if not good.all()
    ]
    which = ", ".join(bad) or "their contributions overflow"
    return valid, [f"Embeddings are zero or not finite ({which}): the maps that depend on them are zero."]
