"""Runs that begin at a picture: Merge against truly merged models here, the other methods against their own oracles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compose.bank import Adapter
from compose.denoise import Start, denoise
from compose.merge import Merge
from compose.text import encode_pair
from studio.base import Base
from studio.lora.model import Lora
from tests.compose.test_bank import merged

Sample = Callable[..., Tensor]


def start(height: int, width: int) -> Start:
    return Start(latents=torch.randn(1, 8, height, width, generator=torch.Generator().manual_seed(5)) * 0.8, strength=0.85)


NOISE: dict[str, Any] = {}
PICTURE: dict[str, Any] = {"start": start(8, 16)}
ODD: dict[str, Any] = {"start": start(13, 9), "size": (36, 52)}
"""Higher than wide, and latents that do not halve evenly."""


@pytest.mark.parametrize("begin", [NOISE, PICTURE, ODD], ids=["noise", "picture", "odd"])
def test_merge_is_a_run_of_truly_merged_models(
    base: Base, make_lora: Callable[..., Lora], sample: Sample, begin: dict[str, Any]
) -> None:
    wanted = "attn1 attn2 conv1 text_encoder"
    pair = [Adapter("one", make_lora(1, wanted, size=0.2), 0.8), Adapter("two", make_lora(2, wanted, size=0.2), -0.5)]
    truly: Any = {part: merged(model, part, pair, [1.0, 1.0]) for part, model in base.models().items()}
    one = replace(base, **truly)
    settings = {"size": (64, 32), "steps": 6, "guidance": 4.0, "scheduler": "ddim", **begin}
    texts = encode_pair(one, ["a red apple"], ["night"])
    expected = denoise(one, *(each.rows([0, 0]) for each in texts), seeds=[0, 7], **settings)
    got = sample(Merge(), pair, seeds=[0, 7], steps=6, **begin)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (got - sample(None, seeds=[0, 7], steps=6, **begin)).abs().max() > 0.05
