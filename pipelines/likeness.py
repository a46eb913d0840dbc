"""How alike two pictures are to an image encoder: the base model's own features, or a vision model from a folder.

The base's features are DIFT's (Tang et al., NeurIPS 2023, "Emergent Correspondence from Image Diffusion"): the picture is
encoded, noised at t = 261 of 1000 and put through the UNet with an empty prompt; what an up block gives is kept. Nothing has to
be downloaded, and the encoder knows what the user's base knows. Two things are added, because here one vector stands for a
subject and not for a place in it: cells count less the further they are from the middle, since the rest of a box is background;
and features are standardised over all references before angles are compared. Unstandardised ones are all much alike (they share
the direction of "a picture of this base"); standardised, 0 is "as like as any other subject here".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from compose.text import added_conditions, encode_pair
from pipelines.jobs import digest
from pipelines.prepare import fitted, size_like
from studio.base import quiet, read_json
from studio.errors import FileError, NumericsError, RequestError, UnsafeFileError
from studio.hashes import sha256_of
from studio.media import encode

if TYPE_CHECKING:
    from studio.base import Base

TIMESTEP = 261 / 1000
"""Share of the noise schedule, as published for likeness of meaning."""
NOISES = 4
"""Fixed noises whose features are averaged; the paper has 8."""
UP_BLOCKS: Mapping[str, int] = {"embedded": 2, "sd15": 1, "sdxl": 1}
"""Which up block is read, by family: the published second one, on the embedded base the last, whose cells are small enough."""
REACH = 0.5
"""Weight of a cell: ``exp(-r^2 / REACH)``, with ``r`` 1 at the middle of each side."""
ROWS = 8
"""Pictures that a vision model sees at once."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Encoder(Protocol):
    """Pictures to vectors. ``mark`` is the same exactly when the vectors are."""

    name: str
    mark: str

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """``[n, d]``, single precision, on the CPU."""
        ...


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What ``module`` gives in the forwards made meanwhile."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, out: Any) -> None:
        found.append(out[0] if isinstance(out, tuple) else out)

    handle = module.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def counted_rows(unet: nn.Module) -> Iterator[list[int]]:
    """How many rows each forward of ``unet`` has that is made meanwhile; shallow and early ones count as any other."""
    rows: list[int] = []
    handle = unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        handle.remove()


def middle_mean(features: Tensor) -> Tensor:
    """The mean of ``[n, c, h, w]`` over places and rows, cells near the middle counting most (:data:`REACH`): ``[c]``."""
    down, across = (torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1) for side in features.shape[-2:])
    weights = torch.exp(-(down[:, None] ** 2 + across**2) / REACH).to(features)
    return (features * weights).sum((2, 3)).mean(0) / weights.sum()


class BaseEncoder:
    """Features of the base's UNet in the middle of a picture, mean over a few fixed noises. Without any LoRA."""

    def __init__(self, base: Base, noises: int = NOISES) -> None:
        self.base, self.noises = base, noises
        self.block = min(UP_BLOCKS[base.family.name], len(base.unet.up_blocks) - 1)
        self.name = f"the base's own features (DIFT, t {TIMESTEP:.3f}, up block {self.block}, {noises} noises)"
        self.mark = digest("base", base.sha256, str(base.dtype), TIMESTEP, self.block, noises, REACH)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        return torch.stack([self._one(picture) for picture in pictures])

    def _one(self, picture: Image.Image) -> Tensor:
        base = self.base
        size = size_like(base, picture.size)
        latents = encode(base.vae, [fitted(picture, size)]).to(base.device)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn((self.noises, *latents.shape[1:]), generator=generator).to(latents)
        alphas = base.scheduler.alphas_cumprod
        step = min(round(TIMESTEP * len(alphas)), len(alphas) - 1)
        kept = alphas[step].to(latents)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        empty = encode_pair(base, [""], [""])[0].rows([0] * self.noises)
        added = added_conditions(base, empty, size)
        more: dict[str, Any] = {} if added is None else {"added_cond_kwargs": added}
        with outputs_of(base.unet.up_blocks[self.block]) as found:
            base.unet(noisy.to(base.dtype), torch.tensor(step, device=base.device), encoder_hidden_states=empty.states,
                      return_dict=False, **more)  # fmt: skip
        features = middle_mean(found[0].float()).cpu()
        if not bool(torch.isfinite(features).all()):
            raise NumericsError("the base's features are NaN or infinite: use --dtype float32, or another --encoder")
        return features


class FolderEncoder:
    """A vision model in transformers' layout: CLIP's image tower, DINOv2, ... Nothing is downloaded, no pickle is read.

    Raises:
        FileError: no such model there. UnsafeFileError: its weights are pickles.
    """

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        weights = check_folder(folder)
        from transformers import AutoImageProcessor, AutoModel

        self.device = device or torch.device("cpu")
        try:
            with quiet():
                self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
                self.model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except Exception as error:
            told = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FileError(f"cannot load the encoder in {folder}: {told}") from error
        self.model = self.model.eval().requires_grad_(False).to(self.device)
        self.name = f"{folder.name} ({type(self.model).__name__})"
        self.mark = digest("folder", *sha256_of(weights), read_json(folder / "preprocessor_config.json"))

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        return torch.cat([self._some(pictures[first : first + ROWS]) for first in range(0, len(pictures), ROWS)])

    @torch.no_grad()
    def _some(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = self.processor(images=[one.convert("RGB") for one in pictures], return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.device)
        if hasattr(self.model, "get_image_features"):
            told = self.model.get_image_features(pixel_values=pixels)
        else:
            told = self.model(pixel_values=pixels)
        for name in ("image_embeds", "pooler_output"):
            if getattr(told, name, None) is not None:
                told = getattr(told, name)
        if not isinstance(told, Tensor):
            told = told.last_hidden_state.mean(1)
        return told.flatten(1).float().cpu()


def check_folder(folder: Path) -> list[Path]:
    """The weight files of a vision model.

    Raises:
        RequestError: no folder. FileError, UnsafeFileError: it is no such model, or holds pickles only.
    """
    if not folder.is_dir():
        raise RequestError(f"--encoder '{folder}' is neither 'base' nor a folder with a CLIP or DINOv2 vision model")
    weights = sorted(folder.glob("*.safetensors"))
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if not weights and pickles:
        raise UnsafeFileError(f"{folder} holds only pickled weights ({pickles[0]}), which can run code: save it as safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise FileError(f"--encoder {folder} is no vision model of transformers: it has no {name}")
    if not weights:
        raise FileError(f"--encoder {folder} holds no *.safetensors weights")
    return weights


def cut(picture: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The part of ``picture`` in ``box`` (shares of width and height), at least a pixel."""
    x0, y0, x1, y1 = (round(share * side) for share, side in zip(box, (*picture.size, *picture.size), strict=True))
    return picture.convert("RGB").crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))


@dataclass(frozen=True, eq=False)
class Standard:
    """What is taken off features, and what they are divided by, so that all references together have mean 0 and spread 1.

    Args:
        centre: the mean over subjects of the mean of their references ``[d]``. spread: over all references ``[d]``, never far
            below its mean, or what hardly varies among few references would count most in any other picture.
    """

    centre: Tensor
    spread: Tensor

    @classmethod
    def of(cls, groups: Sequence[Tensor]) -> Standard:
        """Of the features ``[n, d]`` of the references of each subject."""
        spread = torch.cat(list(groups)).std(0, correction=0)
        least = float(spread.mean()) / 10 or 1.0
        return cls(torch.stack([group.mean(0) for group in groups]).mean(0), spread.clamp(min=least))

    def __call__(self, features: Tensor) -> Tensor:
        """``[n, d]`` as unit vectors; what is nothing but the centre stays 0."""
        return nn.functional.normalize((features - self.centre) / self.spread, dim=1, eps=1e-12)


def left_out(own: Tensor) -> list[float]:
    """For each of the unit vectors ``own [n, d]`` its mean similarity with the others; none where there is only one."""
    if len(own) < 2:
        return []
    similar = own @ own.T
    return ((similar.sum(1) - similar.diagonal()) / (len(own) - 1)).tolist()


@dataclass(frozen=True, eq=False)
class Likeness:
    """Similarity with the references of several subjects: the mean cosine, -1..1.

    Args:
        known: by subject, its references as unit vectors ``[n, d]``.
    """

    encoder: Encoder
    standard: Standard
    known: Mapping[str, Tensor]

    @classmethod
    def of(cls, encoder: Encoder, references: Mapping[str, Sequence[Image.Image]]) -> Likeness:
        raw = {name: encoder(list(pictures)) for name, pictures in references.items()}
        standard = Standard.of(list(raw.values()))
        return cls(encoder, standard, {name: standard(features) for name, features in raw.items()})

    def __call__(self, picture: Image.Image) -> dict[str, float]:
        """With the references of each subject."""
        (found,) = self.standard(self.encoder([picture]))
        return {name: float((features @ found).mean()) for name, features in self.known.items()}

    def left_out(self) -> list[float]:
        """Of every reference its mean similarity with the other references of its subject."""
        return [value for features in self.known.values() for value in left_out(features)]

    def told_apart(self) -> float:
        """Share of references that are more like the others of their subject than like those of any other subject."""
        right = []
        for name, features in self.known.items():
            for index, own in enumerate(left_out(features)):
                others = [float((known @ features[index]).mean()) for other, known in self.known.items() if other != name]
                right.append(own > max(others, default=-1.0))
        return fmean(right) if right else float("nan")
