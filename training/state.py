"""Resumable training state: ``checkpoint-<step>`` folders that appear whole or not at all.

Random numbers and data order are pure functions of (seed, step) in this trainer, so weights, optimiser, step and losses are
the whole state; half precision adds the scaler of its gradients. A checkpoint is written under another name, flushed to the
disk and renamed; the one before is deleted only then. A run that is killed at any moment, or whose disk fills up, keeps its
last good checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from studio.errors import FileError, RequestError
from training.finished import differences

FACTS = "facts.json"
NAME = re.compile(r"checkpoint-(\d+)(\.old)?")
"""``.old`` is one whose successor, of the same step, was about to take its name."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """``weights`` by name; ``optimizer`` a ``state_dict``; ``losses`` one per finished step; ``identity`` what the run is;
    ``scaler`` the ``state_dict`` of the gradients' scaler, empty without one."""

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    losses: tuple[float, ...]
    seconds: float
    identity: Mapping[str, Any]
    scaler: Mapping[str, Any] = field(default_factory=dict)


def save(folder: Path, state: Checkpoint) -> Path:
    """Write ``checkpoint-<step>`` into ``folder`` and delete older ones.

    Raises:
        FileError: the disk is full or not writable; older checkpoints are untouched.
    """
    final = folder / f"checkpoint-{state.step:06d}"
    fresh = folder / f".{final.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in state.weights.items()}, fresh / "weights.safetensors"
        )
        torch.save(dict(state.optimizer), fresh / "optimizer.pt")
        facts = {"step": state.step, "losses": list(state.losses), "seconds": state.seconds, "identity": dict(state.identity)}
        facts |= {"scaler": dict(state.scaler)} if state.scaler else {}
        (fresh / FACTS).write_text(json.dumps(facts), "utf-8")
        for path in fresh.iterdir():
            _flush(path)
        if final.exists():
            aside = final.with_name(f"{final.name}.old")
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
        fresh.rename(final)
        _flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(fresh, ignore_errors=True)
        raise FileError(f"cannot write the checkpoint '{final}': {_reason(error)}") from None
    for old in (*_checkpoints(folder), *folder.glob(".checkpoint-*.part")):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or str(error).splitlines()[0])


def _flush(path: Path) -> None:
    """Bring a file to the disk, and the names in a folder where the system can."""
    if path.is_dir():
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        return
    with path.open("rb+") as file:  # some systems flush only what could be written
        os.fsync(file.fileno())


def _checkpoints(folder: Path) -> list[Path]:
    """The whole ones, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and (path / FACTS).is_file()]
    return sorted(found, key=lambda path: (step_of(path), not path.suffix))


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint was written after."""
    return int(checkpoint.stem.rpartition("-")[2])


def find(folder: Path) -> Path | None:
    """The newest whole checkpoint, if there is one."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def load(path: Path, identity: Mapping[str, Any]) -> Checkpoint:
    """Read a checkpoint of the run called ``identity``.

    Raises:
        RequestError: it belongs to another configuration, data set or base; the message lists what differs.
        FileError: it cannot be read.
    """
    advice = "set restart to true to start over"
    try:
        facts = json.loads((path / FACTS).read_text("utf-8"))
        changed = differences(facts["identity"], json.loads(json.dumps(dict(identity))))
        if changed:
            raise RequestError(
                f"the run in '{path.parent}' was started with other values ({'; '.join(changed)}): "
                f"set them back to resume, or {advice}"
            )
        weights = load_file(path / "weights.safetensors")
        optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        scaler = facts.get("scaler", {})
        losses, seconds = tuple(facts["losses"]), facts["seconds"]
        return Checkpoint(facts["step"], weights, optimizer, losses, seconds, facts["identity"], scaler)
    except RequestError:
        raise
    except Exception as error:
        raise FileError(f"cannot read the checkpoint '{path}' ({_reason(error)}): {advice}") from None


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever runs inside, the global random generators (Python, NumPy, torch, CUDA) go on as if it had not."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - previews may use either generator
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
