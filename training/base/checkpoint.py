"""Training state on disk: a folder of small safetensors shards, replaced atomically.

Shards stay below :data:`SHARD_BYTES` so that a checkpoint can travel between machines in pieces.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARD_BYTES = 15_000_000


def save(folder: Path, groups: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
    """Write tensor ``groups`` and JSON ``facts`` to ``folder``; the old folder stays whole until the new one is."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if shards[-1] and used + size > SHARD_BYTES:
                shards.append({})
                used = 0
            shards[-1][f"{group}/{name}"] = tensor.detach().cpu().contiguous().clone()
            used += size
    for index, shard in enumerate(shards):
        save_file(shard, fresh / f"{index:03d}.safetensors")
    (fresh / "facts.json").write_text(json.dumps(facts), "utf-8")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def exists(folder: Path) -> bool:
    recover(folder)
    return (folder / "facts.json").is_file()


def recover(folder: Path) -> None:
    """Finish a replacement that was cut off between its two renames."""
    for suffix in (".new", ".old"):
        other = folder.with_name(folder.name + suffix)
        if not folder.exists() and (other / "facts.json").is_file():
            other.rename(folder)


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what :func:`save` wrote."""
    recover(folder)
    groups: dict[str, dict[str, Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for key, tensor in load_file(path).items():
            group, name = key.split("/", 1)
            groups.setdefault(group, {})[name] = tensor
    return groups, json.loads((folder / "facts.json").read_text("utf-8"))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's per-parameter state, flat."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": torch.as_tensor(value) for index, slots in state.items() for key, value in slots.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state = optimizer.state_dict()
    state["state"] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state["state"].setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(state)
