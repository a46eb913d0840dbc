"""One training loop for the parts of the embedded base: resumable, timed, on accelerate.

A part is a module whose ``forward(batch)`` returns its losses, and a function ``batch_at(step, rank)`` that makes the data of
any step from nothing else than its number: so the data position *is* the step count, and a resumed run sees what an
uninterrupted one would have seen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.base import checkpoint
from training.base.muon import Muon, parameter_groups


@dataclass(frozen=True, kw_only=True)
class Run:
    """How one part is trained. ``items`` is the length of the schedule; ``minutes`` only ends this sitting."""

    work: Path
    name: str
    items: int
    batch: int
    rate: float
    adam_rate: float | None = None
    minutes: float = 1e9
    warmup: int = 200
    ema: float = 0.999
    weight_decay: float = 1e-4
    final_rate: float = 0.02
    save_minutes: float = 1.5

    @property
    def folder(self) -> Path:
        return self.work / self.name


def rate_at(step: int, steps: int, run: Run) -> float:
    """Linear warm-up, then a cosine from ``rate`` to ``final_rate * rate``."""
    if step < run.warmup:
        return run.rate * (step + 1) / run.warmup
    done = min((step - run.warmup) / max(steps - run.warmup, 1), 1.0)
    return run.rate * (run.final_rate + (1 - run.final_rate) * 0.5 * (1 + math.cos(math.pi * done)))


def ema_decay(step: int, limit: float) -> float:
    """Short memory at the start, so that the average never drags the random start along."""
    return min(limit, (1 + step) / (10 + step))


def train(model: nn.Module, batch_at: Callable[[int, int], Any], run: Run) -> dict[str, Tensor]:
    """Train ``model`` until its schedule or this sitting ends; returns the averaged weights (EMA)."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16")
    world, rank = accelerator.num_processes, accelerator.process_index
    optimizer = Muon(parameter_groups(model, run.rate, run.adam_rate), lr=run.rate, weight_decay=run.weight_decay)
    seen, seconds = 0, 0.0
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if checkpoint.exists(run.folder):
        groups, facts = checkpoint.load(run.folder)
        model.load_state_dict(groups["model"])
        average = groups["ema"]
        checkpoint.restore_optimizer(optimizer, groups["optimizer"])
        seen, seconds = facts["items"], facts["seconds"]
    step = seen // (run.batch * world)  # counted in items, so that a run may go on with another number of processes
    steps = run.items // (run.batch * world)
    device = accelerator.device
    average = {k: v.to(device) for k, v in average.items()}
    prepared, optimizer = accelerator.prepare(model, optimizer)
    live = accelerator.unwrap_model(prepared).state_dict()

    def save() -> None:
        if accelerator.is_main_process:
            state = {"model": live, "ema": average, "optimizer": checkpoint.optimizer_tensors(optimizer.optimizer)}
            checkpoint.save(run.folder, state, {"seconds": seconds, "items": step * run.batch * world})

    started = saved = shown = time.monotonic()
    shown_step = step
    sums: dict[str, float] = {}
    while step < steps:
        elapsed = time.monotonic() - started
        stop = torch.tensor([float(elapsed > run.minutes * 60)], device=device)
        if world > 1:
            torch.distributed.broadcast(stop, 0)
        if stop.item():
            break
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, run) * group["rate_scale"]
        losses = prepared(batch_at(step, rank))
        accelerator.backward(losses["loss"])
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        keep = ema_decay(step, run.ema)
        with torch.no_grad():
            for name, value in live.items():
                if value.is_floating_point():
                    average[name].lerp_(value, 1 - keep)
                else:
                    average[name].copy_(value)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        now = time.monotonic()
        if accelerator.is_main_process and now - shown > 20:
            count = step - shown_step
            speed = count * run.batch * world / (now - shown)
            text = "  ".join(f"{k} {v / count:.4f}" for k, v in sums.items())
            left = (steps - step) * run.batch * world / speed / 60
            print(f"{run.name} step {step}/{steps}  {speed:.1f} items/s  {left:.0f} min left  {text}", flush=True)
            shown, shown_step, sums = now, step, {}
        if now - saved > run.save_minutes * 60:
            seconds += now - saved
            save()
            saved = now
    seconds += time.monotonic() - saved
    save()
    accelerator.end_training()
    return average
