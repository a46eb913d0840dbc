"""Other files made into ours: pickles of old trainers, on request only, and one layout into the other."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studio.embeddings import read_tokens
from studio.errors import FileError, FileLimitError, PickleRefusedError, UnknownFormatError
from studio.lora.alphas import layer_alphas
from studio.lora.assemble import info_of
from studio.lora.files import assemble_layers
from studio.lora.formats import Placement, place_all
from studio.lora.header import LIMITS, Limits
from studio.lora.identity import guess_family
from studio.lora.model import Lora
from studio.lora.shapes import describe
from studio.lora.write import Layout, save_lora

_WRAPPERS = ("state_dict", "module", "model")


def convert_pickle(path: str | Path, out: str | Path, *, layout: Layout = "diffusers", limits: Limits = LIMITS) -> Path:
    """Read a pickled LoRA such as AnimateDiff's ``.ckpt`` with torch's restricted unpickler and write it as safetensors.

    Only tensors and plain containers are let through; a file that asks for more is refused, not executed. Still: convert only
    what you trust.

    Args:
        path: ``.ckpt``, ``.pt``, ``.pth`` or ``.bin``.
        out: the ``.safetensors`` file to write.
        layout: of ``out``.
        limits: caps on size, count and rank.

    Raises:
        FileError: missing or unreadable.
        PickleRefusedError: it needs code to be read, or is no pickle torch knows.
        FileLimitError: over a cap.
        LoraFileError: its tensors are no LoRA known here.
    """
    source = Path(path)
    lora = lora_from_state_dict(_tensors(_unpickled(source, limits), source.name, limits), name=source.name, limits=limits)
    return save_lora(out, lora, layout)


def lora_from_state_dict(
    state: Mapping[str, Tensor], *, name: str, metadata: Mapping[str, str] | None = None, limits: Limits = LIMITS
) -> Lora:
    """A LoRA from tensors in memory, of any trainer.

    Raises:
        LoraFileError: unknown format, wrong shapes, NaN or infinity.
    """
    placement = place_all(state, name=name)
    shapes = _slot_shapes(state, placement)
    layers = {module: describe(module, slots, limits.rank) for module, slots in shapes.items()}
    given = {module: float(state[slots["alpha"]]) for module, slots in placement.layers.items() if "alpha" in slots}
    alphas = layer_alphas(Path(name), layers, given, metadata or {}, peft=False)
    floats = {key: tensor.detach().float() for key, tensor in state.items()}
    deltas = assemble_layers(floats, placement, alphas, name=name, limits=limits)
    family = guess_family({module: info_of(delta) for module, delta in deltas.items()}, metadata or {})
    words = {key: floats[key] for key in placement.tokens}
    return Lora(
        layers=deltas,
        metadata={**(metadata or {}), "studio.family": family},
        tokens=read_tokens(words, metadata or {}, name) if words else {},
    )


def _slot_shapes(state: Mapping[str, Tensor], placement: Placement) -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        module: {slot: tuple(state[key].shape) for slot, key in slots.items()} for module, slots in placement.layers.items()
    }


def _unpickled(path: Path, limits: Limits) -> Any:
    try:
        _check_size(path.stat().st_size, path.name, limits)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # a packed archive can be a thousand times its size
                _check_size(sum(entry.file_size for entry in archive.infolist()), path.name, limits)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except FileLimitError:
        raise
    except Exception as error:  # torch raises whatever a hostile pickle provokes; none of it may pass as a bug of ours
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise PickleRefusedError(f"{path.name} cannot be read without running code, so it is refused ({first})") from error


def _tensors(content: Any, name: str, limits: Limits) -> dict[str, Tensor]:
    """The state dict inside, without what lies beside it (epoch, step) and without distributed training's ``module.``."""
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise UnknownFormatError(f"{name} holds no state dict but a {type(content).__name__}")
    tensors = {
        key.removeprefix("module."): value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise UnknownFormatError(f"{name} holds no tensors")
    if len(tensors) > limits.tensors:
        raise FileLimitError(f"{name} holds {len(tensors)} tensors, more than the {limits.tensors} a LoRA may have")
    _check_size(sum(math.prod(tensor.shape) * 4 for tensor in tensors.values()), name, limits)
    return tensors


def _check_size(size: int, name: str, limits: Limits) -> None:
    if size > limits.file_bytes:
        cap = limits.file_bytes / 2**30
        raise FileLimitError(f"{name} holds {size / 2**30:.1f} GiB, more than the {cap:.1f} GiB a LoRA may have")
