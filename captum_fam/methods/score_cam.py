"""Score-CAM on a similarity, as a Captum layer attribution."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_fam._checks import check_positive
from captum_fam.adapters import resize
from captum_fam.engine.question import Pairs
from captum_fam.engine.recording import Recording
from captum_fam.methods.channel_attribution import ChannelAttribution
from captum_fam.methods.similarity_attribution import Selector
from captum_fam.similarity import Similarity, nonzero, widen


class ScoreCam(ChannelAttribution):
    r"""
    Where are the channels that keep the similarity when only they are seen? Score-CAM (Wang et al.,
    https://arxiv.org/abs/1910.01279) on a similarity. The weight of a channel is how much of its
    score the input keeps when it is seen through that channel's map,

    .. math:: M = \sum_k \alpha_k A_k, \quad \alpha_k = f(X \circ H_k) - f(0), \quad
              H_k = \frac{up(A_k) - \min A_k}{\max A_k - \min A_k}

    with the score f of the input X, and up(A_k) the map of channel k at the input's size (linear
    interpolation). That is the paper's channel-wise increase of confidence, with an input of zeros
    as the baseline. Two steps of the paper are left out: the softmax over channels of its algorithm
    1, which is nearly constant on similarities between -1 and 1; and the ReLU, unless you ask for
    it. Channels with a constant map have weight 0.

    It needs no gradient. Each input takes C + 2 forward passes, which all references share: one
    records the layer, and one is the baseline.
    To explain a classifier, pass ``SimilarityScore(model, torch.eye(n), "dot")``.

    Args:
        forward_func (Callable or torch.nn.Module): The encoder, from inputs to embeddings
                    (B, D), or a :class:`~captum_fam.SimilarityScore`.
        layer (torch.nn.Module or list of torch.nn.Module): Layer whose activations
                    (B, C, \*spatial) make the map, with as many spatial dimensions as the
                    input; or a list of layers.
        device_ids (list[int]): Device ID list, necessary only if forward_func applies a
                    DataParallel model, as for other Captum layer methods.
                    Default: None
        similarity, output_selector, reshape_transform (optional): As in
                    :class:`~captum_fam.FeatureActivationMap`.
                    Default: None
        perturbations_per_eval (int): How many masked inputs go through the encoder at a time.
                    Default: 32
        show_progress (bool): Shows a progress bar.
                    Default: False

    Raises:
        TypeError, ValueError: an argument is not as described above, or, in ``attribute``, the
                    input is not one tensor (B, C, \*spatial).

    Examples::

        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> score = SimilarityScore(encoder, torch.rand(5, 8))
        >>> ScoreCam(score, encoder[1]).attribute(torch.rand(2, 3, 16, 16), target=3).shape
        torch.Size([2, 1, 14, 14])
    """

    _of_terms = False

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None = None,
        *,
        similarity: Similarity | None = None,
        output_selector: Selector = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        perturbations_per_eval: int = 32,
        show_progress: bool = False,
    ) -> None:
        super().__init__(
            forward_func,
            layer,
            device_ids,
            similarity=similarity,
            output_selector=output_selector,
            reshape_transform=reshape_transform,
        )
        check_positive("perturbations_per_eval", perturbations_per_eval)
        self.perturbations_per_eval = perturbations_per_eval
        self.show_progress = show_progress

    def alpha(self, pairs: Pairs) -> list[Tensor]:
        recording, B = pairs.recording, len(pairs.z)
        unmasked, masked = recording.once(ScoreCam, lambda: self._embeddings(recording))

        def scores(name: object, z: Tensor, rows: Tensor) -> Tensor:
            def once(what: object, compute: Callable[[], Tensor]) -> Tensor:
                return recording.once((what, name), compute)

            return self._scores(z, rows, pairs.question, recording.report.warnings, once)

        def weights(name: object, z: Tensor, C: int) -> Tensor:
            n = self.perturbations_per_eval
            parts = zip(z.split(n), (torch.arange(B * C, device=z.device) // C).split(n))
            found = torch.cat([scores((name, i), *part) for i, part in enumerate(parts)])
            alpha: Tensor = found.unflatten(0, (B, C)).mT
            return alpha

        baseline = scores("unmasked", unmasked, torch.arange(B, device=unmasked.device))
        return [
            weights(i, z, A.shape[1]) - baseline[..., None]
            for i, (z, A) in enumerate(zip(masked, recording.activations))
        ]

    def _embeddings(self, recording: Recording) -> tuple[Tensor, list[Tensor]]:
        """
        Embeddings (B, D) of inputs of zeros, and for each of the activations those (B C, D) of the inputs seen through
        its channels.
        """
        tensors = recording.activations
        x = self._image(recording.inputs, tensors)
        B, rows, args = len(x), torch.arange(len(x), device=x.device), recording.additional_forward_args
        unmasked = self._embed_changed(torch.zeros_like(x), rows, B, args)
        total = sum(B * A.shape[1] for A in tensors)
        with tqdm(total=total, desc="ScoreCam", unit="pass", leave=None, disable=not self.show_progress) as progress:

            def masked(A: Tensor) -> Tensor:
                C = A.shape[1]
                found = []
                for index in torch.arange(B * C, device=x.device).split(self.perturbations_per_eval):
                    rows = index // C
                    maps = widen(A[rows, index % C])[:, None]
                    low, high = maps.flatten(1).amin(1), maps.flatten(1).amax(1)
                    low, span = (v.reshape(-1, *[1] * (maps.ndim - 1)) for v in (low, high - low))
                    # A DataParallel model may be given inputs in the memory of the CPU.
                    H = resize((maps - low) / nonzero(span), x.shape[2:]).to(x.device)
                    found.append(self._embed_changed((x[rows] * H).to(x.dtype), rows, B, args))
                    progress.update(len(index))
                return torch.cat(found)

            return unmasked, [masked(A) for A in tensors]

    def _image(self, inputs: tuple[Tensor, ...], maps: list[Tensor]) -> Tensor:
        shapes = [tuple(A.shape) for A in maps if A.ndim != inputs[0].ndim]
        if len(inputs) != 1 or inputs[0].ndim < 3 or shapes:
            raise ValueError(
                "ScoreCam scales the layer's maps to the input, so it needs one input (B, C, *spatial) and activations"
                f" with as many dimensions, but got inputs of shapes {[tuple(t.shape) for t in inputs]}"
                + (f" and activations of shape {shapes[0]}; pass a reshape_transform." if shapes else ".")
            )
        return inputs[0]
