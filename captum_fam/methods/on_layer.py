"""What all methods share whose map lies on a layer."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from captum_fam._checks import check_callable, check_hookable, describe
from captum_fam.engine.chunks import Tensors
from captum_fam.engine.forward import record
from captum_fam.engine.path import Path
from captum_fam.engine.recording import Encoder, Recording
from captum_fam.engine.report import Report
from captum_fam.engine.ways import Way
from captum_fam.methods.similarity_attribution import Selector, SimilarityAttribution, uncompiled
from captum_fam.similarity import Similarity

T = TypeVar("T")


class OnLayer(SimilarityAttribution):
    """A method whose map lies on a layer, or on each of several."""

    _finds_layer = False  # whether the layer may be left out

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module] | None,
        device_ids: list[int] | None = None,
        *,
        similarity: Similarity | None = None,
        output_selector: Selector = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if layer is not None or not self._finds_layer:
            _check_layer(layer)
        if reshape_transform is not None:
            check_callable("reshape_transform", reshape_transform)
        super().__init__(forward_func, layer, device_ids, similarity=similarity, output_selector=output_selector)
        check_hookable("forward_func", self._behind())
        self.reshape_transform = reshape_transform
        self._confirmed: set[object] = set()

    def _layers(self, inputs: Tensors, additional_forward_args: object | None) -> list[nn.Module]:
        """The layers that explain these inputs."""
        _check_layer(self.layer)
        return self.layer if isinstance(self.layer, list) else [self.layer]

    def _behind(self) -> Any:
        """The encoder, without what is wrapped around it."""
        score, func = self._score(), uncompiled(self.forward_func)
        func = uncompiled(score.encoder) if score is not None else func
        return func.module if isinstance(func, nn.DataParallel) else func

    def _run(self, inputs: Tensors, additional_forward_args: Any) -> None:
        with self._record(inputs, additional_forward_args, Report()):
            pass

    def _needs_graph(self) -> bool:
        """Whether the maps may need the gradient of the embedding with respect to the layer."""
        return False

    def _record(
        self,
        inputs: Tensors,
        additional_forward_args: object | None,
        report: Report,
        layer_input: bool = False,
        way: Way | None = None,
        path: Path | None = None,
        layers: list[nn.Module] | None = None,
    ) -> AbstractContextManager[Recording]:
        return record(
            Encoder(self._encoder(), self._selector(), self.reshape_transform, self.device_ids, self._confirmed),
            self._layers(inputs, additional_forward_args) if layers is None else layers,
            inputs,
            additional_forward_args,
            report,
            layer_input=layer_input,
            graph=self._needs_graph() and not torch.is_inference_mode_enabled(),
            way=way,
            path=path,
        )

    def _result(self, tensors: list[T], sizes: list[int]) -> Any:
        """The results of all tensors in Captum's form: a tuple for a layer of several, a list for a list of layers."""
        rest = iter(tensors)
        layers = [tuple(next(rest) for _ in range(size)) for size in sizes]
        results = [layer if len(layer) > 1 else layer[0] for layer in layers]
        return results if isinstance(self.layer, list) else results[0]


def _check_layer(layer: object) -> None:
    layers = layer if isinstance(layer, list) else [layer]
    for m in layers:
        check_hookable("layer", m)
    if not layers or not all(isinstance(m, nn.Module) for m in layers):
        hint = "; pass model.get_submodule(name)" if any(isinstance(m, str) for m in layers) else ""
        if layer is None:
            hint = "; pass the last one with a map, or take IntegratedDecomposition, which finds one"
        got = f"a list of {[type(m).__name__ for m in layers]}" if isinstance(layer, list) else describe(layer)
        raise TypeError(f"Expected `layer` to be a module or a list of modules, but got {got}{hint}.")
