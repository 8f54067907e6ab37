"""Captum's attribute, once for all methods that explain a layer."""

from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_fam._captum import TargetType
from captum_fam._checks import check_internal_batch_size, check_same_form, describe, format_inputs, warn_once
from captum_fam.engine.chunks import Assembled, Tensors
from captum_fam.engine.question import Question, pair_index
from captum_fam.engine.report import SIDES, Report
from captum_fam.engine.untouched import eagerly
from captum_fam.engine.ways import Way, by_the_cheapest_way
from captum_fam.methods.layer_explanation import Ask, Explained, LayerExplanation
from captum_fam.methods.similarity_attribution import Inputs

Maps: TypeAlias = Tensor | Tensors | list[Tensor | Tensors]


class LayerSimilarityAttribution(LayerExplanation, LayerAttribution):
    """A method with Captum's arguments and results."""

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
        contrast: TargetType | Literal["rest", "self"] | str = None,
        threshold: float | None = None,
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
    ) -> Maps | tuple[Maps, Tensor | list[Tensor]]:
        r"""
        What in each input speaks for its similarity to one reference?

        The references come from one place: ``reference``, ``reference_embedding`` or a
        SimilarityScore. With ``target``, each input takes the reference of that number. Without it,
        one reference is shared by all inputs, or B references are paired with the B inputs; any
        other number of references is an error.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs to explain, batch first.
            target (int, list, Tensor, optional): Number of the reference, in Captum's forms:
                        an int for all inputs, or a list or 1D tensor with one for each.
                        Default: None
            additional_forward_args (Any, optional): Further arguments of forward_func, as for
                        other Captum methods. ``reference`` goes through the encoder with them, too:
                        if a tensor among them has a row for each input, pass as many references as
                        inputs.
                        Default: None
            attribute_to_layer_input (bool, optional): Explains the layer's input instead of
                        its output. On the jacobian route, the gradient counts only paths through
                        the layer, not those of the same tensor around it.
                        Default: False
            relu_attributions (bool, optional): Sets negative values of the maps to zero.
                        Default: False
            attr_dim_summation (bool, optional): Whether to sum over the channels.
                        Default: True
            reference (Tensor or tuple[Tensor, ...], optional): K references in the form of
                        ``inputs``.
                        Default: None
            reference_embedding (Tensor, optional): K references as embeddings (K, D).
                        Default: None
            contrast (int, list, Tensor or str, optional): What the score is compared with. The
                        number of another reference, in the forms of ``target``: why this one rather
                        than that one. ``"rest"``: why this one rather than the mean of all the
                        others. ``"self"``, which needs no other reference: what this match has
                        beyond the match of the input with itself. The input's own share is
                        subtracted such that 0 is left of the score; at a cosine of 1 nothing is
                        left, and the map is zero. The terms of a contrast are signed, whatever
                        ``normalize`` says.
                        Default: None
            threshold (float, optional): Why does the score lie above or below this threshold of a
                        decision? The map explains score - threshold. Like ``"self"``, it needs a
                        similarity by which an input is similar to itself (cosine, dot product). Not
                        together with ``contrast``.
                        Default: None
            internal_batch_size (int, optional): How many inputs, or references, go through the
                        encoder at a time. The maps are the same; less memory is needed. As in
                        Captum, tensors among the further arguments with as many rows as there are
                        inputs are split with them. With ``n_steps``, each input counts n_steps + 1
                        times; if a single input is too many, its steps are split, and the encoder
                        runs once for each part.
                        Default: None, all at once
            return_convergence_delta (bool, optional): Also returns how far each map is from what it
                        should add up to. Only for methods with ``n_steps``.
                        Default: False

        NoiseTunnel and sensitivity_max of Captum repeat the inputs and ``target``, but not the
        references or ``contrast``. With these, choose among the references with ``target``, and
        pass an int, ``"rest"`` or ``"self"`` as ``contrast``.

        Returns:
            *Tensor*, *tuple[Tensor, ...]* or *list* of **attributions**:
            - maps (B, 1, \*spatial), or (B, C, \*spatial) without the sum over channels, in the
              dtype of the layer's activations, detached; a tuple for a layer that gives several
              tensors, and a list of results for a list of layers.

            With ``return_convergence_delta``, these and the **delta** (B,), the mean of each map
            (before ``relu_attributions``) less :math:`f \cdot (z - z(B))`; a list for a list of layers.

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
        check_internal_batch_size(internal_batch_size)
        self._check_delta(return_convergence_delta)
        ask = self._ask(
            inputs,
            additional_forward_args,
            internal_batch_size,
            target=target,
            reference=reference,
            reference_embedding=reference_embedding,
            contrast=contrast,
            threshold=threshold,
        )
        found = self.explain(
            inputs,
            ask,
            additional_forward_args,
            internal_batch_size=internal_batch_size,
            layer_input=attribute_to_layer_input,
            relu=relu_attributions,
            summed=attr_dim_summation,
            delta=return_convergence_delta,
        )
        maps: Maps = self._told(found)
        if not return_convergence_delta:
            return maps
        deltas = [missed[:, 0] for missed in found.missed]
        return maps, deltas if isinstance(self.layer, list) else deltas[0]

    def attribute_all(
        self,
        inputs: Inputs,
        additional_forward_args: object | None = None,
        *,
        reference: Inputs | None = None,
        reference_embedding: Tensor | None = None,
        relu_attributions: bool = False,
        contrast: Literal["rest", "self"] | str | None = None,
        threshold: float | None = None,
        internal_batch_size: int | None = None,
    ) -> Maps:
        r"""
        What in each input speaks for its similarity to every reference? Takes one forward pass of
        the inputs.

        Args:
            inputs, additional_forward_args, reference, reference_embedding, relu_attributions:
                        As in :meth:`attribute`.
            contrast (str, optional): ``"rest"`` contrasts each reference with the mean over
                        all the others, ``"self"`` with the input itself.
                        Default: None
            threshold (float, optional): As in :meth:`attribute`.
                        Default: None
            internal_batch_size (int, optional): As in :meth:`attribute`; it also limits how many
                        references are compared at a time. Without it, that number is chosen such
                        that the memory needed beside the maps does not grow with K.
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
        check_internal_batch_size(internal_batch_size)
        if contrast is not None and not (isinstance(contrast, str) and contrast in ("rest", "self")):
            raise ValueError(
                f'Expected `contrast` to be "rest", "self" or None, but got {describe(contrast)}; `attribute` takes a'
                " number."
            )
        ask = self._ask(
            inputs,
            additional_forward_args,
            internal_batch_size,
            reference=reference,
            reference_embedding=reference_embedding,
            contrast=contrast,
            threshold=threshold,
            every=True,
        )
        found = self.explain(
            inputs, ask, additional_forward_args, internal_batch_size=internal_batch_size, relu=relu_attributions
        )
        return self._told(found)  # type: ignore[no-any-return]

    @eagerly
    def attribute_pair(
        self,
        inputs: Inputs,
        reference: Inputs,
        *,
        contrast: Literal["self"] | str | None = None,
        threshold: float | None = None,
    ) -> tuple[Maps, Maps]:
        r"""
        What in each of two images speaks for their similarity? Takes one forward pass of each.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): B inputs.
            reference (Tensor or tuple[Tensor, ...]): In the form of ``inputs``: B references,
                        paired with the inputs, or one that they share.
            contrast (str, optional): ``"self"``: what the match has beyond the match of each image
                        with itself.
                        Default: None
            threshold (float, optional): As in :meth:`attribute`.
                        Default: None

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
        if contrast is not None and not (isinstance(contrast, str) and contrast == "self"):
            raise ValueError(
                f'Expected `contrast` of a pair to be "self" or None, but got {describe(contrast)}; `attribute` takes'
                " the number of another reference."
            )
        B, K = len(inputs[0]), len(reference[0])
        own, less = pair_index(B, K), self._less(contrast, threshold, K, B)

        def both_sides(
            layers: list[nn.Module], way: Way
        ) -> tuple[tuple[list[Tensor], list[Tensor]], list[int], Report]:
            report, path = Report(), self._paths(None, False)[0]
            with (
                self._record(inputs, None, report, way=way, path=path, layers=layers) as one,
                self._record(reference, None, report, way=way, path=path, layers=layers) as two,
            ):
                maps, back = Assembled(B), Assembled(K)
                aligned = [a and b for a, b in zip(self._aligned(one), self._aligned(two))]
                for columns, part in self._explain(one, Question(two.embedding, own, less), aligned):
                    maps.put(slice(0, B), columns, part.maps, 1)
                # A shared reference has one map for each input: its P maps become B of one.
                turned = Question(one.embedding, own if K == B else torch.arange(B)[None], less)
                for columns, part in self._explain(two, turned, aligned, sides=SIDES[::-1]):
                    back.put(slice(0, K), columns, part.maps, turned.own.shape[1])
            other = [M if K == B else M.transpose(0, 1).contiguous() for M in back.tensors]
            return (maps.tensors, other), one.sizes, report

        found = [by_the_cheapest_way(partial(both_sides, layers)) for layers in self._together(inputs)]
        warn_once([text for _, _, report in found for text in report.texts()])
        sizes = [size for _, of_layers, _ in found for size in of_layers]
        here, there = (self._result([M for sides, _, _ in found for M in sides[side]], sizes) for side in (0, 1))
        return here, there

    def _check_delta(self, return_convergence_delta: bool) -> None:
        if return_convergence_delta:
            raise ValueError(
                "return_convergence_delta=True needs a path to integrate along: pass n_steps to FeatureActivationMap or"
                " SimilarityDecomposition."
            )

    def _ask(self, inputs: Tensors, additional_forward_args: object | None, most: int | None, **asked: Any) -> Ask:
        """The question about one reference for each input, or about every reference."""
        question = self._question(inputs, additional_forward_args, most, **asked)
        return lambda z, rows: question.of(rows)

    def _told(self, found: Explained) -> Any:
        """The maps in Captum's form; warns the user of what the report holds."""
        warn_once(found.report.texts())
        return self._result(found.maps, found.sizes)
