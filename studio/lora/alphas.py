"""The scale of each layer: ``alpha`` tensors, else PEFT's configuration, else the rank.

PEFT keeps ``lora_alpha`` outside the tensors: in diffusers' ``lora_adapter_metadata``, or in ``adapter_config.json`` beside
the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studio.errors import DamagedFileError, LoraValuesError
from studio.lora.shapes import LayerInfo

METADATA_KEY = "lora_adapter_metadata"
_CONFIG_BYTES = 2**20
_PLAIN_PATTERN = re.compile(r"\^?[A-Za-z0-9_.\\]+\$?")


def layer_alphas(
    path: Path,
    layers: Mapping[str, LayerInfo],
    given: Mapping[str, float],
    metadata: Mapping[str, str],
    *,
    peft: bool,
) -> dict[str, float | None]:
    """``alpha`` of every layer; None where a file names none, which means a scale of 1.

    Args:
        path: of the LoRA file.
        layers: what the header tells of each.
        given: the values of the ``alpha`` tensors.
        metadata: of the file.
        peft: whether the file is PEFT's own, with its configuration in ``adapter_config.json`` beside it.

    Raises:
        LoraValuesError: an alpha that is no finite number.
        DamagedFileError: a PEFT configuration that cannot be read.
    """
    config = _adapter_metadata(metadata, path) or (_config_beside(path) if peft else {})
    alphas: dict[str, float | None] = {}
    for module, info in layers.items():
        alpha = given[module] if module in given else _configured(module, info.rank, config, path)
        if alpha is not None and not math.isfinite(alpha):
            raise LoraValuesError(f"{path.name} is refused: the alpha of layer '{module}' is {alpha}")
        alphas[module] = alpha
    return alphas


def _adapter_metadata(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    return _table(metadata.get(METADATA_KEY, "{}"), f"the metadata '{METADATA_KEY}' of {path.name}")


def _config_beside(path: Path) -> dict[str, Any]:
    file = path.with_name("adapter_config.json")
    if not file.is_file():
        return {}
    if file.stat().st_size > _CONFIG_BYTES:
        raise DamagedFileError(f"{file} is too large to be the configuration of an adapter")
    return _table(file.read_text(encoding="utf-8", errors="replace"), str(file))


def _table(text: str, where: str) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{where} is not readable JSON ({type(error).__name__})") from error
    if not isinstance(table, dict):
        raise DamagedFileError(f"{where} is not a table")
    return table


def _configured(module: str, rank: int, config: Mapping[str, Any], path: Path) -> float | None:
    component, _, name = module.partition(".")
    part = {
        key.removeprefix(f"{component}."): value for key, value in config.items() if key.startswith(f"{component}.")
    } or config
    alpha = _by_pattern(part.get("alpha_pattern") or {}, name, path)
    alpha = part.get("lora_alpha") if alpha is None else alpha
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise DamagedFileError(
            f"the adapter configuration of {path.name} has the lora_alpha {str(alpha)[:40]!r}, which is no number"
        )
    return float(alpha) * (math.sqrt(rank) if part.get("use_rslora") else 1.0)


def _by_pattern(patterns: Any, name: str, path: Path) -> Any:
    """PEFT's patterns are regular expressions; only plain names are followed, so that a file cannot make us run its own."""
    if not isinstance(patterns, dict) or not all(_PLAIN_PATTERN.fullmatch(pattern) for pattern in patterns):
        raise DamagedFileError(f"the adapter configuration of {path.name} has an alpha_pattern that is no list of module names")
    for pattern, alpha in patterns.items():
        plain = pattern.removesuffix("$").replace("\\.", ".").removeprefix("^")
        bare = plain.removeprefix("text_model.")
        if name == bare or (not pattern.startswith("^") and name.endswith(f".{bare}")):
            return alpha
    return None
