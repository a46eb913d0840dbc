"""The one routed LoRA layer: adapters stay un-merged and stacked, and a route says how much of which acts where and when.

    y = W x + sum_k r_k * w_k * delta_k(x),      delta_k(x) = s_k B_k A_k x   for a LoRA (Hu et al., 2021, eq. 3)

``r`` is the route (:mod:`compose.routes`), ``w`` the request's weight, ``s = alpha / rank``. While ``r`` does not depend on
the output channel, all LoRAs of a layer are one thin product: memory K * rank wide, never K * d_out. DoRA, LoHa and LoKr act
through their dense ``dW``; a DoRA's strength interpolates between the base weight and the decomposed one. Base weights are
never touched; on exit everything is as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compose.routes import Acting, Grid, Kind, Route, Site, constant, read_route, shaped, site_of
from studio.errors import LoraFileError, RequestError, WrongBaseError
from studio.lora.model import Delta, Lora, LoraDelta
from studio.lora.names import module_key

if TYPE_CHECKING:
    from studio.base import Base

Layer = nn.Linear | nn.Conv2d
Gains = Callable[[Site], Sequence[float]]
"""How much each LoRA weighs at one layer, beside route and weight: ``site -> [k]``."""

Fuse = Callable[[Sequence["Adapter"], Mapping[str, Layer]], Sequence["Adapter"]]
"""What to attach in place of a request's LoRAs, given the layers of the models by the names LoRAs use."""

KEPT = 16
"""Sets of weights whose ready products a layer remembers: enough for one per LoRA of a request."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA of a request: its name for messages, what was read, and its weight."""

    name: str
    lora: Lora
    weight: float = 1.0

    @property
    def names(self) -> tuple[str, str]:
        """What options may call it: as the request does, or by the stem of its file."""
        return self.name, Path(self.name).stem


@dataclass(frozen=True)
class Piece:
    """One LoRA's rows ``start:stop`` in the thin stack of a layer; ``scale`` = weight * alpha / rank."""

    index: int
    start: int
    stop: int
    scale: float


@dataclass(eq=False)
class Stack:
    """All deltas on one layer. ``down [R, in, ...]`` and ``up [R, out]`` hold the low-rank ones one after the other.

    ``gain`` is what :data:`Gains` says for this layer; None: 1 for every LoRA.
    """

    site: Site
    module: Layer
    count: int
    pieces: list[Piece] = field(default_factory=list)
    down: Tensor | None = None
    up: Tensor | None = None
    dense: list[tuple[int, float, Tensor]] = field(default_factory=list)
    gain: tuple[float, ...] | None = None
    kept: dict[tuple[float, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, site: Site, module: Layer, found: Sequence[tuple[int, float, Delta]], count: int) -> Stack:
        """Stack the deltas ``(index of the LoRA, weight, delta)`` of one layer, in the layer's device and precision."""
        from studio.lora.dense import dense

        stack = cls(site, module, count)
        downs: list[Tensor] = []
        ups: list[Tensor] = []
        weight = module.weight
        used = 0
        for index, strength, delta in found:
            if isinstance(delta, LoraDelta) and delta.magnitude is None and delta.up[0, 0].numel() == 1:
                stack.pieces.append(Piece(index, used, used + delta.rank, strength * delta.scale))
                used += delta.rank
                downs.append(delta.down.reshape(delta.rank, *weight.shape[1:]).to(weight))
                ups.append(delta.up.flatten(1).T.to(weight))
            else:
                full = dense(delta, weight.detach().float().cpu()).reshape(weight.shape)
                stack.dense.append((index, strength, full.to(weight)))
        if downs:
            stack.down, stack.up = torch.cat(downs).contiguous(), torch.cat(ups).contiguous()
        return stack

    def follow(self, x: Tensor) -> None:
        """Move with the layer: offloading may run it elsewhere than where it was attached."""
        if self.down is not None and self.up is not None and (self.down.device, self.down.dtype) != (x.device, x.dtype):
            self.down, self.up = self.down.to(x), self.up.to(x)
            self.kept.clear()
        self.dense = [(k, w, d if (d.device, d.dtype) == (x.device, x.dtype) else d.to(x)) for k, w, d in self.dense]

    def through(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` through ``weight`` with the geometry of this layer, without bias."""
        if isinstance(self.module, nn.Conv2d):
            return F.conv2d(x, weight, None, self.module.stride, self.module.padding, self.module.dilation, self.module.groups)
        return F.linear(x, weight)

    def lift(self, base: Tensor, thin: Tensor, up: Tensor) -> Tensor:
        """``base + thin @ up``, over the channel axis of this layer."""
        if self.site.kind is Kind.CONV:
            return base + F.conv2d(thin, up.T[:, :, None, None])
        return torch.addmm(base.flatten(0, -2), thin.flatten(0, -2), up).view_as(base)

    def thin_pair(self, weights: Sequence[float]) -> tuple[Tensor, Tensor] | None:
        """``(down, up)`` of the LoRAs with a weight, the weights multiplied into ``up``; remembered for the next forwards."""
        key = tuple(weights)
        if key not in self.kept:
            live = [p for p in self.pieces if key[p.index] != 0]
            if not live or self.down is None or self.up is None:
                return None
            start, stop = live[0].start, live[-1].stop
            factor = [p.scale * key[p.index] for p in self.pieces for _ in range(p.start, p.stop)][start:stop]
            up = self.up[start:stop] * torch.tensor(factor).to(self.up)[:, None]
            while len(self.kept) >= KEPT:
                del self.kept[next(iter(self.kept))]
            self.kept[key] = (self.down[start:stop], up)
        return self.kept[key]

    def add_constant(self, base: Tensor, x: Tensor, weights: Sequence[float]) -> Tensor:
        """``base`` plus the deltas with one weight per LoRA; LoRAs of weight 0 cost nothing."""
        pair = self.thin_pair(weights)
        if pair is not None:
            base = self.lift(base, self.through(x, pair[0]), pair[1])
        for index, strength, full in self.dense:
            if weights[index] != 0:
                base = base + self.through(x, full) * (strength * weights[index])
        return base

    def add_rows(self, base: Tensor, x: Tensor, acting: Acting) -> Tensor:
        """``base`` plus the deltas where each row has its own constant weights: a row only pays for the LoRAs it uses."""
        if len(base) % acting.rows:
            raise ValueError(f"a route of {acting.rows} rows does not fit a layer with {len(base)} rows")
        each = len(base) // acting.rows
        spans = [(slice(a * each, b * each), self.gained(weights)) for a, b, weights in acting.spans]
        if torch.is_grad_enabled():
            return torch.cat([self.add_constant(base[rows], x[rows], weights) for rows, weights in spans])
        for rows, weights in spans:
            self.add_into(base[rows], x[rows], weights)
        return base

    def add_into(self, base: Tensor, x: Tensor, weights: Sequence[float]) -> None:
        """:meth:`add_constant` in place: some rows of a layer's fresh output, without another copy of it."""
        pair = self.thin_pair(weights)
        if pair is not None:
            thin = self.through(x, pair[0])
            if self.site.kind is Kind.CONV:
                base += F.conv2d(thin, pair[1].T[:, :, None, None])
            elif not base.is_contiguous():
                base += thin @ pair[1]
            else:
                base.view(-1, base.shape[-1]).addmm_(thin.flatten(0, -2), pair[1])
        for index, strength, full in self.dense:
            if weights[index] != 0:
                base += self.through(x, full) * (strength * weights[index])

    def gained(self, weights: Sequence[float]) -> Sequence[float]:
        return weights if self.gain is None else [w * g for w, g in zip(weights, self.gain, strict=True)]

    def add_routed(self, base: Tensor, x: Tensor, route: Tensor) -> Tensor:
        """``base`` plus the deltas under a route shaped for this layer, equal over output channels: ``[..., 1, ..., k]``."""
        if self.pieces and self.down is not None and self.up is not None:
            owner = [p.index for p in self.pieces for _ in range(p.start, p.stop)]
            scale = torch.tensor([p.scale for p in self.pieces for _ in range(p.start, p.stop)], device=x.device, dtype=x.dtype)
            thin_route = route[..., owner] * scale
            # The rank takes the place of the channel axis.
            thin_route = thin_route[:, 0].movedim(-1, 1) if self.site.kind is Kind.CONV else thin_route.squeeze(-2)
            base = self.lift(base, self.through(x, self.down) * thin_route, self.up)
        for index, strength, full in self.dense:
            base = base + self.through(x, full) * (route[..., index] * strength)
        return base

    def deltas(self, x: Tensor, out: tuple[int, ...]) -> Tensor:
        """Every LoRA's weighted delta, ``[*out, K]``; zero where a LoRA does not touch this layer."""
        wide = x.new_zeros((*out, self.count))
        for p in self.pieces:
            if self.down is not None and self.up is not None:
                thin = self.through(x, self.down[p.start : p.stop])
                wide[..., p.index] = self.lift(x.new_zeros(out), thin, self.up[p.start : p.stop]) * p.scale
        for index, strength, full in self.dense:
            wide[..., index] = self.through(x, full) * strength
        return wide

    def add(self, base: Tensor, x: Tensor, acting: Acting, grid: Grid | None) -> Tensor:
        """``base`` plus what the route lets through."""
        self.follow(x)
        if acting.weights is not None:
            return self.add_constant(base, x, self.gained(acting.weights))
        if acting.spans:
            return self.add_rows(base, x, acting)
        gain = 1.0 if self.gain is None else torch.tensor(self.gain).to(x)
        route = acting.route
        if callable(route):
            deltas = self.deltas(x, tuple(base.shape)) * gain
            return base + (route(base, deltas, self.site) * deltas).sum(-1)
        if grid is None:
            raise RuntimeError("a route that changes with place needs the grid of the forward: call bank.at(grid) first")
        mine = shaped(route, self.site, tuple(base.shape), grid).to(x) * gain
        if route.shape[4] == 1:
            return self.add_routed(base, x, mine)
        return base + (mine * self.deltas(x, tuple(base.shape))).sum(-1)


class LoraBank:
    """Attach adapters to models for the length of a ``with`` block.

    Args:
        models: modules by the first part of LoRA keys (``unet``, ``text_encoder``, ...).
        adapters: the K LoRAs of a request. Those of weight 0 are checked and then left out.
        family: of the base, "" when unknown.
        base_sha256: of the base's weights, "" when unknown.
        fuse: merges LoRAs before they are attached; each is checked by itself first.

    Attributes after entering:
        adapters: what is attached, in the order of routes. requested: the LoRAs as they were given.
        notes: sentences for the user. matched: layers per name of a requested LoRA.

    Raises on entering (nothing is attached then):
        RequestError: a model carries PEFT layers.
        WrongBaseError: a LoRA of another family.
        LoraFileError: a LoRA does not fit this base completely.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        adapters: Sequence[Adapter],
        *,
        family: str = "",
        base_sha256: str = "",
        fuse: Fuse | None = None,
    ) -> None:
        self.models = dict(models)
        self.requested = self.adapters = tuple(adapters)
        self.fuse = fuse
        self.family, self.base_sha256 = family, base_sha256
        self.notes: list[str] = []
        self.matched: dict[str, int] = {}
        self.grid: Grid | None = None
        self._attached: list[tuple[nn.Module, Callable[..., Any] | None]] = []
        self._stacks: list[Stack] = []
        self._acting = read_route(constant([1.0] * len(self.adapters)), len(self.adapters))
        self._gains: Gains | None = None

    @classmethod
    def on(cls, base: Base, adapters: Sequence[Adapter], fuse: Fuse | None = None) -> LoraBank:
        """A bank for a loaded base."""
        return cls(base.models(), adapters, family=base.family.name, base_sha256=base.sha256, fuse=fuse)

    @property
    def active(self) -> tuple[int, ...]:
        """The LoRAs that can act: those with a weight."""
        return tuple(index for index, adapter in enumerate(self.adapters) if adapter.weight != 0)

    @property
    def route(self) -> Route:
        return self._acting.route

    @route.setter
    def route(self, route: Route) -> None:
        """Set what acts from the next forward on. The request's weights act on top of it."""
        self._acting = read_route(route, len(self.adapters))

    @contextmanager
    def acting(self, route: Route | None) -> Iterator[None]:
        """Another route for the length of a ``with`` block; None: the present one. On exit route and gains are as before."""
        before, gains = self._acting, self._gains
        try:
            if route is not None:
                self.route = route
            yield
        finally:
            self._acting = before
            if self._gains is not gains:
                self.by_layer(gains)

    def by_layer(self, gains: Gains | None) -> None:
        """How much each LoRA weighs at each layer, on top of route and weight; None: the same everywhere."""
        self._gains = gains
        for stack in self._stacks:
            told = None if gains is None else tuple(float(gain) for gain in gains(stack.site))
            if told is not None and len(told) != len(self.adapters):
                raise ValueError(f"{len(told)} gains for {len(self.adapters)} LoRAs at '{stack.site.name}'")
            stack.gain = told

    def at(self, grid: Grid) -> None:
        """Tell the shape of the next forward."""
        self.grid = grid

    def __enter__(self) -> Self:
        if self._attached:
            raise RuntimeError("this bank is attached already")
        plan = self._plan()
        try:
            for site, module, found in plan:
                self._attach(Stack.of(site, module, found, len(self.adapters)))
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _plan(self) -> list[tuple[Site, Layer, list[tuple[int, float, Delta]]]]:
        """What goes where; every check happens here, before anything is attached."""
        self.notes, self.matched = [], {}
        for name, model in self.models.items():
            if self.requested and carries_peft(model):
                raise RequestError(
                    f"the {name} already carries PEFT adapter layers: unload them first, the studio attaches LoRAs itself"
                )
        modules = {
            module_key(part, path): module
            for part, model in self.models.items()
            for path, module in model.named_modules()
            if isinstance(module, Layer)
        }
        for adapter in self.requested:
            self._fits(adapter, modules)
        if self.fuse is not None:
            self.adapters = tuple(self.fuse(self.requested, modules))
            self.route = constant([1.0] * len(self.adapters))
        by_layer: dict[str, list[tuple[int, float, Delta]]] = {}
        for index, adapter in enumerate(self.adapters):
            if adapter.weight != 0:
                for key, delta in adapter.lora.layers.items():
                    by_layer.setdefault(key, []).append((index, adapter.weight, delta))
        return [(site_of(key, modules[key]), modules[key], found) for key, found in by_layer.items()]

    def _fits(self, adapter: Adapter, modules: Mapping[str, Layer]) -> None:
        """All layers of a LoRA must have their place, in shape too, or none is attached."""
        from studio.lora.files import check_against, layer_infos
        from studio.lora.identity import guess_family

        told = adapter.lora.metadata.get("studio.family", "")
        if told and self.family and told != self.family:
            raise WrongBaseError(
                f"LoRA '{adapter.name}' was trained for the family '{told}', but the base is of the family '{self.family}'"
            )
        match = check_against(adapter.lora, {key: tuple(module.weight.shape) for key, module in modules.items()})
        if not match.complete or not match.total:
            odd = next(iter((*match.wrong_shape, *match.missing)), "")
            why = "has another shape there" if match.wrong_shape else "is not there"
            sentence = f"LoRA '{adapter.name}' does not fit the base: {match}" + (
                f" (for example '{odd}' {why})" if odd else ""
            )
            looks = guess_family(layer_infos(adapter.lora), adapter.lora.metadata)
            if looks not in ("unknown", self.family):
                raise WrongBaseError(f"{sentence}; it looks made for the family '{looks}'")
            raise LoraFileError(f"{sentence}; it was made for another model or a variant of this one")
        self.matched[adapter.name] = match.total
        trained_on = adapter.lora.metadata.get("studio.base_sha256", "")
        if trained_on and self.base_sha256 and trained_on != self.base_sha256:
            self.notes.append(
                f"LoRA '{adapter.name}' was trained on another version of the base ({trained_on[:10]}, not "
                f"{self.base_sha256[:10]}): its effect may be off; train it again on this one for the best result"
            )

    def _attach(self, stack: Stack) -> None:
        module = stack.module
        inner = module.forward

        def routed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            base: Tensor = inner(x, *args, **kwargs)
            return stack.add(base, x, self._acting, self.grid)

        self._stacks.append(stack)
        self._attached.append((module, module.__dict__.get("forward")))
        module.forward = routed  # type: ignore[method-assign, assignment]

    def _restore(self) -> None:
        self._stacks.clear()
        while self._attached:
            module, before = self._attached.pop()
            if before is None:
                del module.forward
            else:
                module.forward = before


def carries_peft(model: nn.Module) -> bool:
    """Whether PEFT has replaced layers of ``model``; asks nothing of PEFT when nobody has imported it."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and any(isinstance(module, tuners.BaseTunerLayer) for module in model.modules())
