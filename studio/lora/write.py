"""Write LoRA files in the two layouts the field reads: diffusers (``unet.<path>.lora_A.weight``) and kohya
(``lora_unet_<path>.lora_down.weight``).

A file appears whole or not at all: it is written beside its place and renamed. diffusers' layout holds no ``alpha``, and
readers disagree on where to look for one, so there the scale is multiplied into ``up`` and alpha equals the rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from studio.embeddings import token_tensors
from studio.errors import LoraFileError, LoraValuesError, RequestError
from studio.files import whole
from studio.lora.alphas import METADATA_KEY
from studio.lora.assemble import info_of
from studio.lora.header import checked_metadata
from studio.lora.identity import commonest, guess_family
from studio.lora.model import Delta, DoraDelta, LohaDelta, LokrDelta, Lora, LoraDelta
from studio.lora.names import diffusers_to_ldm, flatten

Layout = Literal["diffusers", "kohya"]
FORMAT_VERSION = "1"

_SDXL_ATTENTION_BLOCKS = frozenset({0, 1})
_BASE_VERSION = {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0", "sd2": "sd_v2", "embedded": "studio_embedded"}
_ARCHITECTURE = {
    "sd15": "stable-diffusion-v1",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd2": "stable-diffusion-v2",
    "embedded": "studio-embedded-v1",
}


def save_lora(
    path: str | Path,
    lora: Lora,
    layout: Layout = "diffusers",
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write ``lora`` and its metadata, replacing the file at ``path`` at once or leaving it as it was.

    Args:
        path: must end in ``.safetensors``; missing folders are made.
        lora: what to write.
        layout: ``diffusers`` holds LoRA and DoRA; ``kohya`` every kind.
        metadata: added over ``lora.metadata``; flat strings. ``ss_*``, ``modelspec.*`` and ``studio.version`` that follow
            from the tensors are filled in.
        dtype: of the tensors in the file; None keeps theirs.

    Raises:
        RequestError: a path without ``.safetensors``, or an unknown layout.
        LoraFileError: a kind of layer the layout has no names for.
        LoraValuesError: NaN or infinity in a tensor.
        FileError: the folder cannot be written.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise RequestError(f"a LoRA is written as a .safetensors file, not as '{target.name}': change the ending")
    if layout not in ("diffusers", "kohya"):
        raise RequestError(f"unknown LoRA layout '{layout}': use diffusers or kohya")
    if not lora.layers and not lora.tokens:
        raise LoraFileError(f"nothing to write into {target.name}: the LoRA has no layers")
    family = guess_family(
        {module: info_of(delta) for module, delta in lora.layers.items()}, {**lora.metadata, **(metadata or {})}
    )
    tensors = _diffusers_tensors(lora.layers) if layout == "diffusers" else _kohya_tensors(lora.layers, family)
    words, named = token_tensors(lora.tokens)
    tensors |= words
    stored = {key: _storable(key, tensor, dtype, target.name) for key, tensor in tensors.items()}
    written = _described(lora, layout, family, {**lora.metadata, **(metadata or {}), **named}, target.name)
    with whole(target) as fresh:
        fresh.write_bytes(_serialised(stored, written))
    return target


def _diffusers_tensors(layers: Mapping[str, Delta]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module, delta in layers.items():
        if not isinstance(delta, LoraDelta):
            raise LoraFileError(
                f"diffusers' layout has no names for the {info_of(delta).kind} layer '{module}': write the kohya "
                "layout, or turn it into a LoRA with 'studio lora resize' first"
            )
        name = _outer_name(module)
        tensors[f"{name}.lora_A.weight"] = delta.down
        tensors[f"{name}.lora_B.weight"] = delta.up if delta.scale == 1 else delta.up * delta.scale
        if delta.magnitude is not None:
            kernel = (1,) * (delta.down.ndim - 2)
            tensors[f"{name}.lora_magnitude_vector"] = delta.magnitude.reshape(1, -1, *kernel) if kernel else delta.magnitude
    return tensors


def _outer_name(module: str) -> str:
    """With the ``text_model.`` that files have always had and every reader knows how to drop."""
    component, _, path = module.partition(".")
    inner = component.startswith("text_encoder") and path != "text_projection"
    return f"{component}.text_model.{path}" if inner else module


def _kohya_tensors(layers: Mapping[str, Delta], family: str) -> dict[str, Tensor]:
    return {
        f"{_kohya_name(module, family)}.{slot}": tensor
        for module, delta in layers.items()
        for slot, tensor in _kohya_slots(delta).items()
    }


def _kohya_name(module: str, family: str) -> str:
    """sd-scripts trains SD1.5 on diffusers' UNet but SDXL on the original one, and readers expect those names."""
    component, _, path = module.partition(".")
    if component == "unet":
        ldm = diffusers_to_ldm(path, attention_blocks=_SDXL_ATTENTION_BLOCKS) if family == "sdxl" else None
        return "lora_unet_" + flatten(ldm or path)
    prefixes = {"text_encoder": "lora_te1_" if family == "sdxl" else "lora_te_", "text_encoder_2": "lora_te2_"}
    if component not in prefixes:
        raise LoraFileError(f"kohya's layout has no names for the layer '{module}': write the diffusers layout")
    return prefixes[component] + flatten(_outer_name(module).partition(".")[2])


def _kohya_slots(delta: Delta) -> dict[str, Tensor]:
    match delta:
        case LoraDelta():
            slots = {"lora_down.weight": delta.down, "lora_up.weight": delta.up, "alpha": torch.tensor(float(delta.alpha))}
            if delta.magnitude is not None:
                slots["dora_scale"] = delta.magnitude.reshape(-1, *(1,) * (delta.down.ndim - 1))
            return slots
        case LohaDelta():
            turned = delta.t1 is not None  # the Tucker form stores both outer factors with the rank first
            slots = {f"hada_{name}": getattr(delta, name) for name in ("w1_b", "w2_b")}
            slots |= {f"hada_{name}": getattr(delta, name).T if turned else getattr(delta, name) for name in ("w1_a", "w2_a")}
            slots |= {f"hada_{name}": core for name in ("t1", "t2") if (core := getattr(delta, name)) is not None}
            return {**slots, "alpha": torch.tensor(float(delta.alpha))}
        case LokrDelta():
            return {"lokr_w1": delta.w1 * delta.scale, "lokr_w2": delta.w2}
        case DoraDelta():
            shape = (-1, 1) if delta.axis == 0 else (1, -1)
            kernel = (1,) * (len(info_of(delta).shape) - 2)
            return {**_kohya_slots(delta.inner), "dora_scale": delta.magnitude.reshape(*shape, *kernel)}


def _storable(key: str, tensor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    stored = tensor.detach().to(device="cpu", dtype=torch.float32 if key.endswith(".alpha") else dtype or tensor.dtype)
    if not bool(stored.isfinite().all()):
        raise LoraValuesError(f"{name} is not written: tensor '{key}' holds NaN or infinity{f' as {dtype}' if dtype else ''}")
    return stored.clone(memory_format=torch.contiguous_format)  # no two tensors may share memory in a file


def _described(lora: Lora, layout: Layout, family: str, given: Mapping[str, str], name: str) -> dict[str, str]:
    """The metadata of the file: what is given, and what follows from the tensors."""
    infos = {module: info_of(delta) for module, delta in lora.layers.items()}
    alphas = {module: float(getattr(delta, "alpha", infos[module].rank)) for module, delta in lora.layers.items()}
    rank = commonest(info.rank for info in infos.values()) if infos else 0
    alpha = commonest(alphas.values()) if layout == "kohya" and infos else float(rank)
    plain = all(info.kind in ("lora", "dora") for info in infos.values())
    followed = {
        "studio.version": FORMAT_VERSION,
        "studio.family": family,
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": _BASE_VERSION.get(family, family),
        "ss_output_name": given.get("studio.name", given.get("modelspec.title", "")),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{_ARCHITECTURE.get(family, family)}/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers"
        if layout == "diffusers"
        else "https://github.com/kohya-ss/sd-scripts",
        "modelspec.trigger_phrase": given.get("studio.trigger", ""),
    }
    kept = {
        key: value
        for key, value in given.items()
        if key != METADATA_KEY and key not in ("ss_network_dim", "ss_network_alpha", "ss_network_module")
    }
    # A family nobody could tell is left out rather than named: readers compare it.
    complete = {**{key: value for key, value in followed.items() if value and "unknown" not in value}, **kept}
    if layout == "diffusers" and lora.layers:
        complete[METADATA_KEY] = json.dumps(_peft_config(lora.layers), sort_keys=True)
    return checked_metadata(complete, name)


def _peft_config(layers: Mapping[str, Delta]) -> dict[str, object]:
    """PEFT's configuration of every component, as diffusers stores it: once one component has it, diffusers expects it of all.

    Patterns have no ``^``: text encoders carry an outer ``text_model.`` in some versions of transformers and not in others.
    """
    config: dict[str, object] = {}
    for component in sorted({module.partition(".")[0] for module in layers}):
        deltas = {module.partition(".")[2]: delta for module, delta in layers.items() if module.startswith(f"{component}.")}
        ranks = {path: info_of(delta).rank for path, delta in deltas.items()}
        common = commonest(ranks.values())
        odd = {path: rank for path, rank in ranks.items() if rank != common}
        part = {
            "r": common,
            "lora_alpha": common,
            "rank_pattern": odd,
            "alpha_pattern": odd,
            "target_modules": sorted(deltas),
            "use_dora": any(isinstance(delta, LoraDelta) and delta.magnitude is not None for delta in deltas.values()),
            "lora_bias": False,
            "bias": "none",
            "peft_type": "LORA",
        }
        config |= {f"{component}.{key}": value for key, value in part.items()}
    return config


def _serialised(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The file's bytes, with the hash of its tensors (``sshs_model_hash``) by which A1111 names a LoRA in its records.

    The metadata is put in here, sorted: the library writes it in random order, and equal LoRAs should be equal files.
    """
    from safetensors.torch import save

    bare = save(tensors)
    end = 8 + int.from_bytes(bare[:8], "little")
    digest = hashlib.sha256(memoryview(bare)[end:]).hexdigest()
    described = {**metadata, "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    header = {"__metadata__": dict(sorted(described.items())), **json.loads(bare[8:end])}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + bare[end:]
