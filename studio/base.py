"""Load a base model: the embedded one, a stock diffusers folder, or a hub id. Only safetensors weights are ever read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from studio.errors import FileError, MissingAssetError, RequestError, UnknownNameError, UnsafeFileError
from studio.family import Family, detect
from studio.paths import assets

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

EMBEDDED = "embedded"
WEIGHTED = ("unet", "text_encoder", "text_encoder_2", "vae")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, eq=False, kw_only=True)
class Base:
    """A loaded base model: stock diffusers and transformers objects, in evaluation mode, without gradients.

    ``sha256`` identifies the weights (see :func:`weights_sha256`). ``text_encoder_2`` and ``tokenizer_2`` exist for SDXL only.
    The VAE stays in single precision: half precision overflows in many of them.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: SchedulerMixin
    family: Family
    name: str
    sha256: str
    folder: Path
    tokenizer_2: CLIPTokenizer | None = None
    text_encoder_2: CLIPTextModelWithProjection | None = None

    @property
    def device(self) -> torch.device:
        return self.unet.device

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
        """Picture sides must be multiples of this: the latent factor times the UNet's own downsampling."""
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


_LOADED: dict[tuple[Path, torch.device, torch.dtype], Base] = {}


def load_base(name: str | Path = EMBEDDED, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Base:
    """The base called ``name``; loaded once per process, device and precision.

    Args:
        name: ``"embedded"``, a stock diffusers folder, or a hub id ``owner/name``.
        device: default: CUDA when there is one, then MPS, else the CPU.
        dtype: of the UNet and the text encoders; default: half on a GPU for families that gain from it, else single.

    Raises:
        UnknownNameError, RequestError, FileError, UnsafeFileError: see the sentence.
    """
    folder = locate(str(name))
    facts = read_json(folder / "studio.json") if (folder / "studio.json").is_file() else {}
    unet_config = read_json(folder / "unet" / "config.json")
    title = str(facts.get("name") or (folder.name if Path(name).exists() else name))
    family = detect(unet_config, title, facts.get("family"))
    place = torch.device(device) if device is not None else best_device()
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    precision = dtype or (torch.float16 if family.half and place.type == "cuda" else torch.float32)
    key = (folder, place, precision)
    if key not in _LOADED:
        digest = str(facts.get("sha256") or weights_sha256(folder))
        _LOADED[key] = _read(folder, place, precision, family=family, name=title, sha256=digest)
    return _LOADED[key]


def forget_bases() -> None:
    """Drop every loaded base, so that its memory can be used for another."""
    _LOADED.clear()


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def locate(name: str) -> Path:
    """The folder of the base called ``name``; downloads a hub id when the hub can be reached."""
    if name == EMBEDDED:
        folder = assets() / "base"
        if not (folder / "unet").is_dir():
            raise MissingAssetError(f"the embedded base is not in {folder}: reinstall diffusion-customization-studio")
        return folder.resolve()
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_folder(path)
    if path.is_file():
        raise RequestError(
            f"base '{name}' is a single file: give a diffusers folder "
            "(StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER) makes one)"
        )
    if HUB_ID.fullmatch(name) and not name.startswith((".", "~")):
        return _checked_folder(_from_hub(name))
    beside = [entry.name for entry in Path.cwd().iterdir() if (entry / "model_index.json").is_file()]
    raise UnknownNameError("base", name, [EMBEDDED, *beside], hint="(or give a diffusers folder or a hub id like owner/name)")


def _checked_folder(folder: Path) -> Path:
    if not (folder / "unet" / "config.json").is_file():
        raise FileError(f"{folder} is not a diffusers text-to-image folder: it has no unet/config.json")
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


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.json", "*/*.json", "tokenizer*/*", *(f"{part}/*.safetensors" for part in WEIGHTED)]
    unwanted = ["*fp16*", "*non_ema*", "*/*flax*", "*onnx*", "*openvino*"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
    except RepositoryNotFoundError as error:
        raise UnknownNameError(
            "base", name, [EMBEDDED], hint="(the model hub has no such repository, or it needs a login)"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileError(
            f"base '{name}' is no local folder and the model hub cannot be reached ({type(error).__name__}): "
            "download it elsewhere and give its folder, or use the base 'embedded'"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise FileError(f"cannot read {path}: it holds no JSON object")
    return found


def _read(folder: Path, device: torch.device, dtype: torch.dtype, *, family: Family, name: str, sha256: str) -> Base:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    def ready(module: Any) -> Any:
        return module.to(device).eval().requires_grad_(False)

    with quiet():
        try:
            text = CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=True, dtype=dtype)
            second = folder / "text_encoder_2"
            more: dict[str, Any] = {}
            if second.is_dir():
                more["text_encoder_2"] = ready(
                    CLIPTextModelWithProjection.from_pretrained(second, use_safetensors=True, dtype=dtype)
                )
                more["tokenizer_2"] = CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
            return Base(
                tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
                text_encoder=ready(text),
                unet=ready(UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True, dtype=dtype)),
                vae=ready(AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True, dtype=torch.float32)),
                # Whatever class was saved, its configuration describes the noise schedule; the request picks the sampler.
                scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
                family=family,
                name=name,
                sha256=sha256,
                folder=folder,
                **more,
            )
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise FileError(f"cannot load the base in {folder}: {str(error).splitlines()[0]}") from error


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


def weights_sha256(folder: Path) -> str:
    """One hash for the weights of UNet, text encoders and VAE.

    SHA-256 over ``path NUL hash LF`` of every safetensors file below ``folder``, sorted by path. Hashes
    of single files are remembered by path, size and time, so that a large base is read only once.
    """
    memory_file = cache_folder() / "hashes.json"
    try:
        memory: dict[str, str] = json.loads(memory_file.read_text("utf-8"))
    except (OSError, ValueError):
        memory = {}
    known = len(memory)
    total = hashlib.sha256()
    for path in sorted(file for part in WEIGHTED for file in (folder / part).glob("*.safetensors")):
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in memory:
            with path.open("rb") as stream:
                memory[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{memory[key]}\n".encode())
    if len(memory) > known:
        _write_quietly(memory_file, json.dumps(memory))
    return total.hexdigest()


def cache_folder() -> Path:
    """Where this product remembers things it can always compute again."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "diffusion-customization-studio"


def _write_quietly(path: Path, text: str) -> None:
    """Write a cache file; a read-only home only costs time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.write_text(text, "utf-8")
        fresh.replace(path)
    except OSError:
        return
