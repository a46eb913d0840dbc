"""Text that says something else to every cross-attention layer (P+, Voynov et al., 2023, section 3; ED-LoRA, Gu et al., 2023).

A prompt with layer-wise words has the states of all layers side by side, ``[n, L, layers * d]``; plain text stays
``[n, L, d]``. Each cross-attention layer takes its own slice, in the order of a forward: down, middle, up. Rows can be picked,
joined and batched as ever, and methods that plan attention need not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from compose.routes import is_temporal

_ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


def cross_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """The cross-attention layers of ``unet`` by name, in the order of a forward."""
    found = {
        name: module
        for name, module in unet.named_modules()
        if getattr(module, "is_cross_attention", False) and not is_temporal(name)
    }
    return dict(sorted(found.items(), key=lambda item: _ORDER.get(item[0].partition(".")[0], 0)))


def slice_of(states: Tensor, index: int, width: int) -> Tensor:
    """What layer number ``index`` reads of ``states [..., width]`` or ``[..., layers * width]``."""
    return states if states.shape[-1] == width else states[..., index * width : (index + 1) * width]


@contextmanager
def reading_layers(unet: Any) -> Iterator[None]:
    """Meanwhile every cross-attention layer of ``unet`` reads its own slice of layer-wise states; plain text goes through."""
    width = int(unet.config.cross_attention_dim)
    with ExitStack() as stack:
        for index, module in enumerate(cross_layers(unet).values()):
            handle = module.register_forward_pre_hook(partial(_sliced, index=index, width=width), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _sliced(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, index: int, width: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    states = kwargs.get("encoder_hidden_states")
    if not isinstance(states, Tensor) or states.shape[-1] == width:
        return None
    return args, {**kwargs, "encoder_hidden_states": slice_of(states, index, width)}
