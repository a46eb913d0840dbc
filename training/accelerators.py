"""The accelerator of one training, and what to say when its memory runs out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from studio.errors import RequestError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from training.config import ConceptConfig


def launched() -> int:
    """How many processes a launcher such as ``accelerate launch`` has started; 1 without one."""
    told = os.environ.get("WORLD_SIZE", "")
    return int(told) if told.isdecimal() else 1


def check_device(config: ConceptConfig) -> None:
    """Refuse what this machine cannot compute.

    Raises:
        RequestError: half precision without a GPU, or a device that is not there.
    """
    import torch

    if config.precision == "fp16" and (config.device == "cpu" or not torch.cuda.is_available()):
        raise RequestError("precision 'fp16' needs a CUDA device: use 'fp32', or 'bf16'")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(config.device, True):
        raise RequestError(f"device '{config.device}' is asked for, but this machine has none that works: use 'auto' or 'cpu'")


def launcher_notes(config: ConceptConfig) -> list[str]:
    """What a launcher asked for and does not get."""
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "")
    own = "no" if config.precision == "fp32" else config.precision
    if told in ("", own):
        return []
    return [f"the launcher's mixed precision is '{told}', but the run's own precision counts, '{config.precision}'"]


@contextmanager
def accelerator_for(config: ConceptConfig) -> Iterator[Accelerator]:
    """A fresh accelerator; its process-wide state is cleared before and afterwards, or the next run could not choose another
    precision or device. Only a group of processes stays as it was started.

    Raises:
        RequestError: see :func:`check_device`; or several processes that do not work together.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import GradientState
    from accelerate.utils import DistributedDataParallelKwargs

    check_device(config)
    _forget()
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=config.train_text != "none")
    accelerator = Accelerator(
        # Said aloud where there is nothing else, or several processes would not find each other.
        cpu=config.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        kwargs_handlers=[kwargs],
    )
    try:
        if launched() > 1 and accelerator.num_processes == 1:
            raise RequestError(
                f"{launched()} processes were started, but on '{accelerator.device.type}' each would train alone: "
                "start one, or set device to 'cpu' or 'cuda'"
            )
        yield accelerator
    finally:
        accelerator.free_memory()
        _forget()
        GradientState._reset_state()


def _forget() -> None:
    import torch
    from accelerate.state import AcceleratorState

    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    AcceleratorState._reset_state(reset_partial_state=alone)


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def smaller(config: ConceptConfig) -> str:
    """A sentence on what would need less memory."""
    advice = []
    if config.batch > 1:
        half = config.batch // 2
        # Rows of consistency are rows of the batch: more than it has are refused.
        rows = f" and prior_batch {half}" if config.prior != "images" and (config.prior_batch or 0) > half else ""
        advice.append(f"batch {half}{rows} with accumulation {config.accumulation * 2}")
    if not config.gradient_checkpointing:
        advice.append("gradient_checkpointing true")
    if config.precision == "fp32":
        advice.append("precision bf16")
    return f"out of memory with batch {config.batch}: try {', '.join(advice) or 'a smaller resolution'}"
