"""One short way to sample with the tiny base, its LoRAs and a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from compose.bank import Adapter, LoraBank
from compose.denoise import denoise
from compose.run import Method
from compose.text import Encoded, Wording, encode_pair
from studio.base import Base
from studio.lora.model import Lora

Sample = Callable[..., Tensor]


def adapter(name: str, **metadata: str) -> Adapter:
    """A LoRA of no layers that says ``metadata``, such as trigger and class_word, of itself."""
    return Adapter(name, Lora(layers={}, metadata={f"studio.{key}": value for key, value in metadata.items()}))


@pytest.fixture(scope="session")
def sample(base: Base) -> Sample:
    """``sample(method, adapters, seeds=[0], prompt=..., **settings of denoise)`` with 5 steps of DDIM, not square, guided."""

    def run(
        method: Method | None, adapters: Sequence[Adapter] = (), *, seeds: Sequence[int] = (0,), prompt: str = "a red apple",
        negative: str = "night", **changes: Any,
    ) -> Tensor:  # fmt: skip
        settings = {"size": (64, 32), "steps": 5, "guidance": 4.0, "scheduler": "ddim", **changes}
        rows = [0] * len(seeds) * settings.get("states", 1)

        def encode() -> tuple[Encoded, Encoded]:
            uncond, cond = encode_pair(base, [prompt], [negative])
            return uncond.rows(rows), cond.rows(rows)

        settings.setdefault("wording", Wording(prompt=prompt, negative=negative))
        fuse = None if method is None else method.fuse
        with LoraBank.on(base, adapters, fuse=fuse) as bank:
            return denoise(base, *encode(), seeds=seeds, method=method, bank=bank, encode=encode, **settings)

    return run
