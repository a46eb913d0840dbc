"""A UNet's forward cut in two, as DeepCache does (Ma et al., 2024): the deep part's result can be kept and used again.

The cut lies before the last ``cut`` up blocks. What enters them there is the *feature* ``f``: it stands for everything deeper.
A shallow forward runs conv_in, the first ``cut`` down blocks (for their skip connections) and the last ``cut`` up blocks on
``f``; with the ``f`` of the same input it gives the same bits as the whole forward. The stock forward itself runs in both
cases: for a shallow one the deep blocks only hand ``f`` through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from studio.errors import RequestError


def usable_cut(unet: nn.Module, cut: int | None = None) -> int:
    """The wanted cut, or the smallest one whose shallow part has attention, where LoRAs live: SDXL's outermost have none.

    Raises:
        RequestError: no UNet with up blocks, or a cut that leaves nothing out.
    """
    ups = getattr(unet, "up_blocks", None)
    if ups is None or not hasattr(unet, "down_blocks"):
        raise RequestError("this method keeps the deep part of a UNet, and the base has none")
    if cut is None:
        reach = [index for index, block in enumerate(reversed(ups), 1) if getattr(block, "has_cross_attention", False)]
        cut = min(reach[0] if reach else 1, len(ups) - 1)
    if not 1 <= cut < len(ups):
        raise RequestError(f"cut {cut} is out of range: the base has {len(ups)} up blocks, so choose 1 to {len(ups) - 1}")
    return cut


@contextmanager
def captured(unet: Any, cut: int) -> Iterator[list[Tensor]]:
    """Features of the whole forwards made meanwhile."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    handle = unet.up_blocks[-cut].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def skipping(unet: Any, cut: int, feature: Tensor) -> Iterator[None]:
    """Forwards made meanwhile are shallow and use ``feature [rows, C, h, w]``."""
    # Handed on where a tensor is asked for and nobody looks inside.
    hollow = feature.new_empty((0, 1, 1, 1))

    def down(block: Any) -> Callable[..., Any]:
        skips = len(block.resnets) + len(block.downsamplers or ())
        return lambda *args, **kwargs: (hollow, (hollow,) * skips)

    with ExitStack() as stack:
        for layer in unet.down_blocks[cut - 1].downsamplers or ():
            stack.enter_context(replaced(layer, lambda *args, **kwargs: hollow))
        for block in unet.down_blocks[cut:]:
            stack.enter_context(replaced(block, down(block)))
        for block in (unet.mid_block, *unet.up_blocks[: -cut - 1]):
            if block is not None:
                stack.enter_context(replaced(block, lambda *args, **kwargs: hollow))
        stack.enter_context(replaced(unet.up_blocks[-cut - 1], lambda *args, **kwargs: feature))
        yield


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a while."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
