"""Previews of a LoRA in training, drawn as :func:`pipelines.generate` would draw them with the finished file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pipelines.image import generate
from studio.lora.write import save_lora
from training.plan import memory_for

if TYPE_CHECKING:
    from PIL.Image import Image

    from studio.lora.model import Lora
    from training.config import ConceptConfig

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def previewer(config: ConceptConfig) -> Callable[[int, Lora], list[Image]]:
    """What :func:`training.train_concept` takes as ``preview``: one picture for each prompt, always with the same seeds."""
    prompts = [config.fill(text) for text in config.preview_prompts or (config.template,)]

    def preview(step: int, lora: Lora) -> list[Image]:
        with TemporaryDirectory() as folder:
            file = save_lora(Path(folder) / config.output.name, lora)
            return [
                generate(
                    prompt,
                    base=config.base,
                    loras=[str(file)],
                    seed=config.preview_seed + index,
                    steps=config.preview_steps,
                    guidance=config.preview_guidance,
                    negative=config.preview_negative,
                    clip_skip=config.clip_skip,
                    device=config.device,
                    dtype=DTYPES[config.precision],
                    memory=memory_for(config.device),  # as for training, so that it is the same base and not a second one
                    progress=False,
                ).images[0]
                for index, prompt in enumerate(prompts)
            ]

    return preview
