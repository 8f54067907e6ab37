"""What does an explanation cost, in plain forward passes? Time and memory, beside Grad-CAM of three libraries.

    python -m benchmarks.cost [--device cuda] [--smoke]

Needs timm, torchcam and grad-cam. Results go to ``benchmarks/cost``: README.md (TEXT, below, says how it is measured)
and results.csv.
"""

import csv
import ctypes
import gc
import inspect
import os
import platform
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytorch_grad_cam
import timm
import torch
import torch.nn.functional as F
import torchcam.methods
import torchvision
from captum.attr import LayerGradCam
from pytorch_grad_cam.utils.image import scale_cam_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

from benchmarks.report import table
from captum_fam import FeatureActivationMap, SimilarityScore

FOLDER, RESULTS = Path(__file__).with_name("cost"), "results.csv"
MB = 1e6
PATIENCE, FEW = 2.0, 8  # a call that would take longer, in seconds, is run for so few references and extrapolated
CHUNK = 16  # copies of the features in a batch, by hand
CALLS = (1, 2, 5)
# The most that a call may take for so many references, and its added peak for one, in plain forward passes.
GOALS: dict[str, tuple[dict[int, float], float]] = {
    "aligned": ({1: 1.05, 1000: 1.30}, 1.10),
    "jacobian, behind the mean": ({1: 1.10, 64: 1.20, 1000: 1.30}, 1.25),
    "jacobian, last stage": ({1: 1.15, 64: 3.0, 1000: 12.0}, 1.25),
}
ATTENTION = {  # torch counts those of GPUs
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}
KNOWN = 64 * 2**20  # bytes
# Freed memory goes back to the system at once, so that the high-water mark shows what was in use.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

PLAIN, OURS, CAPTUM, CHECK = "plain forward", "captum_fam", "LayerGradCam", "known allocation"
TIME, SECONDS, OVER = "time / plain forward", "seconds", "time / {}"
OPERATIONS = "operations / plain forward"
PEAK, GROWTH = "added peak in MB", "growth after {} calls in MB"
BESIDE, EACH = "added peak beside the result in MB", "ms for each map"

TEXT = """# What does an explanation cost?

Made on {date} by `{command}`: {machine}, {cores} cores, {threads} threads, {system}; Python {python}, {packages}.

All costs are multiples of a plain forward pass without gradients, which is 1.

- **Time** is the median of the ratios to the plain forward pass of the same round, with [quartiles]. All methods run
  in each round, in a new order. "≈" marks values that are extrapolated from {half} and {few} references along a line.
- **Added peak** of {memory}: the median over new processes, with [quartiles]. Code and kernels that are loaded once
  were loaded before. As a check, an allocation of {known:.1f} MB was measured as {check} MB.
- **Growth** is the memory that stays in use after 1, 2 and 5 calls whose maps are dropped.
- **Weights** are random: time and memory do not depend on them.

All methods explain the same cosines to the same embeddings of references. We use FAM, the other libraries use
Grad-CAM. Grad-CAM was checked to be the same in all three libraries, apart from ReLU, scale and size.

Each library is measured twice: as its documentation shows, and "by hand". By hand means the cheapest way that we know
with its public parts. A user freezes all parameters but the last before the layer, so that autograd records nothing
before it. In addition:

- LayerGradCam: the user cuts the encoder at the layer (or before its block), runs the first part once, and runs the
  second part on batches of {chunk} copies of the features, one for each reference. The encoder must be one that can
  be cut.
- torchcam: the user keeps the graph of one forward pass for all references (`retain_graph=True`, `normalized=False`).
- pytorch-grad-cam: the user does the same with `activations_and_grads` and `get_cam_image`, without enlarging the
  maps.

Grad-CAM computes all cosines as one product of matrices. For many references, this is cheaper to differentiate than
`SimilarityScore`. LayerGradCam cannot turn a transformer's patches into maps, so the encoder does that itself, for
all methods.

## Goals

{goals}

## Time and operations

Operations are those of linear layers, convolutions and attentions, as `torch.utils.flop_counter` counts them.

- For n references, all methods take n backward passes from the embedding to the layer. Only the aligned route of FAM
  takes none.
- FAM takes at most as many backward passes as the embedding has dimensions. Behind the mean of a layer's places, it
  passes only through the head.
- In a transformer's last block, a backward pass goes through all tokens, although a class token needs only one row of
  the attention. torch does not know which rows are zero.

{operations}

## Where a peer is as good

Here, a peer's median time or memory is at most our upper quartile. The numbers in brackets are its median over ours.

{peers}

## All figures

{tables}

## Large galleries and batches

`attribute_all` of one image, and `attribute` of several (ResNet-50, `layer4`, aligned): all at once, and in parts.

{parts}
"""

Call = Callable[[int], Any]  # explains the first n references


@dataclass(frozen=True)
class Settings:
    rounds: int = 7  # at most
    seconds: float = 8.0  # for a series, but at least three rounds
    references: tuple[int, ...] = (1, 64, 1000)
    galleries: tuple[int, ...] = (1000, 10_000, 100_000)
    whole: int = 100_000  # references at once, at most, without internal_batch_size
    batches: tuple[int, ...] = (8, 32, 64)
    repeats: int = 1  # processes for each figure of memory of one image


@dataclass(frozen=True)
class Case:
    """An encoder, the layer that is explained, and the images in a batch."""

    encoder: str
    layer: str
    route: str
    batch: int = 1
    size: int = 224

    def __str__(self) -> str:
        return f"{self.encoder}, `{self.layer}` ({self.route}), batch {self.batch}"


CASES = (
    Case("ResNet-50", "layer4", "aligned"),
    Case("ResNet-50 with head", "layer4", "jacobian, behind the mean"),
    Case("ResNet-50 with head", "layer1", "jacobian, early stage"),
    Case("ViT-S", "blocks.11.norm1", "jacobian, last stage"),
    Case("ViT-S", "blocks.2", "jacobian, early stage"),
)


@dataclass(frozen=True)
class Figure:
    """A median with its quartiles."""

    median: float
    low: float
    high: float
    n: int
    extrapolated: bool = False

    @classmethod
    def of(cls, values: list[float], extrapolated: bool = False) -> "Figure":
        low, median, high = np.percentile(values, [25, 50, 75]).tolist()
        return cls(median, low, high, len(values), extrapolated)

    def over(self, other: float) -> "Figure":
        return replace(self, median=self.median / other, low=self.low / other, high=self.high / other)

    def __str__(self) -> str:
        return f"{'≈ ' * self.extrapolated}{number(self.median)} [{number(self.low)}, {number(self.high)}]"


Results = dict[tuple[Case, int, str, str], Figure]  # by case, references, method, quantity


class Patches(nn.Module):
    """Lays a transformer's patches out as maps and back, because LayerGradCam takes no reshape_transform."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        side = round((tokens.shape[1] - 1) ** 0.5)
        maps = self.maps(tokens[:, 1:].mT.reshape(len(tokens), -1, side, side))
        return torch.cat([tokens[:, :1], maps.flatten(2).mT], 1)


class ClassToken(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


class Cosine(nn.Module):
    """Grad-CAM's score. It equals SimilarityScore's, but is one product of matrices: cheaper to differentiate."""

    def __init__(self, encoder: nn.Module, s: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("s", F.normalize(s))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.encoder(x)) @ self.s.T


@dataclass(frozen=True)
class Problem:
    """
    Attributes:
        stem, tail: the encoder in two parts, because LayerGradCam can share the first among references by hand.
        layer, tail_layer: the explained one, in the encoder and where the tail runs alone.
        last: the last parameter on the way to the layer's output.
        s: references (K, D).
    """

    stem: nn.Sequential
    tail: nn.Sequential
    layer: nn.Module
    tail_layer: nn.Module
    last: nn.Parameter
    x: Tensor
    s: Tensor

    @property
    def encoder(self) -> nn.Module:
        return self.stem + self.tail  # flat, else what goes from one to the other is held on to

    @property
    def score(self) -> nn.Module:
        return Cosine(self.encoder, self.s)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No parameter needs a gradient but the last before the layer, so that nothing before it is recorded."""
        for p in self.encoder.parameters():
            p.requires_grad_(p is self.last)
        yield
        self.encoder.requires_grad_(True)


def projection_head() -> nn.Module:
    """As contrastive encoders have it."""
    return nn.Sequential(nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 128))


def pose(case: Case, references: int, device: str) -> Problem:
    torch.manual_seed(0)
    if case.encoder == "ViT-S":
        number, create = int(case.layer.split(".")[1]), partial(timm.create_model, "vit_small_patch16_224")
        before = create(num_classes=0, img_size=case.size, depth=number, global_pool="")  # the blocks before
        before.norm = nn.Identity()
        stem, vit, patches = nn.Sequential(before), create(num_classes=0, img_size=case.size), Patches()
        block = vit.blocks[number]
        explained = block.norm1 if case.layer.endswith("norm1") else block
        if explained is block:
            block = nn.Sequential(block, patches)
        else:
            block.norm1 = nn.Sequential(explained, patches)
        tail = nn.Sequential(block, *vit.blocks[number + 1 :], vit.norm, ClassToken())
        layer = tail_layer = patches.maps
    else:
        net = torchvision.models.resnet50(weights=None)
        net.fc = projection_head() if "head" in case.encoder else nn.Identity()
        parts, cut = [*net.children()], [name for name, _ in net.named_children()].index(case.layer) + 1
        explained = layer = parts[cut - 1]
        tail_layer = nn.Identity()
        stem, tail = nn.Sequential(*parts[:cut]), nn.Sequential(tail_layer, *parts[cut:-1], nn.Flatten(), parts[-1])
    nn.ModuleList([stem, tail]).eval().to(device)
    x = torch.randn(case.batch, 3, case.size, case.size, device=device)
    with torch.no_grad():
        z = tail(stem(x[:1]))
        s = z + z.std() * torch.randn(references, z.shape[1], device=device)  # neither the same nor unlike
    return Problem(stem, tail, layer, tail_layer, [*explained.parameters()][-1], x, s)


@contextmanager
def forward(p: Problem) -> Iterator[Call]:
    encoder = p.encoder
    with torch.no_grad():
        yield lambda n: encoder(p.x)


@contextmanager
def fam(p: Problem, internal_batch_size: int | None = None) -> Iterator[Call]:
    options = {} if internal_batch_size is None else {"internal_batch_size": internal_batch_size}
    one = FeatureActivationMap(SimilarityScore(p.encoder, p.s), p.layer)
    several = FeatureActivationMap(p.encoder, p.layer)

    def call(n: int) -> Tensor:
        if n == 1:
            return one.attribute(p.x, target=0, **options)
        return several.attribute_all(p.x, reference_embedding=p.s[:n], **options)

    yield call


@contextmanager
def captum(p: Problem) -> Iterator[Call]:
    method = LayerGradCam(p.score, p.layer)
    yield lambda n: [method.attribute(p.x, target=k).detach() for k in range(n)]  # else it keeps its graph


@contextmanager
def captum_by_hand(p: Problem) -> Iterator[Call]:
    """The encoder cut at the layer, or its block: the stem runs once, the tail on copies of the features."""
    method = LayerGradCam(Cosine(p.tail, p.s), p.tail_layer)

    def call(n: int) -> list[Tensor]:
        with torch.no_grad():
            features = p.stem(p.x)
        B, found = len(p.x), []
        for ks in torch.arange(n, device=p.x.device).split(CHUNK):
            copies = features.repeat(len(ks), *[1] * (features.ndim - 1))
            found += method.attribute(copies, target=ks.repeat_interleave(B)).detach().split(B)
        return found

    with p.frozen():
        yield call


@contextmanager
def grad_cam(p: Problem) -> Iterator[Call]:
    with pytorch_grad_cam.GradCAM(p.score, [p.layer]) as cam:
        yield lambda n: [cam(p.x, [ClassifierOutputTarget(k)] * len(p.x)) for k in range(n)]


@contextmanager
def grad_cam_by_hand(p: Problem) -> Iterator[Call]:
    """One forward pass, one backward pass a reference down to the layer, neither normalised nor enlarged."""
    with p.frozen(), pytorch_grad_cam.GradCAM(p.score, [p.layer]) as cam:
        store = cam.activations_and_grads

        def call(n: int) -> list[Any]:
            scores, found = store(p.x), []
            for k in range(n):
                store.gradients = []
                scores[:, k].sum().backward(retain_graph=k < n - 1)
                A, g = (stored[0].cpu().numpy() for stored in (store.activations, store.gradients))
                found.append(cam.get_cam_image(p.x, p.layer, None, A, g))
            return found

        yield call


@contextmanager
def torch_cam(p: Problem) -> Iterator[Call]:
    score = p.score
    with torchcam.methods.GradCAM(score, p.layer) as cam:
        yield lambda n: [cam(k, score(p.x))[0] for k in range(n)]


@contextmanager
def torch_cam_by_hand(p: Problem) -> Iterator[Call]:
    """One forward pass whose graph is kept for all references, no normalisation."""
    score = p.score

    def call(n: int) -> list[Tensor]:
        scores = score(p.x)
        return [cam(k, scores, normalized=False, retain_graph=k < n - 1)[0] for k in range(n)]

    with p.frozen(), torchcam.methods.GradCAM(score, p.layer) as cam:
        yield call


@contextmanager
def known(p: Problem) -> Iterator[Call]:
    """An allocation of a known size, to check how memory is measured."""
    yield lambda n: torch.ones(KNOWN // 4, device=p.x.device)


METHODS = {
    PLAIN: forward,
    OURS: fam,
    CAPTUM: captum,
    f"{CAPTUM}, by hand": captum_by_hand,
    "pytorch-grad-cam": grad_cam,
    "pytorch-grad-cam, by hand": grad_cam_by_hand,
    "torchcam": torch_cam,
    "torchcam, by hand": torch_cam_by_hand,
}
PEERS = [name for name in METHODS if name not in (PLAIN, OURS)]


def check_same(case: Case, device: str) -> None:
    """All of Grad-CAM's implementations give the same maps but for ReLU, scale and size; ours are not flat."""
    p = pose(case, 2, device)
    found = {}
    for name in [OURS, *PEERS]:
        with METHODS[name](p) as call:
            maps = call(2)
        rows = maps if isinstance(maps, list) else maps.unbind(1)
        found[name] = np.stack([np.asarray(torch.as_tensor(m).cpu()).reshape(len(p.x), -1) for m in rows])
    assert (np.ptp(found[OURS], axis=2) > 0).all(), f"flat maps: {case}"
    signed, positive = found[CAPTUM], found[CAPTUM].clip(0)
    side = round(signed.shape[2] ** 0.5)
    large = [scale_cam_image(m.reshape(-1, side, side), (case.size, case.size)) for m in positive]
    expected = {
        f"{CAPTUM}, by hand": signed,
        "pytorch-grad-cam": np.stack([scale_cam_image(m).reshape(len(p.x), -1) for m in large]),
        "pytorch-grad-cam, by hand": signed,
        "torchcam": np.stack([scale_cam_image(m) for m in positive]),
        "torchcam, by hand": positive,
    }
    for name, maps in expected.items():
        assert maps.any(2).all(), f"{name} is zero: {case}"
        one, two = (m / np.abs(m).max(2, keepdims=True) for m in (found[name], maps))
        np.testing.assert_allclose(one, two, atol=1e-3, err_msg=f"{name}: {case}")


def clock(call: Call, n: int, device: str) -> float:
    """Seconds."""
    if device == "cpu":
        start = time.perf_counter()
        call(n)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call(n)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def time_methods(case: Case, references: int, settings: Settings, device: str) -> Results:
    p = pose(case, references, device)

    def run(name: str, n: int) -> float:
        with METHODS[name](p) as call:
            return clock(call, n, device)

    def total(times: list[float]) -> float:
        """Of all references."""
        return times[-1] + (sum(times[1:]) - times[0] * (len(times) - 1)) / (FEW - FEW // 2) * (references - FEW)

    plan, seconds = {}, 0.0  # how many references are run
    for name in METHODS:
        run(name, 1)
        plan[name] = [FEW // 2, FEW] if references > FEW and name in PEERS else [references]
        times = [min(run(name, n) for _ in range(2)) for n in plan[name]]  # of noise, a line may lead anywhere
        if len(times) > 1 and total(times) <= PATIENCE:
            plan[name] = [references]
            times = [run(name, references)]
        seconds += sum(times)
    rounds: list[dict[str, float]] = []
    shuffle, order = random.Random(0).shuffle, list(METHODS)
    for _ in range(min(settings.rounds, max(3, int(settings.seconds / seconds)))):
        gc.collect()
        gc.disable()
        shuffle(order)
        rounds.append({name: total([run(name, n) for n in plan[name]]) for name in order})
        gc.enable()
    found = {
        (case, references, name, TIME): Figure.of([r[name] / r[PLAIN] for r in rounds], len(plan[name]) > 1)
        for name in METHODS
    }
    found[case, references, PLAIN, SECONDS] = Figure.of([r[PLAIN] for r in rounds])
    for name in (CAPTUM, f"{CAPTUM}, by hand"):
        found[case, references, OURS, OVER.format(name)] = Figure.of([r[OURS] / r[name] for r in rounds])
    return found


class Memory:
    """What is in use, in bytes: by the process on a CPU, of torch's allocator on a GPU."""

    def __init__(self, device: str) -> None:
        self.cpu = device == "cpu"

    def mark(self) -> int:
        """Forgets the peak. What is in use now."""
        gc.collect()
        if self.cpu:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.cuda.reset_peak_memory_stats()
        return self.now()

    def now(self) -> int:
        return self._status("VmRSS") if self.cpu else torch.cuda.memory_allocated()

    def peak(self) -> int:
        return self._status("VmHWM") if self.cpu else torch.cuda.max_memory_allocated()

    @staticmethod
    def _status(field: str) -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024


@dataclass(frozen=True)
class Use:
    """A call whose memory is measured."""

    case: Case
    references: int
    method: str
    device: str
    threads: int  # with another number, torch takes other convolutions
    calls: int = CALLS[-1]
    internal_batch_size: int | None = None


def measure_memory(use: Use) -> tuple[Use, dict[str, float]]:
    """Of the first call the added peak, also beside the result, and growth after each, in MB; ms a map of the last."""
    torch.set_num_threads(use.threads)
    warnings.filterwarnings("ignore")
    p, memory, method = pose(use.case, use.references, use.device), Memory(use.device), METHODS.get(use.method, known)
    if use.internal_batch_size is not None:
        method = partial(method, internal_batch_size=use.internal_batch_size)
    # Code and kernels that are loaded once are not the call's: one small image (a ViT has one size), two references.
    small = p.x[:1] if use.case.encoder == "ViT-S" else p.x[:1, :, :64, :64]
    with method(replace(p, x=small)) as call:
        call(min(2, use.references))
    with forward(p) as call:
        call(1)
    p.encoder.zero_grad()
    found = {}
    with method(p) as call:
        before = memory.mark()
        for k in range(1, use.calls + 1):
            start = time.perf_counter()
            maps = call(use.references)
            if not memory.cpu:
                torch.cuda.synchronize()
            found[EACH] = (time.perf_counter() - start) / use.references / len(p.x) * 1000
            if k == 1:
                found[PEAK] = (memory.peak() - before) / MB
                found[BESIDE] = found[PEAK] - (maps.nbytes / MB if isinstance(maps, Tensor) else 0)
            del maps
            found[GROWTH.format(k)] = (memory.now() - before) / MB
    return use, found


def in_processes(uses: list[Use], name: str) -> list[tuple[Use, dict[str, float]]]:
    """Each in a new one, because a process's peak only grows; it has loaded the libraries, but not used them."""
    os.environ.update(MALLOC)  # for the children: this process has started
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.report", "captum_fam", "pytorch_grad_cam", "timm", "torchcam.methods"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        return list(tqdm(pool.imap_unordered(measure_memory, uses, 1), total=len(uses), desc=name))


def measure_all(cases: list[Case], times: Results, settings: Settings, device: str) -> Results:
    """Memory for one reference, and for many where one forward pass may serve them all."""
    many, plain = settings.references[-1], Use(cases[0], 1, PLAIN, device, torch.get_num_threads())
    uses = [replace(plain, method=CHECK)]
    for case in cases:
        # Growth of one image at a time: for a larger batch, the first call says what there is to know.
        calls = plain.calls if case.batch == 1 else 1
        uses += [replace(plain, case=case, method=method, calls=calls) for method in METHODS]
        once = [m for m in METHODS if (m == OURS or "by hand" in m) and (case, many, m, TIME) in times]
        shown = [m for m in once if not times[case, many, m, TIME].extrapolated]
        uses += [replace(plain, case=case, method=m, references=many, calls=1) for m in shown]
    repeats = [settings.repeats if use.case.batch == 1 else 1 for use in uses]
    found = in_processes([use for use, n in zip(uses, repeats) for _ in range(n)], "memory")
    results = {}
    for use in uses:
        values = [value for u, value in found if u == use]
        for quantity in (PEAK, *(GROWTH.format(n) for n in CALLS if n <= use.calls)):
            results[use.case, use.references, use.method, quantity] = Figure.of([v[quantity] for v in values])
    return results


def measure_parts(case: Case, settings: Settings, device: str) -> Results:
    """Large galleries and batches, whole and in parts."""
    if "internal_batch_size" not in inspect.signature(FeatureActivationMap.attribute_all).parameters:
        return {}
    use, results = Use(case, 1, OURS, device, torch.get_num_threads(), calls=2), {}
    uses = [replace(use, references=n, internal_batch_size=64) for n in settings.galleries]
    uses += [replace(use, references=n) for n in settings.galleries if n <= settings.whole]
    batches = [replace(use, case=replace(case, batch=n)) for n in settings.batches]
    uses += batches + [replace(use, internal_batch_size=8) for use in batches]
    for use, values in in_processes(uses, "in parts"):
        for quantity in (BESIDE, EACH):
            how = f"internal_batch_size={use.internal_batch_size}" if use.internal_batch_size else "whole"
            results[use.case, use.references, how, quantity] = Figure.of([values[quantity]])
    return results


def number(value: float) -> str:
    value += 0.0  # no -0
    return f"{value:,.0f}" if abs(value) >= 99.5 else f"{value:.1f}" if abs(value) >= 9.95 else f"{value:.2f}"


def counted(n: int) -> str:
    return f"{n:,} reference{'s' * (n > 1)}"


def case_table(results: Results, case: Case) -> str:
    counts = sorted(n for c, n, *kind in results if c == case and kind == [OURS, TIME])
    with_peak = [n for n in counts if (case, n, OURS, PEAK) in results]
    plain, rows = results[case, 1, PLAIN, PEAK].median, []
    calls = [n for n in CALLS if (case, 1, OURS, GROWTH.format(n)) in results]
    for method in METHODS:
        cells = [str(results[case, n, method, TIME]) for n in counts]
        for n in with_peak:
            found = results.get((case, n, method, PEAK))
            cells.append(f"{found.over(plain)}, {number(found.median)} MB" if found else "")
        grown = [results[case, 1, method, GROWTH.format(n)].median for n in calls]
        rows.append([method, *cells, ", ".join(f"{value:.0f}" for value in grown)])
    header = [f"time, {counted(n)}" for n in counts] + [f"added peak, {counted(n)}" for n in with_peak]
    return f"### {case}\n\nPlain forward pass: {results[case, 1, PLAIN, SECONDS].median * 1000:.1f} ms.\n\n" + table(
        ["method", *header, f"growth in MB, {', '.join(map(str, calls))} calls"], rows
    )


def goals_table(results: Results, cases: list[Case], counts: tuple[int, ...]) -> str:
    """What was to be reached, and whether it was."""
    goals: list[tuple[Case, str, float, float]] = []
    for case in cases:
        peak, plain = (results[case, 1, method, PEAK].median for method in (OURS, PLAIN))
        times = {n: results[case, n, OURS, TIME].median for n in counts if (case, n, OURS, TIME) in results}
        if case.route.endswith("early stage"):
            for name in (CAPTUM, f"{CAPTUM}, by hand"):
                goals.append((case, f"`attribute`: time / {name}", results[case, 1, OURS, OVER.format(name)].median, 1))
                goals.append(
                    (case, f"`attribute`: added peak / {name}", peak / results[case, 1, name, PEAK].median, 0.5)
                )
            for n, time_of_n in times.items():
                if n > 1:
                    best = min(results[case, n, m, TIME].median for m in METHODS if m.startswith("torchcam"))
                    goals.append(
                        (case, f"`attribute_all`: time / torchcam's best, {counted(n)}", time_of_n / best, 0.5)
                    )
        else:
            limits, peak_limit = GOALS[case.route]
            goals.append((case, "`attribute`: added peak", peak / plain, peak_limit))
            for n in sorted(limits.keys() & times.keys()):
                goals.append((case, f"`attribute{'_all' * (n > 1)}`: time, {counted(n)}", times[n], limits[n]))
    rows = [
        [str(case), goal, f"{value:.2f}", f"{limit:.2f}", "reached" if value <= limit else "**missed**"]
        for case, goal, value, limit in goals
    ]
    return table(["case", "goal", "measured", "at most", ""], rows)


def count_operations(case: Case, references: tuple[int, ...], device: str) -> Results:
    """Those of our calls, beside a plain forward pass."""
    p, found = pose(case, references[-1], device), {}
    for method, n in ((PLAIN, 1), *((OURS, n) for n in references)):
        with METHODS[method](p) as call:
            call(n)  # what is asked of an encoder once is no part of it
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
                call(n)
        found[method, n] = counter.get_total_flops()
    return {(case, n, OURS, OPERATIONS): Figure.of([found[OURS, n] / found[PLAIN, 1]]) for n in references}


def operations_table(results: Results) -> str:
    rows = []
    for (case, n, method, quantity), figure in results.items():
        if quantity == OPERATIONS and (time_of_n := results.get((case, n, method, TIME))):
            ratio = time_of_n.median / figure.median
            rows.append([str(case), f"{n:,}", number(figure.median), number(time_of_n.median), f"{ratio:.2f}"])
    return table(["case", "references", "operations", "time", "time / operations"], rows)


def peers_as_good(results: Results) -> str:
    lines = []
    for (case, n, method, quantity), ours in results.items():
        if method == OURS and quantity in (TIME, PEAK):
            peers = {m: results[case, n, m, quantity].median for m in PEERS if (case, n, m, quantity) in results}
            near = [f"{m} ({value / ours.median:.2f})" for m, value in peers.items() if value <= ours.high]
            what = "as fast" if quantity == TIME else "no more memory"
            lines += [f"- {case}, {counted(n)}, {what}: {', '.join(near)}"] * bool(near)
    return "\n".join(lines) or "Nowhere."


def parts_table(results: Results) -> str:
    shown = sorted(((c.batch, n, m), c) for c, n, m, quantity in results if quantity == BESIDE)
    rows = [
        [f"{B:,}", f"{n:,}", m, *(number(results[case, n, m, quantity].median) for quantity in (BESIDE, EACH))]
        for (B, n, m), case in shown
    ]
    return table(["images", "references", "", BESIDE, EACH], rows) if rows else "`internal_batch_size` is missing."


def write_results(results: Results, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            [*(f.name for f in fields(Case)), "references", "method", "quantity", *(f.name for f in fields(Figure))]
        )
        for (case, *about), figure in results.items():
            numbers = [f"{v:.5g}" if isinstance(v, float) else v for v in asdict(figure).values()]
            writer.writerow([*asdict(case).values(), *about, *numbers])


def read_times(path: Path) -> Results:
    """The times of a run before this one."""
    results: Results = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            case = Case(row["encoder"], row["layer"], row["route"], int(row["batch"]), int(row["size"]))
            numbers = [float(row[name]) for name in ("median", "low", "high")]
            if row["quantity"].startswith(("time", SECONDS)):
                figure = Figure(*numbers, int(row["n"]), row["extrapolated"] == "True")
                results[case, int(row["references"]), row["method"], row["quantity"]] = figure
    return results


def write_report(
    results: Results, cases: list[Case], settings: Settings, device: str, command: str, path: Path
) -> None:
    """README.md and results.csv in a folder."""
    write_results(results, path / RESULTS)
    cpu = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    packages = ("torch", "torchvision", "timm", "captum", "grad-cam", "torchcam")
    text = TEXT.format(
        date=date.today().isoformat(),
        command=command,
        machine=torch.cuda.get_device_name() if device != "cpu" else cpu[0] if cpu else platform.machine(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        packages=", ".join(f"{p} {version(p)}" for p in packages),
        half=FEW // 2,
        few=FEW,
        chunk=CHUNK,
        memory="the memory that torch allocates"
        if device != "cpu"
        else "resident memory, with freed memory returned to the system",
        known=KNOWN / MB,
        check=results[cases[0], 1, CHECK, PEAK],
        goals=goals_table(results, cases, settings.references),
        operations=operations_table(results),
        peers=peers_as_good(results),
        tables="\n\n".join(case_table(results, case) for case in cases),
        parts=parts_table(results),
    )
    (path / "README.md").write_text(text)


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", default=os.cpu_count(), show_default=True, help="Threads of torch.")
@click.option(
    "--output", default=FOLDER, show_default=False, type=click.Path(path_type=Path), help="Folder of results."
)
@click.option("--keep-times", is_flag=True, help="Measure memory only, and keep the times of results.csv.")
@click.option("--smoke", is_flag=True, help="Small images, few rounds: does it run?")
def main(device: str, threads: int, output: Path, keep_times: bool, smoke: bool) -> None:
    """Measure time and memory, and write the report."""
    if not Path("/proc/self/clear_refs").exists():
        raise click.ClickException("memory cannot be measured: this system has no /proc/self/clear_refs")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    settings = Settings(2, 1.0, (1, 4), (100,), 100, (2,), 1) if smoke else Settings()
    places = [replace(case, size=64) for case in (CASES[0], CASES[3])] if smoke else CASES
    cases = [places[0]] if smoke else [replace(case, batch=n) for case in places for n in (1, 8)]
    for case in tqdm(places, desc="same maps"):
        check_same(case, device)
    results = read_times(output / RESULTS) if keep_times else {}
    series = [(case, n) for case in cases for n in settings.references if n == 1 or case.batch == 1]
    for case, n in tqdm([] if keep_times else series, desc="time"):
        results |= time_methods(case, n, settings, device)
    write_results(results, output / RESULTS)
    for case in tqdm([case for case in cases if case.batch == 1], desc="operations"):
        results |= count_operations(case, settings.references, device)
    write_results(results, output / RESULTS)
    results |= measure_all(cases, results, settings, device)
    parts = measure_parts(places[0], settings, device)
    command = f"python -m benchmarks.cost --device {device} --threads {threads}{' --smoke' * smoke}"
    command += "` (time), and then with `--keep-times" * keep_times
    write_report(results | parts, cases, settings, device, command, output)
    click.echo((output / "README.md").read_text())


if __name__ == "__main__":
    main()
