"""What flows into the layers that LoRAs change, for merges that look at it (:mod:`compose.refit`).

Each LoRA draws its own trigger and class alone, as :mod:`compose.profile` does, and the inputs of every layer are summed up to
their second moments ``G_k = X_k X_k^T``. No data is needed, as in Mix-of-Show; but where it keeps samples of the inputs, here
all of them count, and memory does not grow with the number of steps: ``d * d`` numbers a layer and LoRA, which are 1.1 GB a
LoRA for attention and feed-forward layers of SD 1.5, and 11 GB for those of SDXL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compose.bank import Adapter, Layer, LoraBank, OnLayer
from compose.profile import STEPS, prompts_for, solos
from compose.routes import constant
from studio.errors import OutOfMemoryError
from studio.placement import free_bytes

if TYPE_CHECKING:
    from compose.denoise import Event
    from studio.base import Base

SEED = 0


def reads_tokens(layer: nn.Module) -> bool:
    """Whether a layer multiplies every token or pixel by one matrix: linear layers, and plain convolutions of one pixel."""
    if isinstance(layer, nn.Linear):
        return True
    plain = (1, 1), (1, 1), (0, 0), 1
    return isinstance(layer, nn.Conv2d) and (layer.kernel_size, layer.stride, layer.padding, layer.groups) == plain


def moments(
    base: Base,
    adapters: Sequence[Adapter],
    layers: Mapping[str, Layer],
    *,
    steps: int = STEPS,
    on_step: OnLayer | None = None,
) -> dict[str, Tensor]:
    """``G_k`` of every layer that any LoRA changes and :func:`reads_tokens`: ``[K, d, d]``, on the CPU, by name. They are means
    over the tokens, so that a LoRA which draws longer does not count more.

    Args:
        adapters: with a weight each; it acts while they draw. layers: of the models, by the names LoRAs use.
        on_step: hears of how many steps of all prompts are done, and of how many in all; it may raise to stop.

    Raises:
        OutOfMemoryError: main memory would not hold them.
    """
    touched = {name for adapter in adapters for name in adapter.lora.layers}
    heard = {name: layer for name, layer in layers.items() if name in touched and reads_tokens(layer)}
    need = 4 * len(adapters) * sum(layer.weight.shape[1] ** 2 for layer in heard.values())
    free = free_bytes(torch.device("cpu"))
    if free is not None and need > free:
        raise OutOfMemoryError(
            f"what flows into the layers of {len(adapters)} LoRAs takes {need / 1e9:.1f} GB of main memory, and "
            f"{free / 1e9:.1f} GB are free: merge fewer LoRAs, or in another way, such as 'cat'"
        )
    found = {name: torch.zeros(len(adapters), *(layer.weight.shape[1],) * 2) for name, layer in heard.items()}
    told = [prompts_for(adapter) for adapter in adapters]
    total, done = steps * sum(map(len, told)), 0

    def stepped(event: Event) -> None:
        nonlocal done
        done += len(event.latents)
        if on_step is not None:
            on_step(done, total)

    for index, (adapter, prompts) in enumerate(zip(adapters, told, strict=True)):
        own = {name: every[index] for name, every in found.items()}
        counts: Counter[str] = Counter()
        with LoraBank.on(base, [adapter]) as bank, _hearing(heard, own, counts):
            for _ in solos(base, bank, constant([1.0]), prompts, (SEED,), steps, on_step=stepped):
                pass
        for name, moment in own.items():
            moment /= max(counts[name], 1)
    return found


@contextmanager
def _hearing(layers: Mapping[str, Layer], sums: Mapping[str, Tensor], counts: Counter[str]) -> Iterator[None]:
    """Add the second moments of what goes into ``layers`` to ``sums`` meanwhile, and how many tokens they are to ``counts``.

    Queries, keys and values read the same tensor one after the other: its moments are computed once.
    """
    last: tuple[Tensor, Tensor] | None = None

    def listen(name: str) -> Callable[..., None]:
        def add(layer: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal last
            x = args[0]
            if last is None or last[0] is not x:
                rows = (x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x).detach().flatten(0, -2).float()
                last = x, (rows.T @ rows).cpu()
            sums[name].add_(last[1])
            counts[name] += x.numel() // len(last[1])

        return add

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(listen(name)).remove)
        yield
