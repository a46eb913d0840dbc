"""The finished LoRA file: deltas and the metadata that people and other programs look for."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from studio.lora.model import Lora, LoraDelta

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from studio.lora.write import Layout
    from training.plan import Plan

    Words = Mapping[str, Mapping[str, Tensor]]

TAGS = 200
"""Captions recorded at most: a header is read whole by every program that lists LoRAs."""
KNOWN_ELSEWHERE = frozenset(["sd15", "sd2", "sdxl"])
"""Families for which ComfyUI and A1111 know kohya's names."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def metadata(plan: Plan, step: int) -> dict[str, str]:
    """Our keys, sd-scripts' ``ss_*`` and ``modelspec.*``. No date, machine or folder: equal runs give equal files."""
    config, family = plan.config, plan.base.family.name
    identity = plan.identity()
    largest = max(plan.buckets, key=lambda size: (size[0] * size[1], size))
    optional = {
        "ss_text_encoder_lr": config.text_rate if config.text_lora else None,
        "ss_min_snr_gamma": config.min_snr,
        "ss_caption_dropout_rate": config.caption_dropout or None,
        "ss_noise_offset": config.noise_offset or None,
        "ss_prior_loss_weight": config.prior_weight if config.prior != "none" else None,
        "ss_epoch": config.epochs,
        "ss_clip_skip": config.clip_skip if config.clip_skip > 1 else None,
        "ss_shuffle_caption": config.shuffle_caption or None,
        "ss_keep_tokens": config.keep_tokens if config.shuffle_caption else None,
        "ss_max_token_length": plan.chunks * (plan.base.context_length - 2) if plan.chunks > 1 else None,
        "ss_loss_type": config.loss if config.loss != "l2" else None,
        "ss_huber_c": config.huber_c if config.loss != "l2" else None,
        "ss_huber_schedule": config.huber_schedule if config.loss != "l2" else None,
    }
    values: dict[str, object] = {
        "studio.trigger": config.trigger,
        "studio.class_word": config.class_word,
        "studio.kind": config.kind,
        "studio.family": family,
        "studio.base": plan.base.name,
        "studio.base_sha256": plan.base.sha256,
        "studio.config": json.dumps(identity, sort_keys=True),
        "studio.config_sha256": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        "modelspec.title": config.output.stem,
        "modelspec.resolution": f"{largest[0]}x{largest[1]}",
        "modelspec.trigger_phrase": f"{config.trigger} {config.class_word}".strip(),
        "modelspec.prediction_type": {"v_prediction": "v"}.get(plan.base.scheduler.config["prediction_type"], "epsilon"),
        "ss_output_name": config.output.stem,
        "ss_sd_model_name": plan.base.name,
        "ss_new_sd_model_hash": plan.base.sha256,
        "ss_learning_rate": config.learning_rate,
        "ss_unet_lr": config.learning_rate,
        "ss_optimizer": config.optimizer,
        "ss_lr_scheduler": config.schedule,
        "ss_lr_warmup_steps": config.warmup,
        "ss_num_train_images": sum(p.repeats for p in plan.pictures) * config.repeats,
        "ss_steps": step,
        "ss_max_train_steps": plan.steps,
        "ss_total_batch_size": config.batch * config.accumulation,
        "ss_gradient_accumulation_steps": config.accumulation,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_mixed_precision": {"fp32": "no"}.get(config.precision, config.precision),
        "ss_seed": config.seed,
        "ss_resolution": json.dumps(largest),
        "ss_enable_bucket": config.buckets,
        "ss_tag_frequency": json.dumps({config.data.name: dict(Counter(plan.captions).most_common(TAGS))}, sort_keys=True),
    }
    values |= {key: value for key, value in optional.items() if value is not None}
    return {key: str(value) for key, value in sorted(values.items())}


def make_lora(plan: Plan, deltas: Mapping[str, LoraDelta], step: int, tokens: Words | None = None) -> Lora:
    """The LoRA after ``step`` steps, in the precision it is saved in; learnt words stay in single precision."""
    dtype = DTYPES[plan.config.save_precision]
    cast = {key: replace(delta, down=delta.down.to(dtype), up=delta.up.to(dtype)) for key, delta in deltas.items()}
    return Lora(layers=cast, metadata=metadata(plan, step), tokens=tokens or {})


def layout_of(asked: Literal["auto", "diffusers", "kohya"], family: str) -> Layout:
    """The names a file has: what was ``asked``, and left open, those that most programs read for a base of ``family``."""
    if asked != "auto":
        return asked
    return "kohya" if family in KNOWN_ELSEWHERE else "diffusers"


def write(path: Path, lora: Lora, layout: Layout) -> None:
    """Save ``lora`` at ``path``, which appears whole or not at all.

    Raises:
        FileError: the disk is full or not writable.
    """
    from studio.lora.write import save_lora

    save_lora(path, lora, layout=layout)
