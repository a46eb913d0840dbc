"""The deltas of all LoRAs on one layer, and the ways a route lets them through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compose.routes import Acting, Grid, Kind, Placed, Site, shaped
from studio.lora.model import Delta, LoraDelta

Layer = nn.Linear | nn.Conv2d


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

    @property
    def room(self) -> int:
        """Rows of ``up`` that :attr:`kept` may hold.

        Twice those of all LoRAs, so that a schedule, with new weights at every step, does not fill the memory; but enough for
        one set per LoRA, also beside one that always acts and, standing elsewhere in the stack, makes each set longer.
        """
        spans = [[max(a.stop, b.stop) - min(a.start, b.start) for b in self.pieces] for a in self.pieces]
        return max([2 * sum(p.stop - p.start for p in self.pieces), *map(sum, spans)])

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
        """``(down, up)`` of the LoRAs with a weight, the weights multiplied into ``up``; remembered for the next forwards.

        The oldest are forgotten when all together are more than :attr:`room`.
        """
        key = tuple(weights)
        if key not in self.kept:
            live = [p for p in self.pieces if key[p.index] != 0]
            if not live or self.down is None or self.up is None:
                return None
            start, stop = live[0].start, live[-1].stop
            factor = [p.scale * key[p.index] for p in self.pieces for _ in range(p.start, p.stop)][start:stop]
            up = self.up[start:stop] * torch.tensor(factor).to(self.up)[:, None]
            room = self.room - len(up)
            while sum(len(scaled) for _, scaled in self.kept.values()) > room:
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
        if acting.text is not None and self.site.kind is Kind.TEXT:
            acting = acting.text
        if acting.weights is not None:
            return self.add_constant(base, x, self.gained(acting.weights))
        if acting.spans:
            return self.add_rows(base, x, acting)
        gain = 1.0 if self.gain is None else torch.tensor(self.gain).to(x)
        route = acting.route.places if isinstance(acting.route, Placed) else acting.route
        if callable(route):
            deltas = self.deltas(x, tuple(base.shape)) * gain
            return base + (route(base, deltas, self.site) * deltas).sum(-1)
        if grid is None:
            raise RuntimeError("a route that changes with place needs the grid of the forward: call bank.at(grid) first")
        mine = shaped(route, self.site, tuple(base.shape), grid).to(x) * gain
        if route.shape[4] == 1:
            return self.add_routed(base, x, mine)
        return base + (mine * self.deltas(x, tuple(base.shape))).sum(-1)
