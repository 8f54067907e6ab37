"""Do the places of layers answer where their maps say? ``python -m benchmarks.order`` writes order.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

from captum_fam.engine.order import Doubt, Layouts, ask

PAGE = """# The order of places

Made by `python -m benchmarks.order`.

For a layer of unknown layout, the package [tests where its places lie](../docs/method.md#where-a-place-lies). Does
that test confirm right layouts, and refuse wrong ones?

The networks are those of timm without trained weights, on noise. Of each, the test sees all modules whose output may
be a map, but for which the shape leaves a doubt: tokens, attentions, and pieces that look like maps. The package is
not told which network it is.

* *Confirmed*: parts of the input were changed, and the places of the map there changed
  ([order.py](../captum_fam/engine/order.py)).
* *Refused*: attentions and their parts, where all places change; heads and token mixers, which are no maps; windows
  (Hiera, MobileViTv2); and branches that begin at zero (LeViT).
* The other columns count confirmed layouts among the same layers in a wrong order. They should be zero: all tokens
  one place further, as with a class token that comes last; half of them one place further, as with a class token in
  the middle; every second row backwards; left and right exchanged; shuffled.

{table}

No wrong order of tokens was confirmed. For maps (B, C, h, w), it is enough that nearby places change, because kernels
may be large. So a few layers of MobileViTv2 passed with a shift by one place.
"""
NAMES = (
    *("vit_tiny_patch16_224", "resmlp_12_224", "xcit_nano_12_p16_224", "pvt_v2_b0", "levit_128s"),
    *("efficientformer_l1", "hiera_tiny_224", "mobilevitv2_050"),
)


def _by_one(n: int) -> Tensor:
    return (torch.arange(n) + 1).clamp(max=n - 1)


def _by_half(n: int) -> Tensor:
    return torch.arange(n) + (torch.arange(n) < n // 2)


def _rows(order: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda places: order(places.clone()).flatten()


def _every_second_backwards(places: Tensor) -> Tensor:
    places[1::2] = places[1::2].flip(1)
    return places


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "one further": lambda places: _by_one(places.numel()),
    "half of them": lambda places: _by_half(places.numel()),
    "second rows backwards": _rows(_every_second_backwards),
    "mirrored": _rows(lambda places: places.flip(1)),
    "shuffled": lambda places: torch.randperm(places.numel(), generator=torch.Generator().manual_seed(1)),
}


class _Wrong(Layouts):
    """Maps whose places are in a wrong order; tokens have one more in front, as if there were a class token."""

    def __init__(self, order: Callable[[Tensor], Tensor], one_before: bool) -> None:
        super().__init__(nn.Identity())
        self.order, self.one_before = order, one_before

    def to_map(self, activation: Tensor, inputs: Any, dimensions: int | None) -> Tensor | None:
        A = super().to_map(activation, inputs, dimensions)
        if A is None or A.ndim != 4:
            return A
        h, w = A.shape[2:]
        wrong = A.flatten(2)[:, :, self.order(torch.arange(h * w).reshape(h, w))].unflatten(2, (h, w))
        return wrong[:, : max(1, A.shape[1] - 1)] if self.one_before else wrong  # fewer values: tokens were left out


def _count(name: str) -> list[object]:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    size = model.default_cfg["input_size"][-1]
    x = torch.rand(1, 3, size, size) * 2 - 1
    kept: dict[str, Tensor] = {}
    for n, module in model.named_modules():
        if n:
            module.register_forward_hook(lambda *call, n=n: kept.update({n: call[2]}))
    unknown, own = Layouts(nn.Identity()), Layouts(model)  # the first as if nothing were known of the network
    with torch.no_grad():
        z = model(x)
        in_doubt = [
            n
            for n, a in kept.items()
            if isinstance(a, Tensor)
            and len(a) == 1
            and (A := unknown.to_map(a, (x,), z.shape[1])) is not None
            and A.ndim == 4
            and any(
                L.doubt(m, a, (x,), z.shape[1]) for L, m in ((unknown, nn.Identity()), (own, model.get_submodule(n)))
            )
        ]

        def confirmed(layouts: Layouts) -> int:
            def activations(images: tuple[Tensor, ...], _: Any) -> list[Tensor]:
                model(*images)
                return [kept[n] for n in in_doubt]

            places, convolved = [Doubt.PLACES] * len(in_doubt), [False] * len(in_doubt)
            answers, _ = ask(activations, places, convolved, layouts, (x,), None, z.shape[1])
            return sum(answer is True for answer in answers)

        right = confirmed(unknown)
        wrong = [confirmed(_Wrong(order, how in ("one further", "half of them"))) for how, order in WRONG.items()]
    return [name, len(in_doubt), right, len(in_doubt) - right, *wrong]


@click.command(help=__doc__)
@click.option("--output", type=Path, default=Path(__file__).with_suffix(".md"), show_default=True)
@click.argument("names", nargs=-1)
def main(output: Path, names: tuple[str, ...]) -> None:
    rows = [_count(name) for name in tqdm(names or NAMES)]
    head = ["network", "layers in doubt", "confirmed", "refused", *WRONG]
    lines = [head, ["---"] * len(head), *rows]
    sums = [sum(row[i] for row in rows) for i in range(1, len(head))]  # type: ignore[misc]  # numbers
    table = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [*lines, ["**all**", *sums]])
    output.write_text(PAGE.format(table=table))
    print(table)


if __name__ == "__main__":
    main()
