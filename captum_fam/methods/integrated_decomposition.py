"""The integrated decomposition of a similarity at a layer that it finds by itself."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from captum_fam._checks import format_inputs
from captum_fam.engine.chunks import Tensors
from captum_fam.engine.layers import early_map
from captum_fam.engine.path import Baseline
from captum_fam.engine.untouched import model_of
from captum_fam.methods.similarity_attribution import Inputs, Selector, uncompiled
from captum_fam.methods.similarity_decomposition import SimilarityDecomposition
from captum_fam.similarity import Similarity


class IntegratedDecomposition(SimilarityDecomposition):
    r"""
    What is the score made of, for any encoder? This is :class:`~captum_fam.SimilarityDecomposition` with ``n_steps=8``,
    at an early layer that it finds by itself. In our measurements (``benchmarks/integrated.md``), its maps were the
    most faithful of all that take a few passes.

    The layer is the end of a stage with at least 14 by 14 places, or, in a vision transformer, the patches before its
    first block; :meth:`layer_of` names it. To find it, each call takes one more forward and backward pass of one
    example; pass ``layer`` to save that.

    Args:
        forward_func (Callable or torch.nn.Module): The encoder, from inputs to embeddings
                    (B, D), or a :class:`~captum_fam.SimilarityScore`.
        layer (torch.nn.Module or list of torch.nn.Module, optional): As in
                    :class:`~captum_fam.SimilarityDecomposition`.
                    Default: None, found for the inputs of each call
        device_ids, similarity, output_selector, reshape_transform (optional): As in
                    :class:`~captum_fam.SimilarityDecomposition`.
                    Default: None
        n_steps (int), baseline (str or Tensor): As in :class:`~captum_fam.FeatureActivationMap`.
                    Default: 8 and ``"mean"``

    Raises:
        TypeError, ValueError: an argument is not as described above, or, in ``attribute``, no layer of the
                    encoder gives a map.

    Examples::

        >>> features = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.SiLU(), nn.Conv2d(8, 8, 3, 2), nn.SiLU())
        >>> encoder = nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> made_of = IntegratedDecomposition(encoder)
        >>> images, reference = torch.rand(2, 3, 32, 32), torch.rand(1, 3, 32, 32)
        >>> made_of.attribute(images, reference=reference).shape, made_of.layer_of(images)
        (torch.Size([2, 1, 15, 15]), '1')
    """

    _finds_layer = True

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module] | None = None,
        device_ids: list[int] | None = None,
        *,
        similarity: Similarity | None = None,
        n_steps: int = 8,
        baseline: Baseline = "mean",
        output_selector: Selector = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(
            forward_func,
            layer,  # type: ignore[arg-type]  # None is for this class alone
            device_ids,
            similarity=similarity,
            n_steps=n_steps,
            baseline=baseline,
            output_selector=output_selector,
            reshape_transform=reshape_transform,
        )

    def layer_of(self, inputs: Inputs, additional_forward_args: object | None = None) -> str:
        r"""
        Which layer does it find for these inputs?

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs of the encoder, batch first.
            additional_forward_args (Any, optional): As in :meth:`attribute`.
                        Default: None

        Returns:
            *str*: the dotted name of the layer.

        Raises:
            ValueError: no layer of the encoder gives a map.
        """
        inputs = format_inputs("inputs", inputs)
        name = early_map(self._encoder(), inputs, additional_forward_args, self._selector())
        if name is None:
            raise ValueError(
                "No layer of the encoder was found to give a map (B, C, *spatial), or tokens of patches, on which the"
                " embedding depends; pass one as `layer`."
            )
        return name.removeprefix("module.") if self._is_split_here() else name

    def _is_split_here(self) -> bool:
        """Whether the encoder's DataParallel was made here, because the user's own holds a score."""
        score, encoder = self._score(), self._encoder()
        return score is not None and isinstance(encoder, nn.DataParallel) and encoder is not uncompiled(score.encoder)

    def _layers(self, inputs: Tensors, additional_forward_args: object | None) -> list[nn.Module]:
        if self.layer is not None:
            return super()._layers(inputs, additional_forward_args)
        name, model = self.layer_of(inputs, additional_forward_args), model_of(self._encoder())
        assert model is not None  # or no layer had a name
        name = f"module.{name}" if self._is_split_here() else name
        return [model.get_submodule(name)]
