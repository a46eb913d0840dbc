"""Load a base model: the embedded one, a stock diffusers folder, a single-file checkpoint, or a hub id.

Only safetensors weights are ever read, and only a hub id touches the network.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from studio.checkpoint import LIMITS, identify, read_vae
from studio.errors import FileError, MissingAssetError, RequestError, UnknownNameError, UnsafeFileError
from studio.family import FAMILIES, Family, detect
from studio.hashes import sha256_of
from studio.lora.header import read_raw_header
from studio.paths import EMBEDDED, assets
from studio.placement import Placement, Turns, fitted, place

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PARTS = ("tokenizer", "scheduler", "text_encoder", "unet", "vae")
WEIGHTED = ("unet", "text_encoder", "text_encoder_2", "vae")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
PATH_VARIABLE = "STUDIO_MODEL_PATH"
"""Folders with bases that are known by name, separated as in PATH."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Base:
    """A loaded base model: stock diffusers and transformers objects, in evaluation mode, without gradients.

    ``sha256`` identifies the weights, see :func:`base_sha256`. ``source`` is the file or folder. ``vae_name`` and
    ``vae_sha256`` are filled in when the VAE is another than the base's own. ``text_encoder_2`` and ``tokenizer_2`` exist for
    SDXL only. The VAE stays in single precision: half precision overflows in many of them.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: SchedulerMixin
    family: Family
    name: str
    sha256: str
    source: Path
    placement: Placement
    tokenizer_2: CLIPTokenizer | None = None
    text_encoder_2: CLIPTextModelWithProjection | None = None
    vae_name: str = ""
    vae_sha256: str = ""

    @property
    def device(self) -> torch.device:
        """Where it computes; with offload its models may lie elsewhere meanwhile."""
        return self.placement.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def latent_factor(self) -> int:
        """Pixels per latent cell along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def latent_channels(self) -> int:
        return int(self.unet.config.in_channels)

    @property
    def size_step(self) -> int:
        """The smallest side of a picture; sides chosen here are multiples of it, so that the UNet halves them without a rest.

        Others need only be multiples of the latent factor: where halving leaves a rest, the UNet rounds up.
        """
        return self.latent_factor * int(2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def context_length(self) -> int:
        """Tokens the text encoder reads at once, with its begin and end tokens."""
        return int(self.text_encoder.config.max_position_embeddings)

    def models(self) -> dict[str, torch.nn.Module]:
        """The modules a LoRA may name, by the first part of its keys."""
        found: dict[str, torch.nn.Module] = {"unet": self.unet, "text_encoder": self.text_encoder}
        if self.text_encoder_2 is not None:
            found["text_encoder_2"] = self.text_encoder_2
        return found


_LOADED: dict[tuple[Path, Path | None, Placement], Base] = {}


def load_base(
    name: str | Path = EMBEDDED,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    vae: str | None = None,
    memory: str = "auto",
) -> Base:
    """The base called ``name``; loaded once per process, VAE and placement.

    Args:
        name: ``"embedded"``, a stock diffusers folder, a single-file checkpoint, a name below ``STUDIO_MODEL_PATH``, or a hub
            id ``owner/name``.
        device, dtype, memory: see :func:`studio.placement.place`.
        vae: another VAE than the base's own: a file, a diffusers folder or a hub id.

    Raises:
        UnknownNameError, RequestError, FileError, UnsafeFileError: see the sentence.
    """
    source = locate(str(name))
    if source.is_file():
        checkpoint, facts = identify(source), {}
        family, title = FAMILIES[checkpoint.family], source.stem
    else:
        checkpoint, facts = None, read_json(source / "studio.json") if (source / "studio.json").is_file() else {}
        title = str(facts.get("name") or (source.name if Path(name).exists() else name))
        told = facts.get("family")
        family = detect(read_json(source / "unet" / "config.json"), title, None if told is None else str(told))
    other = None if vae is None else locate_vae(vae)
    asked = place(family, device, dtype, memory)
    key = (source, other, asked)  # without offload: how much memory is free changes with every base that is loaded
    if key not in _LOADED:
        placement = fitted(asked, lambda: _numbers(source))
        with quiet():
            parts = checkpoint.read(*_at(placement)) if checkpoint else read_folder(source, *_at(placement))
            if other is not None:
                parts["vae"] = _other_vae(other, family).to(_at(placement)[0])
        if parts["vae"] is None:
            raise FileError(f"{source.name} holds no VAE: give one with --vae")
        _check_vae(parts["vae"], int(parts["unet"].config.in_channels), str(vae or name))
        digest = base_sha256(source)
        marks = {"vae_name": other.stem if other.is_file() else other.name, "vae_sha256": _any_sha256(other)} if other else {}
        base = Base(**parts, **marks, family=family, name=title, sha256=digest, source=source, placement=placement)
        _LOADED[key] = _placed(base)
    return _LOADED[key]


def forget_bases() -> None:
    """Drop every loaded base, so that its memory can be used for another."""
    _LOADED.clear()


def locate(name: str) -> Path:
    """The folder or single file of the base called ``name``; downloads a hub id when the hub can be reached."""
    if name == EMBEDDED:
        folder = assets() / "base"
        if not (folder / "unet").is_dir():
            raise MissingAssetError(f"the embedded base is not in {folder}: reinstall diffusion-customization-studio")
        return folder.resolve()
    path = Path(name).expanduser()
    known = {} if path.exists() else known_bases()
    if name.removesuffix(".safetensors") in known:
        path = known[name.removesuffix(".safetensors")]
    if path.is_dir():
        return _checked_folder(path)
    if path.is_file():
        return path.resolve()
    if HUB_ID.fullmatch(name) and not name.startswith((".", "~")):
        wanted = ["*.json", "*/*.json", "tokenizer*/*", *(f"{part}/*.safetensors" for part in WEIGHTED)]
        return _checked_folder(_from_hub(name, "base", wanted))
    beside = [entry.name for entry in Path.cwd().iterdir() if os.path.isfile(entry / "model_index.json")]
    raise UnknownNameError(
        "base", name, [EMBEDDED, *known, *beside], hint="(or give a checkpoint, a diffusers folder or a hub id like owner/name)"
    )


def known_bases() -> dict[str, Path]:
    """Checkpoints and diffusers folders below ``STUDIO_MODEL_PATH`` by name, sub-folders too; the first of a name wins."""
    found: dict[str, Path] = {}
    for folder in os.environ.get(PATH_VARIABLE, "").split(os.pathsep):
        root = Path(folder).expanduser()
        for file in sorted(root.rglob("*")) if folder and root.is_dir() else ():
            if file.name == "model_index.json":
                found.setdefault(file.parent.name, file.parent)
            elif file.suffix == ".safetensors" and os.path.isfile(file) and not _within_folder(file):
                found.setdefault(file.stem, file)
    return found


def _within_folder(file: Path) -> bool:
    """Whether ``file`` is a part of a diffusers folder."""
    return any(os.path.isfile(up / "model_index.json") for up in file.parents)


def locate_vae(name: str) -> Path:
    """The file or folder of a VAE."""
    path = Path(name).expanduser()
    if path.is_file():
        return path.resolve()
    if not path.is_dir():
        if not HUB_ID.fullmatch(name) or name.startswith((".", "~")):
            raise UnknownNameError("VAE", name, (), hint="(give a file, a diffusers folder or a hub id like owner/name)")
        path = _from_hub(name, "VAE", ["config.json", "*.safetensors", "vae/config.json", "vae/*.safetensors"])
    folder = path if (path / "config.json").is_file() else path / "vae"
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise FileError(f"{path} is no diffusers VAE: it has no config.json with *.safetensors beside it")
    return folder.resolve()


def _checked_folder(folder: Path) -> Path:
    if not (folder / "unet" / "config.json").is_file():
        raise FileError(f"{folder} is not a diffusers text-to-image folder: it has no unet/config.json")
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise FileError(f"{folder} is no whole base: it has no folder {' and no '.join(missing)}")
    for part in WEIGHTED:
        inside = folder / part
        if inside.is_dir() and not list(inside.glob("*.safetensors")):
            names = sorted(file.name for file in inside.iterdir() if file.suffix in PICKLES)
            if names:
                raise UnsafeFileError(
                    f"{inside} holds only pickled weights ({names[0]}), which can run code when read: "
                    "save the base again as safetensors"
                )
            raise FileError(f"{inside} holds no *.safetensors weights: the base is incomplete")
    return folder.resolve()


def _from_hub(name: str, kind: str, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    unwanted = ["*fp16*", "*non_ema*", "*/*flax*", "*onnx*", "*openvino*"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
    except RepositoryNotFoundError as error:
        raise UnknownNameError(
            kind, name, [EMBEDDED], hint="(the model hub has no such repository, or it needs a login)"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileError(
            f"{kind} '{name}' is no local file or folder and the model hub cannot be reached ({type(error).__name__}): "
            f"download it elsewhere and give its place{', or use the base ' + repr(EMBEDDED) if kind == 'base' else ''}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise FileError(f"cannot read {path}: it holds no JSON object")
    return found


def read_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The parts of a base in a stock diffusers folder, by their names, on ``device``; the VAE in single precision."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    def weights(cls: Any, part: str, precision: torch.dtype) -> Any:
        found = cls.from_pretrained(folder / part, use_safetensors=True, dtype=precision, local_files_only=True)
        return found.to(device)

    for part in (part for part in WEIGHTED if (folder / part).is_dir()):
        read_json(folder / part / "config.json")  # where one cannot be read, the libraries ask the hub for it
    read_json(folder / "scheduler" / "scheduler_config.json")
    with _one_sentence(f"the base in {folder}"):
        parts = {
            "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
            "text_encoder": weights(CLIPTextModel, "text_encoder", dtype),
            "unet": weights(UNet2DConditionModel, "unet", dtype),
            "vae": weights(AutoencoderKL, "vae", torch.float32),
            # Whatever class was saved, its configuration describes the noise schedule; the request picks the sampler.
            "scheduler": DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True),
        }
        if (folder / "text_encoder_2").is_dir():
            parts["text_encoder_2"] = weights(CLIPTextModelWithProjection, "text_encoder_2", dtype)
            parts["tokenizer_2"] = CLIPTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True)
        return parts


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """The libraries raise whatever a damaged file provokes, from KeyError to errors of their own; here it is one FileError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileError(f"cannot load {what}: {told}") from error


def _other_vae(place: Path, family: Family) -> AutoencoderKL:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    if place.is_file():
        if family.name not in ("sd15", "sdxl"):
            raise RequestError(f"a base of the family '{family.name}' takes another VAE only as a diffusers folder")
        return read_vae(place, family.name)
    with _one_sentence(f"the VAE in {place}"):
        return AutoencoderKL.from_pretrained(place, use_safetensors=True, dtype=torch.float32, local_files_only=True)


def _check_vae(vae: AutoencoderKL, channels: int, name: str) -> None:
    if int(vae.config.latent_channels) != channels:
        raise RequestError(f"the VAE '{name}' has {vae.config.latent_channels} latent channels, but the base's UNet {channels}")


def _at(placement: Placement) -> tuple[torch.device, torch.dtype]:
    """Where weights are read to, and how."""
    return (torch.device("cpu") if placement.offload else placement.device), placement.dtype


def _placed(base: Base) -> Base:
    """Everything ready for inference, and the placement's wishes followed."""
    for model in (*base.models().values(), base.vae):
        model.eval().requires_grad_(False)
    if base.placement.offload:
        turns = Turns(base.placement.device)
        for model in base.models().values():
            turns.take(model, [model])
        inner = (base.vae.encoder, base.vae.decoder, base.vae.quant_conv, base.vae.post_quant_conv)
        turns.take(base.vae, [part for part in inner if part is not None])
    return base


def _numbers(source: Path) -> int:
    """How many numbers the weights of a base are."""
    headers = [read_raw_header(file, LIMITS) for file in ([source] if source.is_file() else _weight_files(source))]
    return sum(math.prod(info.shape) for header in headers for info in header.tensors.values())


@contextmanager
def quiet() -> Iterator[None]:
    """No weight-loading bars and no advice from the libraries meanwhile; warnings of ours are shown by the doors."""
    from transformers.utils import logging as hf_logging

    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()


def base_sha256(source: Path) -> str:
    """By what a base is known: the hash of a single file; of a folder what its ``studio.json`` says, else its weights' hash."""
    if source.is_file():
        return sha256_of([source])[0]
    told = source / "studio.json"
    return str((read_json(told) if told.is_file() else {}).get("sha256") or weights_sha256(source))


def weights_sha256(folder: Path) -> str:
    """One hash for the weights of UNet, text encoders and VAE: SHA-256 over ``path NUL hash LF`` of every safetensors file
    below ``folder``, sorted by path."""
    return _combined(folder, _weight_files(folder))


def _weight_files(folder: Path) -> list[Path]:
    return sorted(file for part in WEIGHTED for file in (folder / part).glob("*.safetensors"))


def _any_sha256(place: Path) -> str:
    """The hash of a VAE: that of its file, or of all its files."""
    return sha256_of([place])[0] if place.is_file() else _combined(place, sorted(place.glob("*.safetensors")))


def _combined(folder: Path, files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for path, digest in zip(files, sha256_of(files), strict=True):
        total.update(f"{path.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return total.hexdigest()
