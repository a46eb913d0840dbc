"""What the methods that guide cost in counted operations and in memory, against what they must do.

    python -m tests.bench.guided_cost --report docs/performance.md

Operations are counted (matrix products, convolutions, attention), so the numbers do not depend on the machine. What a method
must do is counted apart from it: forwards of a run with a single LoRA, forwards of the bare UNet up to the last map, and the
ratio of a bare backward pass to its forward, times the passes that the method's schedule asks for. Memory is the largest sum
of what autograd keeps for a backward pass, weights aside.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compose.guidance import forward_order, stopping
from compose.plan import Role, Where
from compose.routes import Grid
from pipelines.image import generate
from studio.base import Base, load_base
from studio.errors import StudioError
from tests.bench.compose_rows import counted
from tests.bench.page import replace_section

MARK = "operations of guided methods: written by tests/bench/guided_cost.py"
NAMES = ("cat-face", "pizza", "unicorn", "dog-face")
"""LoRAs of a run, in the order in which they are added; they ship with the studio."""
WORDS = {"cat-face": "zarn animal", "pizza": "plov food", "unicorn": "quil animal", "dog-face": "wexi animal"}
BOXES = ("0,.2,.48,.7", ".52,.2,1,.7", ".25,.5,.75,1", ".3,0,.7,.4")
COUNTS = (2, 3)
PEAK_COUNTS = (2, 3, 4)
BAR = 1.25
FLAT = 1.05


@dataclass(frozen=True)
class Parts:
    """Operations of one row of the UNet: a ``whole`` forward with a LoRA, an ``early`` one that stops at the last map, and
    its ``backward`` pass; and of all that is done once a picture, ``once``."""

    whole: float
    early: float
    backward: float
    once: float


def asked(count: int, method: str, steps: int, base: str, **options: Any) -> dict[str, Any]:
    """The fields of a request with the first ``count`` LoRAs."""
    names = NAMES[:count]
    said = " and ".join(f"a {WORDS[name]}" for name in names)
    regions = tuple(f"{name}@{box}" for name, box in zip(names, BOXES, strict=False))
    fields = {"base": base, "loras": list(names), "method": method, "options": options, "seed": 0, "steps": steps}
    return {"prompt": said, **fields, **({"regions": regions} if method == "lora-composer" else {})}


def operations(work: Callable[[], object]) -> int:
    with counted() as total:
        work()
    return total()


def parts_of(base: Base, name: str, steps: int) -> Parts:
    """What the rows of a run cost on ``base``, which is called ``name``."""
    one, half = (
        operations(lambda: generate(asked(1, "merge", n, name), progress=False))  # noqa: B023 (called at once)
        for n in (steps, steps // 2)
    )
    whole = (one - half) / (steps - steps // 2) / 2
    early, backward = bare(base)
    return Parts(whole, early * whole, backward * early * whole, one - 2 * steps * whole)


def bare(base: Base) -> tuple[float, float]:
    """Of the bare UNet: the share of a forward before the last map's layer is done, and operations of a backward pass to the
    latents per operation of its forward."""
    unet = base.unet
    width, height = (side // base.latent_factor for side in base.family.size)
    x = torch.zeros(1, unet.config.in_channels, height, width)
    states = torch.zeros(1, base.context_length, unet.config.cross_attention_dim)
    mapped = Where(role=Role.CROSS, names=base.family.map_layers)
    grid = Grid(rows=1, height=height, width=width)
    crossed = [name for name, _ in unet.named_modules() if name.endswith("attn2")]
    last = max((name for name in crossed if mapped.holds(name, Role.CROSS, height * width, grid)), key=forward_order)

    def forward(leaf: Tensor) -> Tensor:
        return unet(leaf, 500, encoder_hidden_states=states, return_dict=False)[0]

    def forward_early() -> None:
        with stopping(unet, last):
            forward(x)

    with torch.no_grad():
        whole, early = operations(lambda: forward(x)), operations(forward_early)
    if not 0 < early < whole:
        raise RuntimeError(f"a forward did not end after {last}")
    leaf = x.clone().requires_grad_()
    both = operations(lambda: torch.autograd.grad(forward(leaf).sum(), leaf))
    return early / whole, both / whole - 1


def clora_must(parts: Parts, count: int, steps: int, gradient: str) -> float:
    """K + 1 guided passes a step; for half of the steps the maps of K + 1 conditional rows, twice if they are not kept, and
    their products."""
    passes, updates = count + 1, ceil(steps / 2)
    looks = 2 if gradient == "two-pass" else 1
    return parts.once + passes * (2 * steps * parts.whole + updates * (looks * parts.early + parts.backward))


def composer_must(parts: Parts, steps: int) -> float:
    """One guided pass a step; one early forward for the noise; up to the middle of the schedule one early forward and its
    product a step."""
    updates = steps // 2 + 1
    return parts.once + 2 * steps * parts.whole + parts.early + updates * (parts.early + parts.backward)


def kept_for_backward(base: Base, work: Callable[[], object]) -> int:
    """The largest sum of bytes that autograd holds at once, the weights aside."""
    weights = {weight.untyped_storage().data_ptr() for weight in base.unet.parameters()}
    alive = most = 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, most
            own = tensor.untyped_storage().data_ptr() not in weights
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size() * own
            alive += self.size
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        work()
    return most


def rows(base: Base, name: str, steps: int) -> tuple[list[tuple[str, float, float]], list[tuple[str, list[int]]]]:
    """Of each method: what it did over what it must do, and over a picture of one LoRA; and memory by number of LoRAs."""
    parts = parts_of(base, name, steps)
    alone = parts.once + 2 * steps * parts.whole
    found = []
    for count in COUNTS:
        for gradient in ("joint", "two-pass"):
            request = asked(count, "clora", steps, name, gradient=gradient)
            did = operations(lambda: generate(request, progress=False))  # noqa: B023 (called at once)
            found.append((f"clora, {gradient}, K = {count}", did / clora_must(parts, count, steps, gradient), did / alone))
        # `least` 1: guided to the middle whatever the loss does, so that the number of updates is known beforehand.
        request = asked(count, "lora-composer", steps, name, least=1)
        did = operations(lambda: generate(request, progress=False))  # noqa: B023
        found.append((f"lora-composer, K = {count}", did / composer_must(parts, steps), did / alone))
    held = []
    for gradient in ("joint", "two-pass"):
        short = [asked(count, "clora", 2, name, gradient=gradient) for count in PEAK_COUNTS]
        held.append((f"clora, {gradient}", [kept_for_backward(base, lambda: generate(r, progress=False)) for r in short]))  # noqa: B023
    return found, held


def section(found: Sequence[tuple[str, float, float]], held: Sequence[tuple[str, list[int]]], steps: int) -> str:
    """The markdown of a run."""
    counts = ", ".join(map(str, PEAK_COUNTS))
    lines = [
        "## Operations of the methods that guide", "", "    python -m tests.bench.guided_cost --report docs/performance.md", "",
        f"Embedded base, {steps} steps, counted operations. *Must*: the passes its schedule asks for, counted apart from it on",
        "a run with one LoRA and on the bare UNet. *Alone*: a picture with one LoRA.", "",
        "| method | did / must | bar | | did / alone |", "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {what} | {ratio:.2f} | <= {BAR} | {'holds' if ratio <= BAR else '**missed**'} | {alone:.1f} |"
        for what, ratio, alone in found
    ]
    lines += ["", f"| kept for a backward pass, MiB at K = {counts} | | bar | |", "|---|---|---|---|"]
    for what, sizes in held:
        flat = "two-pass" in what
        verdict = "holds" if max(sizes) / min(sizes) <= FLAT else "**missed**"
        told = ", ".join(f"{size / 2**20:.2f}" for size in sizes)
        lines.append(f"| {what} | {told} | {f'flat: <= {FLAT} | {verdict}' if flat else ' | '} |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.guided_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--report", type=Path, help="page whose section is replaced")
    given = parser.parse_args()
    torch.set_num_threads(1)
    try:
        found, held = rows(load_base(given.base, "cpu"), given.base, given.steps)
    except StudioError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = section(found, held, given.steps)
    if given.report:
        replace_section(given.report, text, MARK)
    print(text)
    return 0 if all(ratio <= BAR for _, ratio, _ in found) else 2


if __name__ == "__main__":
    raise SystemExit(main())
