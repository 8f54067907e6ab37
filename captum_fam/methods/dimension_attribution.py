"""The methods that weigh the dimensions of the embedding: a method is its terms."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_fam._checks import check_positive, describe, format_inputs
from captum_fam.engine.chunks import Tensors
from captum_fam.engine.path import Baseline, Path, paths
from captum_fam.engine.places import Multiples, is_aligned, multiple_of_mean, place_maps, place_terms, stays_aligned
from captum_fam.engine.question import Pairs, Question, usable_inputs
from captum_fam.engine.recording import Recording
from captum_fam.engine.report import Report
from captum_fam.engine.untouched import eagerly
from captum_fam.engine.ways import Way, by_the_cheapest_way
from captum_fam.methods.layer_attribution import LayerSimilarityAttribution
from captum_fam.methods.layer_explanation import masked
from captum_fam.methods.similarity_attribution import Inputs
from captum_fam.similarity import norm, widen

# How much of the similarity the places may miss without a warning, as a share of what its dimensions contribute.
_TOLERANCE = 0.05
# How far the length of normalised embeddings may be from one, in single or double precision.
_ROUNDED = 1e-5


class DimensionAttribution(LayerSimilarityAttribution):
    r"""
    A method that weighs the dimensions of the embedding, :math:`M_i = N f \cdot v_i` (see docs/method.md). A method is
    its :meth:`terms`, f(z, s).
    """

    _adds_up = True  # whether the mean of a map should be the score of its terms

    def __init__(
        self,
        *args: Any,
        channel_weights: Literal["auto", "aligned", "jacobian"] | str = "auto",
        n_steps: int | None = None,
        baseline: Baseline = "mean",
        **options: Any,
    ) -> None:
        if channel_weights not in ("auto", "aligned", "jacobian"):
            raise ValueError(
                f'Expected `channel_weights` to be "auto", "aligned" or "jacobian", but got {channel_weights!r}.'
            )
        if n_steps is not None:
            check_positive("n_steps", n_steps)
        if not isinstance(baseline, Tensor) and not (isinstance(baseline, str) and baseline in ("mean", "zero")):
            raise ValueError(
                f'Expected `baseline` to be "mean", "zero" or a tensor that broadcasts to the layer\'s activations, but'
                f" got {describe(baseline)}."
            )
        super().__init__(*args, **options)
        self.channel_weights = channel_weights
        self.n_steps = n_steps
        self.baseline = baseline.detach().clone() if isinstance(baseline, Tensor) else baseline

    def has_convergence_delta(self) -> bool:
        return self.n_steps is not None

    def terms(self, z: Tensor, s: Tensor) -> Tensor:
        """f(z, s) (..., D), for embeddings z and references s that broadcast; a contrast is a difference of these."""
        raise NotImplementedError

    def contributions(self, z: Tensor, t: Tensor) -> Tensor:
        return t * z

    def constant(self, s: Tensor) -> Tensor:
        """The part (K,) of the scores of references s (K, D) that no place of an input has."""
        return s.new_zeros(len(s))

    def weights(self, z: Tensor, t: Tensor, plain: bool) -> Tensor:
        """f (B, P, D) of terms t (B, P, D) and z (B, 1, D); if not ``plain``, the terms are differences."""
        return t

    @eagerly
    def route(self, inputs: Inputs, additional_forward_args: object | None = None) -> str | list[str]:
        r"""
        Which route does the map of these inputs take, with or without a gradient? Takes one forward pass.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs of the encoder, batch first.
            additional_forward_args (Any, optional): As in :meth:`attribute`.
                        Default: None

        Returns:
            *str* or *list*: ``"aligned"`` or ``"jacobian"``; a list for a list of layers.

        Raises:
            TypeError, ValueError: As in :meth:`attribute`.

        Examples::

            >>> features, head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
            >>> encoder = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
            >>> images = torch.rand(2, 3, 16, 16)
            >>> FeatureActivationMap(encoder[:3], features).route(images)
            'aligned'
            >>> FeatureActivationMap(encoder, features).route(images)
            'jacobian'
        """
        tensors, path = format_inputs("inputs", inputs), self._paths(None, False)[0]

        def found(layers: list[nn.Module], way: Way) -> tuple[list[bool], list[int]]:
            with self._record(
                tensors, additional_forward_args, Report(), way=way, path=path, layers=layers
            ) as recording:
                return self._aligned(recording), recording.sizes

        groups = [
            by_the_cheapest_way(partial(found, layers)) for layers in self._together(tensors, additional_forward_args)
        ]
        return self.routes([a for group, _ in groups for a in group], [n for _, group in groups for n in group])  # type: ignore[no-any-return]

    def routes(self, aligned: list[bool], sizes: list[int]) -> Any:
        """The route of each layer, from which of its tensors are aligned."""
        layers = self._result(aligned, sizes)
        routes = [
            "aligned" if all(layer if isinstance(layer, tuple) else [layer]) else "jacobian"
            for layer in (layers if isinstance(self.layer, list) else [layers])
        ]
        return routes if isinstance(self.layer, list) else routes[0]

    def _maps(self, pairs: Pairs, aligned: list[bool], plain: bool, summed: bool) -> list[Tensor]:
        recording = pairs.recording
        f = self.weights(pairs.z[:, None], pairs.t, plain and pairs.question.less is None)
        if not all(aligned):
            f = masked(f, f.isfinite().all(2))  # values that are not finite are not passed to the encoder
        multiples = recording.once("multiples", lambda: self._multiples(recording, aligned))
        if summed:
            maps = place_maps(recording, f, multiples, pairs.n_references)
        else:
            maps = next(place_terms(recording, f, multiples))
        if not all(aligned) and self.n_steps is None:
            for name, tensors in recording.layers():
                if self._adds_up:
                    check_sum(_means(maps[tensors], summed), pairs, name, any(recording.partial[tensors]))
                elif not all(aligned[tensors]) and self._similarity() in ("cosine", "dot"):
                    check_normalised(pairs, name)
        return maps

    def _multiples(self, recording: Recording, aligned: list[bool]) -> Multiples:
        z, path = recording.embedding, recording.path
        share = 1 if path is None or not self._needs_graph() else sum(path.weights)
        return [multiple_of_mean(z, A) * share if a else None for a, A in zip(aligned, recording.activations)]

    def _together(self, inputs: Tensors, additional_forward_args: object | None = None) -> list[list[nn.Module]]:
        layers = super()._together(inputs, additional_forward_args)
        return layers if self.n_steps is None else [[layer] for layer in layers[0]]

    def _inputs_at_once(self, internal_batch_size: int | None, delta: bool) -> int | None:
        if self.n_steps is None or internal_batch_size is None:
            return internal_batch_size
        return max(1, internal_batch_size // (1 + self.n_steps + delta))

    def _paths(self, internal_batch_size: int | None, delta: bool) -> list[Path | None]:
        if self.n_steps is None:
            return [None]
        if not self._needs_graph():
            return [Path(self.baseline, (0.0,), (0.0,)) if delta else Path(self.baseline)]
        at_once = self.n_steps + 1 if internal_batch_size is None else max(1, internal_batch_size - 1)
        return [*paths(self.baseline, self.n_steps, at_once, delta)]

    def _check_delta(self, return_convergence_delta: bool) -> None:
        if self.n_steps is None:
            super()._check_delta(return_convergence_delta)

    def _missed(self, pairs: Pairs, maps: list[Tensor], summed: bool) -> list[Tensor]:
        path, z = pairs.recording.path, pairs.z
        mean = _means(maps, summed)
        if path is None or 0.0 not in path.nodes:  # a later part of it
            return [mean]
        f = self.weights(z[:, None], pairs.t, pairs.question.less is None)
        return [mean - (f * (z - self._of_baseline(pairs.recording))[:, None]).sum(2)]

    def _of_baseline(self, recording: Recording) -> Tensor:
        """The embeddings (B, D) of the baselines, the first of the path's points."""
        z = widen(recording.on_path[0])
        if (usable_inputs(recording) & ~z.isfinite().all(1)).any():
            recording.report.warnings.append(
                "The embedding of the baseline is not finite, so what depends on it is nan; pass another `baseline`."
            )
        return z

    def _run(self, inputs: Tensors, additional_forward_args: Any) -> None:
        if self.n_steps is not None:  # many passes, for the sake of an error
            super()._run(inputs, additional_forward_args)
            return

        def ask(z: Tensor, rows: slice) -> Question:
            return Question(torch.ones_like(z[:1]), torch.zeros(1, 1, dtype=torch.long, device=z.device))

        self.explain(inputs, ask, additional_forward_args).report.texts()

    def _aligned(self, recording: Recording) -> list[bool]:
        path = recording.path
        return [
            self._is_aligned(recording.embedding, A)
            # A normalised z keeps its length on the way to a baseline, which no multiple of its mean does.
            and not (path is not None and isinstance(path.baseline, Tensor) and self._leaves_mean(recording, A, moved))
            for A, moved in zip(recording.activations, recording.moved)
        ]

    def _leaves_mean(self, recording: Recording, A: Tensor, moved: Tensor) -> bool:
        return self.channel_weights == "auto" and not stays_aligned(recording, A, moved)

    def _is_aligned(self, z: Tensor, A: Tensor) -> bool:
        if self.channel_weights == "aligned" and A.shape[1] != z.shape[1]:
            raise ValueError(
                'channel_weights="aligned" needs a channel for each embedding dimension, but the layer has'
                f' {A.shape[1]} and the embedding {z.shape[1]}; pass channel_weights="auto" or "jacobian".'
            )
        return self.channel_weights == "aligned" or (self.channel_weights == "auto" and is_aligned(z, A))

    def _needs_graph(self) -> bool:
        return self.channel_weights != "aligned"


def _means(maps: list[Tensor], summed: bool) -> Tensor:
    """The means over the places (B, P) of a layer's maps, added up."""
    return torch.stack([M.mean(2) if summed else M.sum(1).mean(1, keepdim=True) for M in maps]).sum(0)


def check_sum(found: Tensor, pairs: Pairs, layer: str, partial: bool) -> None:
    """
    Reports a layer's maps whose totals (B, P) are far from what they should add up to. ``partial``: the layer has
    tokens that are on no map.
    """
    off = (found - pairs.c.sum(2)).abs() > _TOLERANCE * pairs.c.abs().sum(2)
    if not (off & pairs.valid).any():
        return
    if _are_normalised(pairs):
        reason = "the encoder ends in a normalisation. Leave it out: the cosine is the same without it."
    elif partial:
        reason = (
            "part of the embedding reaches the class token past the patches, by the residual path. The map shows what"
            " goes through the patches of this layer: choose an earlier layer to see more."
        )
    else:
        reason = (
            "the rest comes from biases, a LayerNorm or another such step between the layer and the embedding, and no"
            " place has it. Read the map as a pattern; its mean is not the score."
        )
    pairs.recording.report.warnings.append(f"The places of layer {layer} do not add up to the similarity: {reason}")


def _are_normalised(pairs: Pairs) -> bool:
    """Whether all embeddings that can be explained have length one, as behind a normalisation."""
    usable, rounding = usable_inputs(pairs.recording), torch.finfo(pairs.recording.embedding.dtype).eps
    close = (norm(pairs.z)[:, 0] - 1).abs() < max(_ROUNDED, rounding)
    return bool((usable.any() & (close | ~usable).all()).item())  # one answer to wait for


def check_normalised(pairs: Pairs, layer: str) -> None:
    """Reports a layer behind which the embeddings are normalised: the gradient leaves out what they have in common."""
    if _are_normalised(pairs):
        pairs.recording.report.warnings.append(
            f"The encoder ends in a normalisation. Its gradient takes from the places of layer {layer} what they add"
            " to the length of the embedding, which is most of what makes it similar. Leave the normalisation out, and"
            ' compare by similarity="cosine", which is the same without it.'
        )
