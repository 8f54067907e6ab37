"""FFAM, the parts of one image weighed by a gradient, as a Captum layer attribution."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_fam.engine.formula import less_reference, less_rest
from captum_fam.engine.places import by_place
from captum_fam.engine.question import Pairs
from captum_fam.methods.factorisation import check_n_parts, factorised, parts_of
from captum_fam.methods.layer_attribution import LayerSimilarityAttribution
from captum_fam.methods.similarity_attribution import Selector
from captum_fam.similarity import Similarity, nonzero


class FeatureFactorizationActivationMap(LayerSimilarityAttribution):
    r"""
    Where are parts of an image strong, and does the similarity depend on these places? Feature Factorization Activation
    Map (FFAM; Liu et al., https://arxiv.org/abs/2405.12601) on a similarity. The map is how strong all parts together
    are at each place, times how much the score depends on that place,

    .. math:: M_i = \|\partial f / \partial A_i\| \sum_a W_{ia}, \quad A \approx W H, \quad W, H \ge 0

    with the score f and the layer's activations A, a row for each place. NMF factorises them into n parts; the rows of
    H have length one. The paper explains detectors of objects in point clouds. Its abstract says that the maps of all
    parts are aggregated, and that the gradient of one object refines them. We could not read its equations and its
    number of parts. The sum, the length of the gradient and the length of H's rows are our reading; where activations
    are negative, we subtract each channel's minimum first, which is ours, too.

    The map is not negative, and its values are not parts of the score. It sees the parts of one
    image; for those that two images share, take :class:`~captum_fam.SharedParts`. ``contrast``
    subtracts the map of the other reference, or the mean of the others' maps; there is no
    ``"self"`` and no ``threshold``. At a cosine of 1 the gradient vanishes, and the map with it.
    The method needs scikit-learn (the extra ``parts``). It takes a factorisation for each input and
    a gradient for each reference.

    Args:
        forward_func (Callable or torch.nn.Module): The encoder, from inputs to embeddings
                    (B, D), or a :class:`~captum_fam.SimilarityScore`.
        layer (torch.nn.Module or list of torch.nn.Module): Layer whose activations
                    (B, C, \*spatial) make the map, or a list of layers.
        device_ids (list[int]): Device ID list, necessary only if forward_func applies a
                    DataParallel model, as for other Captum layer methods.
                    Default: None
        n_parts (int, optional): As in :class:`~captum_fam.SharedParts`.
                    Default: None
        similarity, output_selector, reshape_transform (optional): As in
                    :class:`~captum_fam.FeatureActivationMap`.
                    Default: None

    Raises:
        TypeError, ValueError: an argument is not as described above, or scikit-learn is not installed.

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> ffam = FeatureFactorizationActivationMap(encoder, encoder[1], n_parts=3)
        >>> ffam.attribute(torch.rand(2, 3, 16, 16), reference=torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 1, 14, 14])
    """

    _of_terms = False

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None = None,
        *,
        n_parts: int | None = None,
        similarity: Similarity | None = None,
        output_selector: Selector = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_n_parts(n_parts)
        super().__init__(
            forward_func,
            layer,
            device_ids,
            similarity=similarity,
            output_selector=output_selector,
            reshape_transform=reshape_transform,
        )
        self.n_parts = n_parts

    def _needs_graph(self) -> bool:
        return True

    def _maps(self, pairs: Pairs, aligned: list[bool], plain: bool, summed: bool) -> list[Tensor]:
        question, once = pairs.question, pairs.recording.once

        def found(own: Tensor) -> list[Tensor]:
            each = [[t.sum(1) if summed else t for t in terms] for terms in self._terms(pairs, own)]
            return [torch.stack(maps, 1) if summed else maps[0] for maps in zip(*each)]

        def total() -> list[Tensor]:
            sums: list[Tensor] = []
            for terms in self._terms(pairs, torch.arange(len(question.s), device=question.s.device)[None]):
                more = [t.sum(1, keepdim=True) for t in terms] if summed else terms
                sums = [a + b for a, b in zip(sums, more)] if sums else more
            return sums

        maps = found(question.own)
        if question.less is None:
            return maps
        if question.other is not None:
            return [less_reference(M, other) for M, other in zip(maps, found(question.other))]
        K = len(question.s)
        return [less_rest(M, rest, K) for M, rest in zip(maps, once(("total", summed), total))]

    def _terms(self, pairs: Pairs, own: Tensor) -> Iterator[list[Tensor]]:
        """Terms (B, C, N) of each activation; they add up to the maps of the references with numbers own (B, R)."""
        recording = pairs.recording
        strengths = recording.once("strengths", lambda: [self._strength(by_place(A)) for A in recording.activations])
        for gradients in recording.gradients(self._slopes(pairs, own)):
            flat = [by_place(g) for g in gradients]
            yield [w[:, None] * g.square() / nonzero(g.norm(dim=1, keepdim=True)) for w, g in zip(strengths, flat)]

    def _strength(self, A: Tensor) -> Tensor:
        """The sum over the parts (B, N) of activations (B, C, N); zero where these are not finite."""
        n = parts_of(self.n_parts, A.shape[2], A.shape[1])
        finite = A.flatten(1).isfinite().all(1)
        each = [factorised(a.mT, n).sum(1).to(A) if f else A.new_zeros(A.shape[2]) for a, f in zip(A, finite)]
        return torch.stack(each) if each else A.new_zeros(0, A.shape[2])

    def _slopes(self, pairs: Pairs, own: Tensor) -> Tensor:
        """The gradient by the embedding of the scores of these references, (B, R, D); zero where it is not finite."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "The gradient of a similarity is ruled out by torch.inference_mode(); use torch.no_grad() instead."
            )
        with torch.enable_grad():
            z = pairs.z.detach().clone().requires_grad_()
            scores = replace(pairs.question, own=own, less=None).scores(z, self)
            each = [torch.autograd.grad(score.sum(), z, retain_graph=True)[0] for score in scores.unbind(1)]
        u = torch.stack(each, 1)
        return torch.where(u.isfinite(), u, torch.zeros_like(u))
