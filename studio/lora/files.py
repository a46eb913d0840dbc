"""Read, check and match LoRA files of any trainer. All or nothing: every tensor is accounted for, or the file is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.embeddings import read_tokens, token_words
from studio.errors import DamagedFileError, FileError, LoraShapeError, LoraValuesError, UnknownFormatError
from studio.lora.alphas import layer_alphas
from studio.lora.formats import Placement, place_all
from studio.lora.header import FLOATS, LIMITS, Limits, RawHeader, read_raw_header, scalar_values
from studio.lora.identity import LoraHeader, guess_family, guess_trainer
from studio.lora.library import find_lora as find_lora
from studio.lora.names import module_key
from studio.lora.shapes import LayerInfo, describe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from studio.lora.model import Delta, Lora
    from studio.lora.write import save_lora as save_lora


def __getattr__(name: str) -> Any:
    if name == "save_lora":  # not imported above: writing needs torch, looking does not
        from studio.lora.write import save_lora

        return save_lora
    raise AttributeError(f"module 'studio.lora.files' has no attribute '{name}'")


def read_header(path: str | Path, *, limits: Limits = LIMITS) -> LoraHeader:
    """What a LoRA file is, from its header alone (and the few bytes of its ``alpha`` numbers).

    Raises:
        FileError: and its kinds, see :mod:`studio.lora.header`; a file with tensors that have no place is refused too.
    """
    raw = read_raw_header(Path(path), limits)
    return _identify(raw, place_all(raw.tensors, name=raw.path.name), limits)


def load_lora(path: str | Path, *, dtype: torch.dtype | None = None, limits: Limits = LIMITS) -> Lora:
    """Read a whole LoRA file of any known format.

    Args:
        path: a safetensors file.
        dtype: of the tensors returned; None means float32.
        limits: caps on size, count and rank.

    Raises:
        LoraFileError: unknown format, wrong shapes, NaN or infinity.
        UnsafeFileError: pickles, caps, path tricks.
    """
    import torch

    from studio.lora.model import Lora

    raw = read_raw_header(Path(path), limits)
    placement = place_all(raw.tensors, name=raw.path.name)
    header = _identify(raw, placement, limits)
    tensors = {key: tensor.to(dtype or torch.float32) for key, tensor in _tensors(raw)}
    words = {key: tensors.pop(key) for key in placement.tokens}
    return Lora(
        layers=assemble_layers(tensors, placement, header.alphas, name=raw.path.name, limits=limits),
        metadata=dict(header.metadata),
        source=raw.path,
        sha256=file_sha256(raw.path),
        tokens=read_tokens(words, header.metadata, raw.path.name) if words else {},
    )


def check_values(path: str | Path, *, limits: Limits = LIMITS) -> None:
    """Read every tensor of a file once, one at a time, and keep none.

    Raises:
        LoraValuesError: NaN or infinity in some tensor.
    """
    raw = read_raw_header(Path(path), limits)
    for key, tensor in _tensors(raw):
        _require_finite(tensor.float(), key, raw.path.name)


def _tensors(raw: RawHeader) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(raw.path, framework="pt") as file:
            for key in raw.tensors:
                yield key, file.get_tensor(key)
    except SafetensorError as error:
        raise DamagedFileError(f"{raw.path.name} is damaged: {error}") from error


def _require_finite(tensor: Tensor, key: str, name: str) -> None:
    if not bool(tensor.isfinite().all()):
        raise LoraValuesError(f"{name} is refused: tensor '{key[:100]}' holds NaN or infinity, so its training diverged")


def assemble_layers(
    tensors: Mapping[str, Tensor],
    placement: Placement,
    alphas: Mapping[str, float | None],
    *,
    name: str,
    limits: Limits = LIMITS,
) -> dict[str, Delta]:
    """The deltas of every layer of a placed state dict.

    Raises:
        LoraValuesError: NaN or infinity in some tensor.
        LoraShapeError: tensors of a layer that do not fit together.
    """
    from studio.lora.assemble import build

    for key, tensor in tensors.items():
        _require_finite(tensor, key, name)
    return {
        module: build(module, {slot: tensors[key] for slot, key in slots.items()}, alphas[module], limits.rank)
        for module, slots in placement.layers.items()
    }


def file_sha256(path: Path) -> str:
    """Identity of a file whatever its name."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Match:
    """How a LoRA meets a base: module paths that fit, that the base lacks, and that have another shape there."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    wrong_shape: tuple[str, ...]

    @property
    def total(self) -> int:
        return len(self.matched) + len(self.missing) + len(self.wrong_shape)

    @property
    def complete(self) -> bool:
        return len(self.matched) == self.total

    def __str__(self) -> str:
        return f"{len(self.matched)} of {self.total} layers matched"


def check_against(lora: Lora | LoraHeader, module_shapes: Mapping[str, tuple[int, ...]]) -> Match:
    """Compare a LoRA, or just its header, with the weights of a base.

    Args:
        lora: a loaded LoRA or a header.
        module_shapes: weight shape by module path, ``unet.<path>`` and so on: see :func:`module_shapes`.
    """
    matched, missing, wrong = [], [], []
    for module, info in layer_infos(lora).items():
        if module not in module_shapes:
            missing.append(module)
        elif shapes_agree(info.shape, tuple(module_shapes[module])):
            matched.append(module)
        else:
            wrong.append(module)
    return Match(tuple(matched), tuple(missing), tuple(wrong))


def require_match(lora: Lora | LoraHeader, module_shapes: Mapping[str, tuple[int, ...]], *, name: str, base: str) -> Match:
    """:func:`check_against`, refusing a partial match.

    Raises:
        LoraShapeError: some layer has no place in the base.
    """
    match = check_against(lora, module_shapes)
    if not match.complete:
        odd = (match.wrong_shape or match.missing)[0]
        why = "has another shape there" if match.wrong_shape else "is not there"
        raise LoraShapeError(f"LoRA '{name}' does not fit base '{base}': {match} (for example '{odd}' {why})")
    return match


def module_shapes(**components: torch.nn.Module | None) -> dict[str, tuple[int, ...]]:
    """Weight shapes by module path of the models a LoRA may act on: ``module_shapes(unet=unet, text_encoder=text_encoder)``."""
    shapes: dict[str, tuple[int, ...]] = {}
    for component, model in components.items():
        for name, module in model.named_modules() if model is not None else ():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.ndim >= 2:
                shapes[module_key(component, name)] = tuple(weight.shape)
    return shapes


def shapes_agree(change: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a ``dW`` fits: a linear layer may come as a 1x1 convolution and back, and a kernel may be flattened."""
    if len(change) == len(weight):
        return change == weight
    return change[0] == weight[0] and prod(change) == prod(weight)


def layer_infos(lora: Lora | LoraHeader) -> Mapping[str, LayerInfo]:
    """Kind, rank and shape of every layer."""
    if isinstance(lora, LoraHeader):
        return lora.layers
    from studio.lora.assemble import info_of

    return {module: info_of(delta) for module, delta in lora.layers.items()}


def _identify(raw: RawHeader, placement: Placement, limits: Limits) -> LoraHeader:
    alpha_keys: dict[str, str] = {}
    for module, slots in placement.layers.items():
        for slot, key in slots.items():
            if slot == "alpha":
                alpha_keys[module] = key
            elif raw.tensors[key].dtype not in FLOATS:
                raise UnknownFormatError(
                    f"{raw.path.name} is refused: '{key[:100]}' holds {raw.tensors[key].dtype} numbers, not weights"
                )
    layers = {}
    for module, slots in placement.layers.items():
        try:
            layers[module] = describe(module, {slot: raw.tensors[key].shape for slot, key in slots.items()}, limits.rank)
        except FileError as error:
            raise type(error)(f"{raw.path.name} is refused: {error}") from error
    for key in placement.tokens:
        if raw.tensors[key].dtype not in FLOATS:
            raise UnknownFormatError(f"{raw.path.name} is refused: '{key}' holds {raw.tensors[key].dtype} numbers, not vectors")
    values = scalar_values(raw, alpha_keys.values())
    for module, key in alpha_keys.items():
        if key not in values:
            raise LoraValuesError(
                f"{raw.path.name} is refused: the alpha of layer '{module}' is stored as {raw.tensors[key].dtype}"
            )
    given = {module: values[key] for module, key in alpha_keys.items()}
    alphas = layer_alphas(raw.path, layers, given, raw.metadata, peft=placement.format == "peft")
    return LoraHeader(
        path=raw.path,
        file_bytes=raw.file_bytes,
        format=placement.format,
        family=guess_family(layers, raw.metadata),
        trainer=guess_trainer(placement.format, raw.metadata),
        layers=layers,
        alphas=alphas,
        metadata=raw.metadata,
        tensors=len(raw.tensors),
        tokens=tuple(token_words(placement.tokens, raw.metadata, raw.path.name)) if placement.tokens else (),
    )
