"""Which fused attention computes: torch's own, or xformers where it is installed and proves itself on the card.

Every kernel has the layout ``q [B, H, M, d], k, v [B, H, N, d] -> [B, H, M, d]`` and scales by ``d^-1/2``. diffusers'
``set_attention_backend`` does nothing for a UNet, and its switch for xformers replaces every processor: so the choice is ours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

Kernel = Callable[..., Tensor]
"""``kernel(q, k, v, mask=None)``; a mask is what torch's own takes."""

BATCH_LIMIT = 65535
"""The largest batch an xformers kernel can be launched with."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Torch's scaled dot product attention: it picks flash, memory-efficient or plain by itself."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def in_xformers_layout(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Kernel:
    """A kernel from a function over xformers' ``[B, M, H, K]``, such as ``memory_efficient_attention``.

    Masked attention goes to torch: xformers wants its biases padded and aligned.
    """

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            return sdpa(q, k, v, mask)
        parts = zip(*(each.transpose(1, 2).split(BATCH_LIMIT) for each in (q, k, v)), strict=True)
        return torch.cat([attend(*part) for part in parts]).transpose(1, 2)

    return kernel


@torch.no_grad()
def proves_itself(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_sizes: Iterable[int]) -> str:
    """Compare ``kernel`` with exact attention at every head size, for image and for text keys. Takes well under a second.

    Returns:
        "" when all is well, else what went wrong.
    """
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    generator = torch.Generator("cpu").manual_seed(0)
    for size in sorted(set(head_sizes)):
        for keys in (256, 77):
            q, k, v = (torch.randn(2, 4, n, size, generator=generator) for n in (256, keys, keys))
            exact = torch.softmax(q @ k.transpose(-1, -2) * size**-0.5, -1) @ v
            try:
                got = kernel(*(each.to(device, dtype) for each in (q, k, v)))
            except Exception as error:  # whatever a foreign kernel raises on a card it was not built for
                return f"head size {size}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            off = float((got.float().cpu() - exact).abs().max())
            if not off <= tolerance:
                return f"head size {size}: off by {off:.2g}"
    return ""


@cache
def choose(device: torch.device, dtype: torch.dtype, head_sizes: tuple[int, ...]) -> tuple[Kernel, str]:
    """The kernel for a device, and a sentence about why when xformers is there and not used."""
    if device.type != "cuda" or importlib.util.find_spec("xformers") is None:
        return sdpa, ""
    try:
        from xformers.ops import memory_efficient_attention
    except Exception as error:  # built for another torch or CUDA
        return sdpa, f"xformers cannot be imported ({type(error).__name__}): torch's own attention is used"
    kernel = in_xformers_layout(memory_efficient_attention)
    trouble = proves_itself(kernel, device, dtype, head_sizes)
    return (sdpa, f"xformers fails its self-test ({trouble}): torch's own attention is used") if trouble else (kernel, "")
