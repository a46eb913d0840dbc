"""What the speed bench times: a base with random LoRAs under the product's methods, under PEFT, and truly merged.

All three share the base's weights. Latents, prompts and LoRAs are random: speed does not depend on their values.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compose import method_named
from compose.bank import Adapter, LoraBank
from compose.denoise import denoise, generators_of, guide, initial_noise
from compose.run import Method
from compose.schedulers import make_scheduler, set_steps
from compose.text import Encoded
from studio.base import Base, load_base
from studio.errors import UnknownNameError
from studio.family import FAMILIES
from studio.lora.model import Lora, LoraDelta
from studio.paths import assets

SAMPLER = "ddim"
GUIDANCE = 5.0
LATENTS = 16
"""Side of the latents."""


@dataclass(frozen=True, eq=False)
class Shape:
    """A base and the rank its LoRAs have."""

    base: Base
    rank: int


def shape_named(name: str) -> Shape:
    """The embedded base at the trainer's own rank, or ("sd15") with a random UNet of that shape in its place, rank 32.

    Raises:
        UnknownNameError: another name.
    """
    base = load_base(device="cpu")
    if name == "embedded":
        return Shape(base, 8)
    if name != "sd15":
        raise UnknownNameError("shape", name, ("embedded", "sd15"))
    from diffusers import UNet2DConditionModel

    config = json.loads((assets() / "configs" / "sd15" / "unet" / "config.json").read_text("utf-8"))
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(config).eval().requires_grad_(False)
    return Shape(replace(base, unet=unet, family=FAMILIES["sd15"], name="random, shaped like SD 1.5", sha256=""), 32)


def touched(unet: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of attention and feed-forward parts."""
    return {
        path: module
        for path, module in unet.named_modules()
        if isinstance(module, nn.Linear) and (".attn" in path or ".ff." in path)
    }


def random_lora(unet: nn.Module, rank: int, seed: int) -> Lora:
    """A LoRA on all of them, small enough that four of them keep the model finite."""
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, Any] = {}
    for path, module in touched(unet).items():
        down = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
        up = torch.randn(module.out_features, rank, generator=generator) * 0.05 / rank**0.5
        layers[f"unet.{path}"] = LoraDelta(down=down, up=up, alpha=float(rank))
    return Lora(layers=layers, metadata={})


def sharing(unet: nn.Module) -> Any:
    """A copy of a model's modules on the very same weights."""
    kept = [*unet.parameters(), *unet.buffers()]
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in kept})


@dataclass(eq=False)
class Stage:
    """Everything one comparison needs.

    Args:
        steps: of a run. count: LoRAs. side: of the latents.
    """

    shape: Shape
    count: int = 4
    steps: int = 4
    side: int = LATENTS

    def __post_init__(self) -> None:
        base = self.shape.base
        self.names = [f"lora{k}" for k in range(self.count)]
        self.loras = [random_lora(base.unet, self.shape.rank, 1 + k) for k in range(self.count)]
        generator = torch.Generator().manual_seed(99)
        shape = (1, base.context_length if base.family.name == "embedded" else 77, base.unet.config.cross_attention_dim)
        ids = torch.zeros(shape[:2], dtype=torch.long)
        self.negative, self.positive = (Encoded(states=torch.randn(shape, generator=generator), ids=ids) for _ in range(2))
        self.size = (self.side * base.latent_factor,) * 2

    def adapters(self, count: int | None = None) -> list[Adapter]:
        return [Adapter(n, lora) for n, lora in zip(self.names[:count], self.loras[:count], strict=True)]

    def sampled(self, method: Method, bank: LoraBank | None, base: Base | None = None) -> Tensor:
        """A run of the product's own loop."""
        return denoise(
            base or self.shape.base,
            self.negative,
            self.positive,
            seeds=[0],
            size=self.size,
            steps=self.steps,
            guidance=GUIDANCE,
            scheduler=SAMPLER,
            method=method,
            bank=bank,
        )

    def composed(self, name: str, count: int | None = None, **options: Any) -> tuple[Callable[[], Tensor], Method]:
        """A run with a method; the bank is attached within it, as for a user. The method tells afterwards what it did."""
        method = method_named(name, **options)

        def once() -> Tensor:
            with LoraBank.on(self.shape.base, self.adapters(count), fuse=method.fuse) as bank:
                return self.sampled(method, bank)

        return once, method

    def merged(self) -> Callable[[], Tensor]:
        """The stock loop on a model whose weights are the sum."""
        unet = sharing(self.shape.base.unet)
        for path, module in touched(unet).items():
            deltas = [lora.layers[f"unet.{path}"] for lora in self.loras]
            change = sum(d.scale * d.up @ d.down for d in deltas if isinstance(d, LoraDelta))
            module.weight = nn.Parameter(module.weight + change, requires_grad=False)
        base = replace(self.shape.base, unet=unet)
        return lambda: self.sampled(Method(), None, base)

    def peft(self) -> Peft:
        return Peft(self)


class Peft:
    """LoRA Composite as one writes it with diffusers and PEFT: one pass after the other, adapters chosen in between."""

    def __init__(self, stage: Stage) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.stage = stage
        self.unet = sharing(stage.shape.base.unet)
        for name, lora in zip(stage.names, stage.loras, strict=True):
            state: dict[str, Tensor] = {}
            for key, delta in lora.layers.items():
                path = key.removeprefix("unet.")
                if isinstance(delta, LoraDelta):
                    state |= {f"{path}.lora_A.weight": delta.down, f"{path}.lora_B.weight": delta.up}
            self.unet.load_lora_adapter(state, adapter_name=name, prefix=None)
        self.unet.requires_grad_(False)
        self.layers = [module for module in self.unet.modules() if isinstance(module, BaseTunerLayer)]

    def set_adapters(self, name: str) -> None:
        """As users do it."""
        self.unet.set_adapters([name], [1.0])

    def set_scale(self, name: str) -> None:
        """All adapters stay active; a kept list of layers gets a scale of 1 or 0."""
        for layer in self.layers:
            for other in self.stage.names:
                layer.set_scale(other, 1.0 if other == name else 0.0)

    def set_active(self, name: str) -> None:
        """A kept list of layers, and only the one adapter active: the quickest way PEFT offers."""
        for layer in self.layers:
            layer.set_adapter(name, inference_mode=True)
            layer.set_scale(name, 1.0)

    @torch.no_grad()
    def composite(self, choose: Callable[[str], None]) -> Tensor:
        """A run with a pass for each adapter, ``choose`` before each."""
        stage = self.stage
        base = stage.shape.base
        scheduler = make_scheduler(SAMPLER, base.scheduler)
        set_steps(scheduler, stage.steps, base.device)
        latents = initial_noise(base, generators_of([0]), stage.size) * scheduler.init_noise_sigma
        states = torch.cat([stage.negative.states, stage.positive.states])
        for timestep in scheduler.timesteps:
            x = scheduler.scale_model_input(latents, timestep)
            uncond, cond = torch.zeros_like(x), torch.zeros_like(x)
            for name in stage.names:
                choose(name)
                u, v = self.unet(torch.cat([x, x]), timestep, states, return_dict=False)[0].chunk(2)
                uncond, cond = uncond + u / stage.count, cond + v / stage.count
            latents = scheduler.step(guide(uncond, cond, GUIDANCE), timestep, latents, return_dict=False)[0]
        return latents

    def keep_all_active(self) -> None:
        """What :meth:`set_scale` expects."""
        self.unet.set_adapters(self.stage.names, [1.0] * self.stage.count)
        self.unet.requires_grad_(False)


def agree(one: Tensor, other: Tensor, what: Sequence[str]) -> None:
    """Refuse to time two things that do not compute the same.

    Raises:
        ArithmeticError: they differ by more than rounding.
    """
    apart = float((one - other).abs().max() / one.abs().max().clamp_min(1e-9))
    if not apart < 2e-3:
        raise ArithmeticError(f"{what[0]} and {what[1]} differ by {apart:.2g} of their size: nothing was timed")
