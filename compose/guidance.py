"""Guidance by attention maps: the gradient of a loss on a few maps with respect to the latents, and what it takes to get it.

    z <- z - a grad_z L(maps(z)),      grad_z L = J^T dL/dmaps,      J = dmaps/dz

as in Attend-and-Excite (Chefer et al., 2023, eq. 3). The loss sees the maps only, so it is differentiated on the maps alone and
its gradient is sent back through the UNet as a vector-Jacobian product. That makes sums over several passes exact without
keeping their graphs: first the maps of all passes without a graph (:func:`maps_of`), the loss on them (:func:`on_maps`), then
each pass again, alone, with its own product (:func:`pulled_back`).

A pass has conditional rows only and stops right after the last layer that is read. Weights are frozen, so a graph holds what
lies between latents and maps and nothing else. Latents keep their own units: the sampler's input scaling is inside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import Literal

import torch
from torch import Tensor, nn

from compose.attention import Attention, Maps
from compose.plan import AttentionPlan, Role, Tap, Where
from compose.routes import Grid
from compose.run import Run, Step
from compose.text import Encoded
from studio.errors import RequestError

Loss = Callable[[Maps], Tensor]
"""From maps to one number per row ``[n]``, or one number. The loss of a row must not depend on other rows."""

Unit = Literal["gradient", "noise"]
"""Of a step size: see :func:`scaled`."""

Cotangents = Mapping[str, Sequence[Tensor | None]]
"""``dL/dmap`` for every map, in the order of :data:`~compose.attention.Maps`; None where the loss does not depend on it."""


class _EnoughError(Exception):
    """Ends a forward once everything wanted of it has been read."""


def word_maps(run: Run, name: str, sets: Tensor | None, rows: Sequence[int] | None = None) -> Tap:
    """A tap on the family's map layers for sets of columns ``[S, L]`` (:func:`compose.plan.columns`), or for every column, of
    the rows ``rows``, or of all."""
    where = Where(role=Role.CROSS, names=run.base.family.map_layers)
    return Tap(name=name, where=where, sets=sets, rows=None if rows is None else tuple(rows))


def self_maps(run: Run, name: str, rows: Sequence[int]) -> Tap:
    """A tap for how cells attend to each other in the blocks of the family's map layers, of the rows ``rows``."""
    return Tap(name=name, where=Where(role=Role.SELF, names=run.base.family.map_layers), rows=tuple(rows))


def as_plan(plan: AttentionPlan | Sequence[Tap]) -> AttentionPlan:
    """Taps alone are a plan too."""
    return plan if isinstance(plan, AttentionPlan) else AttentionPlan(taps=tuple(plan))


def maps_of(
    run: Run,
    step: Step,
    latents: Tensor,
    plan: AttentionPlan | Sequence[Tap],
    *,
    encoded: Encoded,
    exit_after: str | None = None,
) -> Maps:
    """The maps at ``latents [n, c, h, w]``, as the sampler has them, under the bank's present route.

    Args:
        encoded: one row of conditioning per row.
        exit_after: the module after which the forward stops; None: the last layer with a tap; "": it does not stop.

    Raises:
        CancelledError: the user has cancelled. RequestError: no layer of the base is tapped.
    """
    run.check_cancelled()
    full = as_plan(plan)
    x = run.scheduler.scale_model_input(latents, step.timestep)
    grid = Grid(rows=len(x), height=x.shape[-2], width=x.shape[-1])
    with run.planned(full) as attention, attention.collecting() as maps:
        module = last_tap(attention, full, grid) if exit_after is None else exit_after
        with stopping(run.base.unet, module):
            run.forward(x, step.timestep, encoded)
        run.passes.early += len(x)
    return maps


def on_maps(loss: Loss, maps: Maps) -> tuple[Tensor, Cotangents]:
    """The loss and its gradient on the maps alone; cheap, and exact in the precision of the maps."""
    with torch.enable_grad():
        leaves = {
            name: [replace(each, values=each.values.detach().requires_grad_()) for each in every]
            for name, every in maps.items()
        }
        value = loss(leaves)
        flat = [each.values for every in leaves.values() for each in every]
        found = iter(torch.autograd.grad(value.sum(), flat, allow_unused=True) if value.requires_grad else [None] * len(flat))
    return value.detach(), {name: [next(found) for _ in every] for name, every in leaves.items()}


def pulled_back(run: Run, leaf: Tensor, maps: Maps, cotangents: Cotangents) -> Tensor:
    """``sum_maps J^T dL/dmap``, with the shape of ``leaf``; the graph of ``maps`` is freed.

    In float16 the cotangents travel scaled to about 1 by a power of two, and the result is scaled back. It may hold what is
    not finite, see :func:`finite`.
    """
    pairs = [
        (each.values, cotangent)
        for name, every in maps.items()
        for each, cotangent in zip(every, cotangents[name], strict=True)
        if cotangent is not None and each.values.requires_grad
    ]
    if not pairs:
        return torch.zeros_like(leaf)
    scale = 1.0
    if run.base.unet.dtype == torch.float16:
        largest = max(float(cotangent.abs().max()) for _, cotangent in pairs)
        scale = 2.0 ** -torch.tensor(largest).log2().floor().item() if 0 < largest < float("inf") else 1.0
    (gradient,) = torch.autograd.grad([m for m, _ in pairs], [leaf], [scale * c for _, c in pairs], allow_unused=True)
    run.passes.backward += len(pairs[0][0])
    if gradient is None:
        return torch.zeros_like(leaf)
    return gradient / scale


def finite(run: Run, gradient: Tensor) -> Tensor:
    """``gradient`` with zeros in rows that are not finite; the note of the run says how many there have been."""
    bad = ~gradient.isfinite().flatten(1).all(1)
    if bool(bad.any()):
        before = _skipped_note(run.passes.skipped)
        run.passes.skipped += int(bad.sum())
        run.notes[:] = [note for note in run.notes if note != before] + [_skipped_note(run.passes.skipped)]
        gradient = torch.where(bad.view(-1, 1, 1, 1), 0.0, gradient)
    return gradient


def _skipped_note(count: int) -> str:
    return f"guidance left out {count} gradients that were not finite: try smaller LoRA weights, or single precision"


def latents_gradient(
    run: Run,
    step: Step,
    latents: Tensor,
    plan_or_taps: AttentionPlan | Sequence[Tap],
    loss: Loss,
    *,
    encoded: Encoded,
    exit_after: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss at ``latents`` and its gradient, from one early forward and one backward pass.

    Arguments as of :func:`maps_of`.

    Returns:
        The loss as ``loss`` gives it, and ``dL/dlatents [n, c, h, w]`` in at least single precision, finite everywhere.
    """
    with torch.enable_grad():
        leaf = as_leaf(latents)
        maps = maps_of(run, step, leaf, plan_or_taps, encoded=encoded, exit_after=exit_after)
        value, cotangents = on_maps(loss, maps)
        return value, finite(run, pulled_back(run, leaf, maps, cotangents))


def scaled(run: Run, step: Step, gradient: Tensor, unit: Unit) -> Tensor:
    """A gradient ``[n, c, h, w]`` in the unit of a step size.

    "gradient": as it is, the published way; how far a step goes depends on the model and on the loss. "noise": with the size
    (root mean square) of the noise in the latents at this step, by row, so that a step of 0.1 moves by a tenth of it whatever
    the model.
    """
    if unit == "gradient":
        return gradient
    size = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
    return gradient / size.clamp(min=torch.finfo(gradient.dtype).tiny) * noise_level(run, step)


def noise_level(run: Run, step: Step) -> float:
    """The standard deviation of the noise in the latents as the sampler has them, at the beginning of a step."""
    alphas = run.scheduler.alphas_cumprod
    a = float(alphas[int(step.timestep.clamp(0, len(alphas) - 1))])
    level = (1 - a) ** 0.5
    # Samplers that count in sigmas scale their input by 1 / sqrt(1 + sigma^2), the share of signal at this level.
    probe = run.scheduler.scale_model_input(torch.ones(1), step.timestep)
    return level / float(probe)


def begins_step(scheduler: object) -> bool:
    """Whether the latents are a state now, not the point in between where a sampler of second order looks twice."""
    if hasattr(scheduler, "cur_sample") and getattr(scheduler, "counter", 0) == 1:
        return False  # pndm steps again from the state it kept, at its second timestep: what moved meanwhile would be lost
    orders, index = getattr(scheduler, "order_list", None), getattr(scheduler, "step_index", None)
    if orders is not None and index is not None:
        return bool(orders[index] == 1)
    return bool(getattr(scheduler, "state_in_first_order", True))


def lossy(scheduler: object) -> list[str]:
    """A sentence where a sampler takes back most of what guidance moves: UniPC's corrector begins at the state it kept."""
    if not hasattr(scheduler, "disable_corrector"):
        return []
    return ["the sampler 'unipc' takes back most of what guidance moves: choose another, such as 'dpmpp_2m'"]


def reaches(step: Step, share: float, last: int) -> bool:
    """Whether ``step`` is the first one at or after ``share`` of the schedule, among those where a step begins.

    Args:
        last: where the step before it began, counted over the whole schedule; one less than the first of the run if none did.
    """
    first = ceil(share * (step.skipped + step.count) - 1e-6)
    return last < first <= step.skipped + step.index


def phi(position: int, total: int, size: float, end: float = 0.5) -> float:
    """The length of an update, ``size * sqrt(linspace(1, end, total)[position])``: Attend-and-Excite's, and LoRA-Composer's."""
    return size * (1 - (1 - end) * position / max(total - 1, 1)) ** 0.5


def as_leaf(latents: Tensor) -> Tensor:
    """Where a gradient can end, in at least single precision."""
    return latents.detach().to(torch.promote_types(latents.dtype, torch.float32)).requires_grad_()


def updated(latents: Tensor, gradient: Tensor, step_size: float | Tensor) -> Tensor:
    """``z - a grad_z L``; ``step_size`` is one number, or one per row ``[n, 1, 1, 1]``."""
    return latents - step_size * gradient


@contextmanager
def stopping(unet: nn.Module, module: str) -> Iterator[None]:
    """A forward made meanwhile ends after ``module``, and the block with it."""

    def stop(*_: object) -> None:
        raise _EnoughError

    handle = unet.get_submodule(module).register_forward_hook(stop)
    try:
        yield
    except _EnoughError:
        pass
    finally:
        handle.remove()


def last_tap(attention: Attention, plan: AttentionPlan, grid: Grid) -> str:
    """The name of the last layer in the order of a forward that a tap of ``plan`` reads.

    Raises:
        RequestError: there is none.
    """
    blocks = len(attention.unet.down_blocks)  # type: ignore[arg-type]
    tapped = [
        name
        for name, role in attention.layers.items()
        if any(tap.where.holds(name, role, tokens_of(name, blocks, grid), grid) for tap in plan.taps)
    ]
    if not tapped:
        raise RequestError("guidance reads attention maps, but the base has none of the layers it would read")
    return max(tapped, key=forward_order)


def tokens_of(name: str, blocks: int, grid: Grid) -> int:
    """Image tokens of the layer ``name`` in a UNet of ``blocks`` on its way down: each but the last halves the cells."""
    stage, index, _ = forward_order(name)
    halvings = (index, blocks - 1, blocks - 1 - index)[stage]
    height, width = grid.height, grid.width
    for _ in range(halvings):
        height, width = -(-height // 2), -(-width // 2)
    return height * width


def forward_order(name: str) -> tuple[int, int, tuple[tuple[bool, int, str], ...]]:
    """Sorts layers as a forward meets them: down, middle, up; numbers as numbers, ``attn1`` before ``attn2``."""
    stage = ("down_blocks", "mid_block", "up_blocks").index(name.split(".")[0])
    numbers = re.findall(r"\d+", name)
    parts = tuple((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")[1:])
    return stage, 0 if stage == 1 else int(numbers[0]), parts
