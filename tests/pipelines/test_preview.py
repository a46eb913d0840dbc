"""Previews of a LoRA in training ask for what the configuration says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines import preview
from studio.lora.model import Lora, LoraDelta
from training.config import make_config


def test_previews_are_drawn_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def generate(prompt: str, **told: Any) -> SimpleNamespace:
        asked.append({"prompt": prompt, "files": [Path(one).is_file() for one in told["loras"]], **told})
        return SimpleNamespace(images=[prompt])

    monkeypatch.setattr(preview, "generate", generate)
    config = make_config(
        data=tmp_path, output=tmp_path / "zqx.safetensors", trigger="zqx", class_word="cat", clip_skip=2, preview_seed=5,
        preview_prompts=("a {trigger} {class_word}", "grass"), preview_guidance=3.5, preview_negative="blurred",
        preview_steps=7,
    )  # fmt: skip
    delta = LoraDelta(down=torch.ones(1, 4), up=torch.ones(4, 1), alpha=1.0)
    pictures = preview.previewer(config)(10, Lora(layers={"unet.conv_in": delta}, metadata={}))
    assert pictures == ["a zqx cat", "grass"] and [one["seed"] for one in asked] == [5, 6]
    for one in asked:
        assert one["files"] == [True] and one["guidance"] == 3.5 and one["negative"] == "blurred"
        assert one["clip_skip"] == 2 and one["steps"] == 7 and one["base"] == "embedded"
