"""Relevance-CAM on a similarity, as a Captum layer attribution."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from captum.attr import LRP
from torch import Tensor, nn

from captum_fam import _captum
from captum_fam._checks import describe
from captum_fam.engine.places import unit_vectors
from captum_fam.engine.question import Pairs
from captum_fam.engine.recording import Recording
from captum_fam.engine.untouched import embed, model_of
from captum_fam.methods.channel_attribution import ChannelAttribution
from captum_fam.methods.similarity_attribution import Selector
from captum_fam.score import select_embedding
from captum_fam.similarity import exact, widen

# Modules that Captum's LRP has no rule for, and those of its rules that fit them.
_RULES: dict[type[nn.Module], Callable[[], Any]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm3d), _captum.EpsilonRule),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool3d), _captum.EpsilonRule),
    **dict.fromkeys((nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish), _captum.IdentityRule),
}
# Relevance goes through these as a gradient does.
_RESHAPING = (nn.Flatten, nn.Unflatten, nn.Identity)
# Functional steps through which relevance goes as a gradient does, by the names of their gradients: reordering, and ...
# fmt: off
_REORDERING = (
    "View", "UnsafeView", "_ReshapeAlias", "_UnsafeView", "Squeeze", "Unsqueeze", "AsStrided", "Alias", "Transpose",
    "Permute", "T", "Clone", "ToCopy", "Flip", "Slice", "Select", "Index", "IndexSelect", "Cat", "Stack", "Split",
    "SplitWithSizes", "Unbind", "Relu", "BackwardHookFunction",
)
# fmt: on
# ... pooling, which shares relevance evenly, not by activation: the channels' sums are right, what comes before is not.
_POOLING = ("Mean", "AdaptiveAvgPool1D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "AvgPool2D", "AvgPool3D", "Amax")


class RelevanceCam(ChannelAttribution):
    r"""
    Where are the channels that the similarity goes back to? Relevance-CAM (Lee, Kim, Park, Jeong,
    CVPR 2021) on a similarity, with Captum's layer-wise relevance propagation (LRP). The weight of
    a channel is its relevance,

    .. math:: M = \sum_k \alpha_k A_k, \quad \alpha_k = \sum_{locations} R_k

    LRP starts at the embedding, with the contributions to the score, :math:`R(z) = c`, which add up
    to it (see :func:`~captum_fam.channel_contributions`). R is what reaches the layer's activations
    A. Captum's own LRP of a similarity would start from its gradient.

    The rules are Captum's, by default its epsilon rule. For another one, set ``module.rule``:
    ``Alpha1_Beta0_Rule`` from ``captum.attr._utils.lrp_rules`` is close to the paper's. Rules that
    you set stay set, unlike after Captum's ``LRP``. During the call, some modules that Captum has
    no rule for get one: 1D and 3D convolution, pooling and batch norm the epsilon rule; ReLU6,
    LeakyReLU, ELU, GELU, SiLU and Hardswish pass relevance on unchanged.

    The paper starts from the logit of the target minus a share of it for every other class.
    ``contrast="rest"`` is close to that: it subtracts the mean of the other classes' logits. To
    explain a classifier, pass ``SimilarityScore(model, torch.eye(n), "dot")``.

    LRP needs a rule for each module after the layer. Between these modules, only reshaping, joining
    and a ReLU may happen, and directly after the layer a spatial mean. Anything else is an error,
    such as the sum in the ``forward`` of a residual block, a final normalisation or attention. So
    the method explains plain networks at any layer, and most others at the last stage. Each
    reference takes two forward passes and one backward pass. The call changes weights of these
    modules and puts them back: do not run the model from another thread meanwhile.

    Args:
        forward_func (torch.nn.Module): The encoder, from inputs to embeddings (B, D), or
                    a :class:`~captum_fam.SimilarityScore`.
        layer (torch.nn.Module or list of torch.nn.Module): Layer whose activations
                    (B, C, \*spatial), one tensor, make the map; or a list of layers.
        device_ids (list[int]): As for other Captum layer methods; a DataParallel model is run
                    on its first device, where the inputs must be.
                    Default: None
        similarity, output_selector, reshape_transform (optional): As in
                    :class:`~captum_fam.FeatureActivationMap`.
                    Default: None

    Raises:
        TypeError, ValueError: an argument is not as described above, or, in ``attribute``, LRP
                    cannot follow the encoder.

    Examples::

        >>> pool, head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 6)
        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), pool, nn.Flatten(), head)
        >>> score = SimilarityScore(encoder, torch.rand(5, 6))
        >>> RelevanceCam(score, encoder[1]).attribute(torch.rand(2, 3, 16, 16), target=3).shape
        torch.Size([2, 1, 14, 14])
    """

    def _encoder(self) -> Callable[..., Any]:
        encoder = super()._encoder()
        return encoder.module if isinstance(encoder, nn.DataParallel) else encoder

    def alpha(self, pairs: Pairs) -> list[Tensor]:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "LRP needs a gradient, which torch.inference_mode() rules out; use torch.no_grad() instead."
            )
        if not all(t.is_floating_point() for t in pairs.recording.inputs):
            raise TypeError("RelevanceCam needs floating-point inputs, as LRP takes gradients; pass inputs.float().")
        layers = self.layer if isinstance(self.layer, list) else [self.layer]
        recording, encoder, found = pairs.recording, self._encoder(), []
        if not len(pairs.c):  # LRP cannot run on nothing
            return [A.new_zeros(*pairs.valid.shape, A.shape[1]) for A in recording.activations]
        for name, size in zip(recording.names, recording.sizes):
            if size > 1:
                raise ValueError(f"RelevanceCam needs a layer with one tensor, but {name} has {size}.")
        for layer, name in zip(layers, recording.names):
            after = recording.once(
                (_called_after, layer), partial(_called_after, layer, name, encoder, self._selector(), recording)
            )
            model = _Scored(encoder, self._selector(), after)

            def of(starts: Tensor, layer: nn.Module = layer, name: str = name, model: _Scored = model) -> Tensor:
                relevances = [model.relevance(layer, name, start, recording) for start in starts.unbind(1)]
                return torch.stack([widen(recording.reshape(R)).flatten(2).sum(2) for R in relevances], 1)

            if pairs.n_references <= pairs.c.shape[2]:
                alpha = of(pairs.c)
            else:
                # Relevance is linear in its start: for more references than dimensions, unit vectors are enough.
                each = recording.once((LRP, layer), partial(of, unit_vectors(pairs.z)))
                with exact(each):
                    alpha = pairs.c @ each
            finite = alpha.isfinite().all(2, keepdim=True)
            if not (finite[..., 0] | ~pairs.valid).all():
                recording.report.warnings.append(
                    f"Relevances of layer {name} are not finite: the maps that depend on them are zero."
                )
            found.append(torch.where(finite, alpha, torch.zeros_like(alpha)))
        return found


class _Scored(nn.Module):
    """
    An encoder as the model that Captum's LRP takes: its children are the modules that an
    embedding's relevance goes through on its way back to the layer.
    """

    def __init__(self, encoder: Callable[..., Any], selector: Selector, modules: list[nn.Module]) -> None:
        super().__init__()
        if model_of(encoder) is None:
            raise TypeError(f"RelevanceCam needs an encoder that is a torch.nn.Module, but got {describe(encoder)}.")
        self._encoder = [encoder]  # in a list, it is no child: LRP asks for a rule for every one
        self._selector = selector
        for i, module in enumerate(modules):
            self.add_module(str(i), module)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """Nothing: LRP would copy weights back in place, which breaks graphs that wait for backward. See _rules."""
        return {}

    def load_state_dict(self, *_: Any, **__: Any) -> None:
        """Does nothing, as state_dict."""

    def forward(self, *args: Any) -> Tensor:
        """Ones (B,); their gradient by the embedding is the relevance that LRP starts with."""
        inputs_of: dict[Any, list[Any]] = {}
        taken: dict[nn.Module, list[Any]] = {}

        def before(module: nn.Module, values: Any) -> None:
            taken[module] = [v.grad_fn for v in values if isinstance(v, Tensor)]

        def after(module: nn.Module, _: Any, output: Any) -> None:
            sources, last = taken.pop(module), getattr(output, "grad_fn", None)
            if last not in sources:  # as of a dropout that does nothing
                inputs_of[last] = sources

        with ExitStack() as stack:
            for module in self.children():
                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(after).remove)
            z = select_embedding(self._encoder[0](*args), self._selector)
        steps = _functional_steps(z.grad_fn, self._stop, inputs_of)
        if steps:
            raise ValueError(
                f"LRP cannot follow the steps {', '.join(steps)} of a forward function after layer {self._name}; choose"
                " a later layer, or make them modules that have a rule: sums, Captum's Addition_Module. Leave a final"
                " normalisation out: the cosine is the same without it."
            )
        return 1 + ((z - z.detach()) * self._start.to(z)).sum(1)

    def relevance(self, layer: nn.Module, name: str, start: Tensor, recording: Recording) -> Tensor:
        """R of the layer's activations, for the relevance (B, D) that the embedding starts with."""
        self._start, self._name, self._stop = start, name, set[Any]()
        found: list[Tensor] = []  # of each call of the layer

        def hook(_: nn.Module, value: Any, output: Any = None) -> Any:
            activation = value[0] if recording.layer_input else output
            if not isinstance(activation, Tensor):
                raise TypeError(f"RelevanceCam needs a layer with one tensor, but {name} has {describe(activation)}.")
            call = len(found)
            found.append(torch.zeros_like(activation))
            if activation.requires_grad:
                self._stop.add(activation.grad_fn)
                activation.register_hook(lambda gradient: found.__setitem__(call, gradient.detach()))
            changed = activation.clone()
            return (changed, *value[1:]) if recording.layer_input else changed

        register = layer.register_forward_pre_hook if recording.layer_input else layer.register_forward_hook
        inputs = tuple(t.detach().clone().requires_grad_(t.is_floating_point()) for t in recording.inputs)
        with ExitStack() as stack:
            stack.callback(register(hook).remove)
            stack.enter_context(_rules(self.children()))
            try:
                LRP(self).attribute(inputs, additional_forward_args=recording.additional_forward_args)
            except TypeError as error:
                if "rule" not in str(error):  # of Captum, for a module without one
                    raise
                raise ValueError(
                    f"LRP has no rule for a module after layer {name} ({' '.join(str(error).split())}). Choose a later"
                    " layer, set its `rule`, or explain with SimilarityDecomposition, which needs none."
                ) from error
            except RuntimeError as error:
                raise ValueError(
                    f"LRP cannot follow the encoder after layer {name} ({' '.join(str(error).split())}). It needs"
                    " modules that are called once, and no cut of the gradient (detach, torch.no_grad) after the layer."
                ) from error
        return found[-1]


def _called_after(
    layer: nn.Module, name: str, encoder: Callable[..., Any], selector: Selector, recording: Recording
) -> list[nn.Module]:
    """The modules without children that are called after the layer has given its output, or taken its input."""
    model, called = model_of(encoder), Counter[nn.Module]()
    with ExitStack() as stack:
        start = layer.register_forward_pre_hook if recording.layer_input else layer.register_forward_hook
        stack.callback(start(lambda *_: called.clear()).remove)
        for module in model.modules() if model is not None else ():
            if not any(module.children()) and not isinstance(module, _RESHAPING):
                stack.callback(module.register_forward_pre_hook(lambda m, _: called.update([m])).remove)
        embed(encoder, "inputs", recording.inputs, recording.additional_forward_args, selector)
    for module, calls in called.items():
        if calls > 1 and type(module) not in _captum.SUPPORTED_NON_LINEAR_LAYERS:
            raise ValueError(
                f"LRP cannot follow {type(module).__name__}, which is called {calls} times after layer {name}; choose a"
                " later layer, or make each call a module of its own."
            )
    return list(called)


@contextmanager
def _rules(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Gives rules to the modules that have none, and at the end undoes what LRP changed."""
    names, modules = ["rule", "activations", "inplace"], list(modules)
    saved = [(m, {name: vars(m)[name] for name in names if name in vars(m)}) for m in modules]
    weights = [(p, p.data) for m in modules for p in m.parameters(recurse=False)]
    try:
        for module, attributes in saved:
            if "inplace" in attributes:  # a rule needs what the module took
                vars(module)["inplace"] = False
            if "rule" not in attributes and type(module) in _RULES:
                module.rule = _RULES[type(module)]()
        yield
    finally:
        for module, attributes in saved:
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(attributes)
        for parameter, data in weights:
            parameter.data = data


def _functional_steps(last: Any, stop: set[Any], inputs_of: dict[Any, list[Any]]) -> list[str]:
    """
    The steps between the layer (``stop``) and the embedding (``last``), outside modules, that
    relevance cannot take as a gradient does; ``inputs_of`` leads from a module's last step to
    what it takes.
    """
    # Of each step: whether the layer is before it, directly or through modules.
    depends: dict[Any, str] = dict.fromkeys(stop, "directly")
    entered: set[Any] = set()
    found: dict[str, None] = {}
    waiting = [last]
    while waiting:
        step = waiting[-1]
        if step in depends or step is None:
            waiting.pop()
            continue
        sources = [s for s in inputs_of.get(step, [s for s, _ in step.next_functions]) if s is not None]
        unknown = [s for s in sources if s not in depends and s not in entered]
        entered.add(step)
        if unknown:
            waiting += unknown
            continue
        waiting.pop()
        reached = {depends.get(s, "") for s in sources} - {""}
        through = step in inputs_of or "through modules" in reached
        depends[step] = "" if not reached else "through modules" if through else "directly"
        name = step.name().rstrip("0123456789").removesuffix("Backward")
        if reached and step not in inputs_of and name not in _REORDERING and (name not in _POOLING or through):
            found[name] = None
    return list(found)
