"""What differs between model families: defaults for a request, and how a family is recognised from its configuration files.

Sizes that follow from the weights themselves (context length, latent factor, channels) are read from the loaded base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from studio.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    Args:
        name: the word used in metadata and requests.
        title: for people.
        size: default picture size (width, height) in pixels.
        steps, guidance, scheduler: defaults of a request.
        batch: pictures denoised side by side; more are made in several rounds.
        map_layers: the cross-attention layers whose maps say where a word is, as name patterns: those whose cells are a
            good deal smaller than an object, without being so fine that they follow edges.
        half: whether half precision is used on a GPU. The embedded model is too small to gain from it.
        small: far smaller than published models, so that some defaults measured on those do not suit it.
    """

    name: str
    title: str
    size: tuple[int, int]
    steps: int
    guidance: float
    scheduler: str
    batch: int
    half: bool
    map_layers: tuple[str, ...]
    small: bool = False


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="embedded",
            title="embedded base",
            size=(64, 64),
            steps=20,
            guidance=5.0,
            scheduler="dpmpp_2m",
            batch=16,
            half=False,
            map_layers=("down_blocks.1.*", "up_blocks.1.*"),  # 8 x 8 cells
            small=True,
        ),
        Family(
            name="sd15",
            title="Stable Diffusion 1.x",
            size=(512, 512),
            steps=25,
            guidance=7.0,
            scheduler="dpmpp_2m",
            batch=4,
            half=True,
            map_layers=("down_blocks.2.*", "up_blocks.1.*"),  # 16 x 16 cells at 512 x 512
        ),
        Family(
            name="sdxl",
            title="Stable Diffusion XL",
            size=(1024, 1024),
            steps=30,
            guidance=6.0,
            scheduler="dpmpp_2m",
            batch=2,
            half=True,
            map_layers=("down_blocks.2.*", "mid_block.*", "up_blocks.0.*"),  # 32 x 32 cells at 1024 x 1024
        ),
    )
}

EMBEDDED_BLOCKS = (64, 128, 192)


def detect(unet: Mapping[str, Any], where: str, told: str | None = None) -> Family:
    """The family of a UNet with configuration ``unet``.

    Args:
        unet: contents of ``unet/config.json``.
        where: name of the base, for the error.
        told: the family a ``studio.json`` beside the weights names; it wins.

    Raises:
        RequestError: no family of this studio fits.
    """
    if told is not None:
        if told not in FAMILIES:
            raise RequestError(f"base '{where}' names the family '{told}', but this version knows only {', '.join(FAMILIES)}")
        return FAMILIES[told]
    width = unet.get("cross_attention_dim")
    told_blocks = unet.get("block_out_channels", ())
    blocks = tuple(told_blocks) if isinstance(told_blocks, list | tuple) else ()
    if unet.get("addition_embed_type") == "text_time":
        return FAMILIES["sdxl"]
    if blocks == EMBEDDED_BLOCKS:
        return FAMILIES["embedded"]
    if width == 768 and len(blocks) == 4 and unet.get("in_channels", 4) == 4:
        return FAMILIES["sd15"]
    raise RequestError(
        f"base '{where}' is of no known family (UNet blocks {blocks}, text width {width}, {unet.get('in_channels')} input "
        f"channels): use a text-to-image base of the families {', '.join(FAMILIES)}"
    )
