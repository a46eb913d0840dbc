"""The accelerator of one training, and what to say when its memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from studio.errors import RequestError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from training.config import ConceptConfig


@contextmanager
def accelerator_for(config: ConceptConfig) -> Iterator[Accelerator]:
    """A fresh accelerator; its process-wide state is cleared afterwards, or the next run could not choose another precision.

    Raises:
        RequestError: half precision without a GPU, or a device that is not there.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedDataParallelKwargs

    if config.precision == "fp16" and (config.device == "cpu" or not torch.cuda.is_available()):
        raise RequestError("precision 'fp16' needs a CUDA device: use 'fp32', or 'bf16'")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(config.device, True):
        raise RequestError(f"device '{config.device}' is asked for, but this machine has none that works: use 'auto' or 'cpu'")
    AcceleratorState._reset_state()
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=config.train_text != "none")
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        kwargs_handlers=[kwargs],
    )
    try:
        yield accelerator
    finally:
        accelerator.free_memory()
        AcceleratorState._reset_state()
        GradientState._reset_state()


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def smaller(config: ConceptConfig) -> str:
    """A sentence on what would need less memory."""
    advice = []
    if config.batch > 1:
        advice.append(f"batch {config.batch // 2} with accumulation {config.accumulation * 2}")
    if not config.gradient_checkpointing:
        advice.append("gradient_checkpointing true")
    if config.precision == "fp32":
        advice.append("precision bf16")
    return f"out of memory with batch {config.batch}: try {', '.join(advice) or 'a smaller resolution'}"
