"""Which places of two inputs look alike, as a Captum layer attribution."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_fam._captum import TargetType
from captum_fam._checks import (
    check_internal_batch_size,
    check_same_form,
    describe,
    format_inputs,
    reference_index,
    references_given,
    warn_once,
)
from captum_fam.engine.chunks import Tensors, cut, cut_arguments, slices
from captum_fam.engine.correspondence import Call, Places, best_match, joined, known, match_pairs, places_of
from captum_fam.engine.question import pair_index
from captum_fam.engine.report import SIDES
from captum_fam.engine.untouched import eagerly
from captum_fam.methods.layer_attribution import Maps
from captum_fam.methods.on_layer import OnLayer
from captum_fam.methods.similarity_attribution import Inputs, Selector
from captum_fam.similarity import exact

# References, or images of a background, that go through the encoder at once.
_AT_ONCE = 32


class CorrespondenceMap(OnLayer, LayerAttribution):
    r"""
    Which places of an input look like some place of a reference? At place i of a layer's activations A,

    .. math:: M_i = \max_j \cos(A_i, R_j)

    over the places j of the reference's activations R. Much of an image looks like some place of every image. So
    ``background`` and ``contrast`` subtract the mean of the same over other images: what is left looks more like this
    reference than like others.

    It does not explain the score, as the other methods here do: it compares places, and the embedding has no part in
    it. Its values are not parts of the score. References must be inputs, because an embedding has no places. It takes
    one forward pass of each image and no gradient.

    The best match of places is a common way to compare dense features (Amir et al., https://arxiv.org/abs/2112.05814);
    subtracting that of other images is ours.

    Args:
        forward_func (Callable or torch.nn.Module): The encoder, or a :class:`~captum_fam.SimilarityScore`, whose
                    encoder is used.
        layer (torch.nn.Module or list of torch.nn.Module): Layer whose activations (B, C, \*spatial) are
                    compared, or a list of layers.
        device_ids (list[int]): Device ID list, necessary only if forward_func applies a
                    DataParallel model, as for other Captum layer methods.
                    Default: None
        background (Tensor or tuple[Tensor, ...], optional): A dozen or more images, in the form of the inputs, of what
                    inputs and references commonly show. They are subtracted wherever ``contrast`` is not given.
                    Default: None, the plain best match
        output_selector, reshape_transform (Callable, optional): As in
                    :class:`~captum_fam.FeatureActivationMap`.
                    Default: None

    Raises:
        TypeError, ValueError: an argument is not as described above.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> images, reference, others = torch.rand(2, 3, 16, 16), torch.rand(1, 3, 16, 16), torch.rand(12, 3, 16, 16)
        >>> CorrespondenceMap(encoder, encoder[1], background=others).attribute(images, reference=reference).shape
        torch.Size([2, 1, 14, 14])
    """

    _of_terms = False

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None = None,
        *,
        background: Inputs | None = None,
        output_selector: Selector = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(
            forward_func, layer, device_ids, output_selector=output_selector, reshape_transform=reshape_transform
        )
        images = () if background is None else _images("background", background)
        self.background = tuple(t.detach().clone() for t in images) or None  # the caller's may change

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Inputs,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        *,
        reference: Inputs | None = None,
        reference_embedding: None = None,
        contrast: TargetType | Literal["rest"] | str | Inputs = None,
        internal_batch_size: int | None = None,
    ) -> Maps:
        r"""
        Which places of each input look like one reference?

        Args:
            inputs, target, additional_forward_args, attribute_to_layer_input, relu_attributions: As in
                        :meth:`FeatureActivationMap.attribute`.
            reference (Tensor or tuple[Tensor, ...]): K references in the form of ``inputs``.
            reference_embedding: An error: embeddings have no places.
            contrast (int, list, Tensor or str, optional): What is subtracted: the best match of another reference, by
                        its number in the forms of ``target``; ``"rest"``, the mean over all other references; or images
                        in the form of ``inputs``, instead of ``background``.
                        Default: None, ``background``
            internal_batch_size (int, optional): How many images go through the encoder at a time.
                        Default: None, all inputs at once, and a few references at a time

        Returns:
            *Tensor*, *tuple[Tensor, ...]* or *list* of **attributions**:
            - maps (B, 1, \*spatial) in the dtype of the layer's activations: cosines in [-1, 1], or
              differences of cosines; a tuple for a layer that gives several tensors, and a list of results
              for a list of layers.

        Raises:
            TypeError, ValueError: an argument is not as described above; the message names it.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> shelf = torch.rand(5, 3, 16, 16)
            >>> correspondence = CorrespondenceMap(encoder, encoder[1])
            >>> correspondence.attribute(torch.rand(2, 3, 16, 16), [3, 0], reference=shelf, contrast="rest").shape
            torch.Size([2, 1, 14, 14])
        """
        inputs = format_inputs("inputs", inputs)
        check_internal_batch_size(internal_batch_size)
        references = self._given(inputs, reference, reference_embedding)
        self._before_target(target, len(references[0]), inputs, additional_forward_args)
        own = reference_index("target", target, len(references[0]), len(inputs[0]))[:, None]
        call = Call(len(inputs[0]), additional_forward_args, internal_batch_size, attribute_to_layer_input)
        return self.match(inputs, references, own, contrast, relu_attributions, call)

    def attribute_all(
        self,
        inputs: Inputs,
        additional_forward_args: object | None = None,
        *,
        reference: Inputs | None = None,
        reference_embedding: None = None,
        relu_attributions: bool = False,
        contrast: Literal["rest"] | str | Inputs | None = None,
        internal_batch_size: int | None = None,
    ) -> Maps:
        r"""
        Which places of each input look like every reference? Takes one forward pass of each image.

        Args:
            inputs, additional_forward_args, reference, reference_embedding, relu_attributions, internal_batch_size:
                        As in :meth:`attribute`.
            contrast (str or Tensor, optional): ``"rest"``, or images, as in :meth:`attribute`.
                        Default: None, ``background``

        Returns:
            *Tensor*, *tuple[Tensor, ...]* or *list*: maps (B, K, \*spatial), otherwise as
            :meth:`attribute`.

        Raises:
            TypeError, ValueError: As in :meth:`attribute`.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> correspondence = CorrespondenceMap(encoder, encoder[1])
            >>> correspondence.attribute_all(torch.rand(2, 3, 16, 16), reference=torch.rand(5, 3, 16, 16)).shape
            torch.Size([2, 5, 14, 14])
        """
        inputs = format_inputs("inputs", inputs)
        check_internal_batch_size(internal_batch_size)
        references = self._given(inputs, reference, reference_embedding)
        if not len(references[0]):
            raise ValueError("Expected at least one reference, but got none; pass images as `reference`.")
        if not (contrast is None or _are_images(contrast) or (isinstance(contrast, str) and contrast == "rest")):
            raise ValueError(
                f'Expected `contrast` to be "rest", images or None, but got {describe(contrast)}; `attribute` takes a'
                " number."
            )
        own = torch.arange(len(references[0]))[None]
        call = Call(len(inputs[0]), additional_forward_args, internal_batch_size)
        return self.match(inputs, references, own, contrast, relu_attributions, call)

    @eagerly
    def attribute_pair(self, inputs: Inputs, reference: Inputs) -> tuple[Maps, Maps]:
        r"""
        Which places of each of two images look like the other? Takes one forward pass of each; ``background`` is
        subtracted on both sides.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): B inputs.
            reference (Tensor or tuple[Tensor, ...]): In the form of ``inputs``: B references,
                        paired with the inputs, or one that they share.

        Returns:
            *tuple*: maps of the inputs, and maps of the reference, each (B, 1, \*spatial),
            otherwise as :meth:`attribute`.

        Raises:
            TypeError, ValueError: As in :meth:`attribute`.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> correspondence = CorrespondenceMap(encoder, encoder[1])
            >>> here, there = correspondence.attribute_pair(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 24, 24))
            >>> here.shape, there.shape
            (torch.Size([2, 1, 14, 14]), torch.Size([2, 1, 22, 22]))
        """
        call, one, two = self._both(inputs, reference)
        with torch.no_grad():
            pairs = [(A, R.expand(len(A), -1, -1)) for A, R in zip(one.units, two.units)]
            here, there = [match_pairs(A, R) for A, R in pairs], [match_pairs(R, A) for A, R in pairs]
            if self.background is not None:
                less, less_there = self._mean_best(self.background, [one, two], call, "background")
                here = [M - L for M, L in zip(here, less)]
                there = [M - L.expand(len(M), -1) for M, L in zip(there, less_there)]
        warn_once(call.warnings())
        return self._laid_out([M[:, None] for M in here], one), self._laid_out([M[:, None] for M in there], two)

    @eagerly
    def attribute_matrix(self, inputs: Inputs, reference: Inputs) -> Tensor | list[Tensor]:
        r"""
        How much does each place of the inputs look like each place of the reference? Their cosine.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): B inputs.
            reference (Tensor or tuple[Tensor, ...]): In the form of ``inputs``: B references,
                        paired with the inputs, or one that they share.

        Returns:
            *Tensor* or *list*: (B, h·w, h'·w'), places in row-major order, in the dtype of the activations; a list
            for a list of layers. The maximum of a row is the value of :meth:`attribute` at that place,
            without a background.

        Raises:
            TypeError, ValueError: As in :meth:`attribute`.

        Examples::

            >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> correspondence = CorrespondenceMap(encoder, encoder[1])
            >>> correspondence.attribute_matrix(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 24, 24)).shape
            torch.Size([2, 196, 484])
        """
        call, one, two = self._both(inputs, reference)
        if max(one.sizes) > 1:
            raise ValueError(f"attribute_matrix needs a layer with one tensor, but it has {max(one.sizes)}.")
        with torch.no_grad(), exact(one.units[0]):
            cosines = [(A @ R.mT.to(A)).clamp(-1, 1) for A, R in zip(one.units, two.units)]
        warn_once(call.warnings())
        found = [known(C, (1, 2)).to(dtype) for C, dtype in zip(cosines, one.dtypes)]
        return self._result(found, one.sizes)  # type: ignore[no-any-return]

    def _given(self, inputs: Tensors, reference: Inputs | None, reference_embedding: object) -> Tensors:
        tensors = references_given("CorrespondenceMap", reference, reference_embedding)
        check_same_form(tensors, inputs)
        return tensors

    @eagerly
    def match(self, inputs: Tensors, references: Tensors, own: Tensor, contrast: Any, relu: bool, call: Call) -> Maps:
        """Maps (B, P, *spatial) for the references of the numbers own (B, P), or (1, P) for all inputs."""
        B, K, P = len(inputs[0]), len(references[0]), own.shape[1]
        index, others, name = own.expand(B, P), None, "contrast"
        if isinstance(contrast, str) and contrast != "rest":
            raise ValueError(
                f'Expected `contrast` to be the number of a reference, "rest" or images, but got {contrast!r}.'
            )
        rest = isinstance(contrast, str)
        if contrast is None:
            others, name = self.background, "background"
        elif _are_images(contrast):
            others = _images("contrast", contrast)
        elif K < 2:
            raise ValueError(
                f"contrast={contrast!r} needs at least two references, but there is {K}; pass more of them, or images"
                " as `contrast`."
            )
        elif not rest:
            index = torch.cat([index, reference_index("contrast", contrast, K, B)[:, None]], 1)
        for images, argument in ((references, "reference"), (others, name)):
            if images is not None:
                call.check(images, argument, inputs)
        with torch.no_grad():
            one = joined([places for _, places in self._stream(inputs, call, SIDES[0], call.most or B)])
            index = index.to(one.units[0].device)
            best = [A.new_zeros(B, index.shape[1], A.shape[1]) for A in one.units]
            total = [torch.zeros_like(M[:, 0]) for M in best]
            compared = None if rest else set(index.unique().tolist())
            for rows, two in self._stream(references, call, SIDES[1], None, compared):
                for number in range(rows.start, rows.stop):
                    i, p = (index == number).nonzero(as_tuple=True)
                    which = torch.arange(B, device=i.device) if rest else i.unique()
                    for M, T, A, R in zip(best, total, one.units, two.units):
                        T[which] += (found := best_match(A[which], R[number - rows.start]))
                        M[i, p] = found[torch.searchsorted(which, i)]
            maps = [M[:, :P] for M in best]
            if rest:
                maps = [M - (T[:, None] - M) / (K - 1) for M, T in zip(maps, total)]
            elif index.shape[1] > P:
                maps = [M[:, :P] - M[:, P:] for M in best]
            elif others is not None:
                [less] = self._mean_best(others, [one], call, name)
                maps = [M - L[:, None] for M, L in zip(maps, less)]
        warn_once(call.warnings())
        return self._laid_out([F.relu(M) if relu else M for M in maps], one)  # type: ignore[no-any-return]

    def _both(self, inputs: Inputs, reference: Inputs) -> tuple[Call, Places, Places]:
        """The places of both sides of pairs; one reference may be shared by all inputs."""
        inputs = format_inputs("inputs", inputs)
        references = self._given(inputs, reference, None)
        pair_index(len(inputs[0]), len(references[0]))  # or an error
        call = Call(len(inputs[0]))
        if self.background is not None:
            call.check(self.background, "background", inputs)
        (_, one), (_, two) = (
            next(self._stream(images, call, side, len(images[0]))) for images, side in zip((inputs, references), SIDES)
        )
        return call, one, two

    def _mean_best(self, background: Tensors, sides: list[Places], call: Call, name: str) -> list[list[Tensor]]:
        """The mean over a background of the best matches of places (n, N), for each tensor of each side."""
        means = [[A.new_zeros(A.shape[:2]) for A in side.units] for side in sides]
        for _, others in self._stream(background, call, name):
            for mean, side in zip(means, sides):
                for M, A, G in zip(mean, side.units, others.units):
                    for image in G:
                        M += best_match(A, image) / len(background[0])
        return means

    def _stream(
        self, images: Tensors, call: Call, side: str, most: int | None = None, compared: set[int] | None = None
    ) -> Iterator[tuple[slice, Places]]:
        """The places of a few images at a time; ``compared`` has the numbers of those that matter, None for all."""
        for rows in slices(len(images[0]), most or call.most or _AT_ONCE):
            args = cut_arguments(call.additional_forward_args, rows, call.inputs)
            with self._record(cut(images, rows), args, call.report, call.layer_input) as recording:
                places, bad = places_of(recording.activations, recording.sizes)
            call.note_unusable(side, {rows.start + n for n in bad}, compared)
            del recording  # the next images need the memory
            yield rows, places

    def _laid_out(self, maps: list[Tensor], places: Places) -> Any:
        """Maps (B, P, N) in Captum's form."""
        layers = zip(maps, places.shapes, places.dtypes)
        found = [known(M, 2).reshape(*M.shape[:2], *shape).to(dtype) for M, shape, dtype in layers]
        return self._result(found, places.sizes)


def less_the_others(method: CorrespondenceMap, query: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """
    What of one image looks like each of K references (1, K, *spatial), and what of each of them looks like the image
    (K, 1, *spatial). Of several references, and without a background, what looks like the rest of them is subtracted.
    """
    there: Any = method.attribute(references, reference=query)
    if len(references) == 1 or method.background is not None:
        return method.attribute_all(query, reference=references), there  # type: ignore[return-value]
    matches: Any = method.attribute_all(references, reference=references)
    rest = [torch.cat([own[:k], own[k + 1 :]]).mean(0, keepdim=True) for k, own in enumerate(matches)]
    here: Any = method.attribute_all(query, reference=references, contrast="rest")
    return here, there - torch.stack(rest)


def _images(name: str, value: Any) -> Tensors:
    images = format_inputs(name, value)
    if not len(images[0]):
        raise ValueError(f"Expected `{name}` to hold images, but it is empty; leave it out for the plain best match.")
    return images


def _are_images(contrast: Any) -> bool:
    """Whether a contrast is images: several tensors, or one of fractions or with more than one dimension."""
    if isinstance(contrast, tuple):
        return any(isinstance(t, Tensor) for t in contrast)
    return isinstance(contrast, Tensor) and (contrast.ndim > 1 or contrast.is_floating_point())
