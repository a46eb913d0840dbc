"""The one attention processor: it carries out an :class:`~compose.plan.AttentionPlan`, and only through a fused kernel.

* A *tap* reads ``A[:, S] = softmax(q k^T / sqrt d) 1_S`` for sets of keys ``S``: explicitly where the map is small, else by
  giving the kernel the indicators ``1_S`` as values. The output never passes through an explicit map.
* *Isolation* gathers: ``O[R] = attend(Q[R], K[R + background], V[R + background])``. No mask and no N x N tensor.
* *Regional text*: ``o_n = (W_O + dW_O) attend(Q[R_n], (W_K + dW_K) e_n, (W_V + dW_V) e_n)``, the mean where regions overlap.
* *Key frames* gather the keys and values of other frames.

Processors hold no maps: they go to whoever collects during a forward. Layers without work keep their stock processor's bits
where torch's kernel computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from compose.kernels import Kernel, choose, sdpa
from compose.layerwise import cross_layers, slice_of
from compose.plan import AttentionPlan, Isolation, KeyFrames, Regional, Regions, RegionText, Role, Tap, groups
from compose.routes import Grid, cells, is_temporal
from studio.errors import RequestError

if TYPE_CHECKING:
    from compose.bank import LoraBank

STOCK = ("AttnProcessor", "AttnProcessor2_0")
EXPLICIT = 1024 * 1024
"""Entries of the largest map (queries x keys, per head) that is ever written out."""


@dataclass(frozen=True, eq=False)
class Map:
    """What a tap read at one layer: ``values [rows, h * w, S]``, single precision, over ``cells`` (h, w)."""

    layer: str
    values: Tensor
    cells: tuple[int, int]

    def pictures(self) -> Tensor:
        """``[rows, S, h, w]``."""
        return self.values.transpose(1, 2).unflatten(2, self.cells)


Maps = dict[str, list[Map]]
"""Maps by the name of their tap, in the order of the layers."""


class Attention:
    """Our processors in all attention layers of a UNet for the length of a ``with`` block; then the old ones, the same objects.

    Args:
        unet: any diffusers model built of ``Attention`` layers.
        bank: attached LoRAs; needed for regions with routes of their own.
        kernel: what computes; None lets the device decide.

    Raises on entering:
        RequestError: another program's processors are in place.
    """

    def __init__(self, unet: nn.Module, *, bank: LoraBank | None = None, kernel: Kernel | None = None) -> None:
        self.unet, self.bank = unet, bank
        self.note = ""
        self._kernel = kernel
        self._plan: AttentionPlan | None = None
        self._grid: Grid | None = None
        self._maps: Maps | None = None
        self._texts: WeakKeyDictionary[RegionText, dict[str, tuple[Tensor, Tensor]]] = WeakKeyDictionary()
        self._installed: list[tuple[Any, Any, Processor]] = []
        self._order = {name: index for index, name in enumerate(cross_layers(unet))}

    @property
    def plan(self) -> AttentionPlan | None:
        return self._plan

    @plan.setter
    def plan(self, plan: AttentionPlan | None) -> None:
        """What acts from the next forward on."""
        self._plan = plan

    @property
    def layers(self) -> dict[str, Role]:
        """The layers that a plan may touch, while this is installed."""
        return {ours.name: ours.role for _, _, ours in self._installed}

    @property
    def kernel(self) -> Kernel:
        return self._kernel or sdpa

    def at(self, grid: Grid) -> None:
        """Tell the shape of the next forward."""
        self._grid = grid

    @contextmanager
    def collecting(self) -> Iterator[Maps]:
        """Maps of the forwards made meanwhile, with their graphs where gradients are on."""
        before, self._maps = self._maps, {}
        try:
            yield self._maps
        finally:
            self._maps = before

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The old processors again, for a while."""
        for module, old, _ in self._installed:
            module.processor = old
        try:
            yield
        finally:
            for module, _, ours in self._installed:
                module.processor = ours

    def __enter__(self) -> Self:
        if self._installed:
            raise RuntimeError("this attention is installed already")
        found = dict(attention_layers(self.unet))
        if self._kernel is None:
            weight = next(self.unet.parameters())
            sizes = tuple(sorted({module.inner_dim // module.heads for module in found.values()}))
            self._kernel, self.note = choose(weight.device, weight.dtype, sizes)
        for name, module in found.items():
            ours = Processor(self, name, role_of(name, module), module.processor)
            self._installed.append((module, module.processor, ours))
            module.processor = ours
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._installed:
            module, old, _ = self._installed.pop()
            module.processor = old
        self.plan = None
        self._texts.clear()

    def work(self, name: str, role: Role, tokens: int) -> Work | None:
        """What the plan wants of one layer; None: nothing."""
        plan = self._plan
        if plan is None:
            return None
        if self._grid is None:
            raise RuntimeError("a plan needs the shape of the forward: call attention.at(grid) first")
        grid = self._grid

        def here(part: Tap | Isolation | Regional | KeyFrames | None) -> bool:
            return part is not None and part.where.holds(name, role, tokens, grid)

        taps = [tap for tap in plan.taps if here(tap)] if self._maps is not None else []
        shape = (0, 0) if role is Role.TEMPORAL else cells(tokens, grid)
        work = Work(
            taps=taps,
            isolation=plan.isolation if here(plan.isolation) else None,
            regional=plan.regional if here(plan.regional) else None,
            key_frames=plan.key_frames if here(plan.key_frames) else None,
            cells=shape,
            frames=grid.frames,
        )
        return work if taps or work.isolation or work.regional or work.key_frames else None

    def keep(self, tap: Tap, layer: str, values: Tensor, shape: tuple[int, int]) -> None:
        """Hand a map to whoever collects."""
        if self._maps is not None:
            self._maps.setdefault(tap.name, []).append(Map(layer, values, shape))

    def text_of(self, name: str, attn: Any, regional: Regional, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[1 or n, H, L, d]`` of one region. They depend on neither picture nor timestep: made once."""
        text = regional.texts[index]
        known = self._texts.setdefault(text, {})
        if name in known:
            return known[name]
        with self.routed(text.route):
            states = slice_of(text.states, self._order[name], attn.cross_attention_dim).to(like)
            made = tuple(split_heads(attn, layer(states)) for layer in (attn.to_k, attn.to_v))
        key, value = (attn.norm_k(made[0]) if attn.norm_k is not None else made[0]), made[1]
        if text.route is not None and not key.requires_grad:
            known[name] = (key, value)
        return key, value

    def routed(self, route: Any) -> Any:
        """The bank's route of one region, for a while."""
        return nullcontext() if self.bank is None or route is None else self.bank.acting(route)


@dataclass(frozen=True, eq=False, kw_only=True)
class Work:
    """The part of a plan that concerns one layer."""

    taps: Sequence[Tap]
    isolation: Isolation | None
    regional: Regional | None
    key_frames: KeyFrames | None
    cells: tuple[int, int]
    frames: int


class Processor:
    """diffusers' processor contract for one layer. Without work it calls the processor that was there before."""

    def __init__(self, owner: Attention, name: str, role: Role, stock: Any) -> None:
        self.owner, self.name, self.role, self.stock = owner, name, role, stock

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        work = self.owner.work(self.name, self.role, hidden_states.shape[1])
        kernel = self.owner.kernel
        if work is None and (kernel is sdpa or attention_mask is not None):
            out: Tensor = self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
            return out
        if attention_mask is not None:
            raise ValueError(f"attention layer '{self.name}' has work and a mask of somebody else: only one of them can act")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            split_heads(attn, layer(x)) for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        q = attn.norm_q(q) if attn.norm_q is not None else q
        k = attn.norm_k(k) if attn.norm_k is not None else k
        if work is None:
            return project(attn, kernel(q, k, v)) / attn.rescale_output_factor
        for tap in work.taps:
            self._read(attn, tap, work, q, k)
        if work.isolation is not None:
            heads = isolated(q, k, v, work.isolation, work.cells, kernel)
        elif work.key_frames is not None:
            table = work.key_frames.table(work.frames).to(k.device)
            heads = kernel(q, from_frames(k, table), from_frames(v, table))
        else:
            heads = kernel(q, k, v)
        result = project(attn, heads)
        if work.regional is not None:
            result = self._regional(attn, work.regional, work.cells, q, result)
        return result / attn.rescale_output_factor

    def _read(self, attn: Any, tap: Tap, work: Work, q: Tensor, k: Tensor) -> None:
        if tap.region is not None and work.regional is not None:
            k, _ = self.owner.text_of(self.name, attn, work.regional, tap.region, q)
            k = k.expand(len(q), -1, -1, -1)
        rows = list(range(len(q))) if tap.rows is None else list(tap.rows)
        sets = tap.sets
        if sets is not None and self.role is Role.SELF:
            sets = Regions(sets).at(*work.cells)
        allowed = None
        if work.isolation is not None and self.role is Role.SELF:
            allowed = visible(work.isolation.regions.at(*work.cells))
        if sets is not None:
            sets = sets.to(q)
        values = read(q[rows], k[rows], sets, allowed, self.owner.kernel)
        self.owner.keep(tap, self.name, values, work.cells)

    def _regional(self, attn: Any, plan: Regional, shape: tuple[int, int], q: Tensor, prompt: Tensor) -> Tensor:
        covered = plan.regions.at(*shape).to(q.device)
        total = torch.zeros_like(prompt)
        for index, text in enumerate(plan.texts):
            places = covered[index].nonzero().squeeze(1)
            key, value = (each.expand(len(q), -1, -1, -1) for each in self.owner.text_of(self.name, attn, plan, index, q))
            with self.owner.routed(text.route):
                own = project(attn, self.owner.kernel(q[:, :, places], key, value))
            total = total.index_add(1, places, own.to(total.dtype))
        count = covered.sum(0)[None, :, None]
        mean = total / count.clamp(min=1)
        if plan.replace != 1:
            mean = torch.lerp(prompt, mean, plan.replace)
        return torch.where(count > 0, mean, prompt)


def attention_layers(unet: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every attention layer a plan may touch: plain ones between tokens ``[B, N, C]``.

    Raises:
        RequestError: somebody has replaced a processor, or blocks that a plan would have to know.
    """
    from diffusers.models.attention_processor import Attention as Layer

    for name, module in unet.named_modules():
        if type(module).__name__.startswith("FreeNoise"):
            raise RequestError("FreeNoise is on in this model and replaces its attention blocks: turn it off for this method")
        if not isinstance(module, Layer):
            continue
        if type(module.processor).__name__ not in STOCK:
            raise RequestError(
                f"the attention layer '{name}' already has the processor {type(module.processor).__name__} (an IP-Adapter, or "
                "xformers switched on elsewhere): undo that first, this method needs the layer for itself"
            )
        if module.group_norm is None and module.spatial_norm is None and module.added_kv_proj_dim is None:
            yield name, module


def role_of(name: str, module: Any) -> Role:
    if is_temporal(name):
        return Role.TEMPORAL
    return Role.CROSS if module.is_cross_attention else Role.SELF


def split_heads(attn: Any, x: Tensor) -> Tensor:
    """``[B, N, H * d]`` to ``[B, H, N, d]``."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def project(attn: Any, heads: Tensor) -> Tensor:
    """``[B, H, N, d]`` through the output projection: ``[B, N, C]``."""
    out: Tensor = attn.to_out[1](attn.to_out[0](heads.transpose(1, 2).flatten(2)))
    return out


def isolated(q: Tensor, k: Tensor, v: Tensor, plan: Isolation, shape: tuple[int, int], kernel: Kernel) -> Tensor:
    """Attention in which regions do not see each other, in the rows that the plan names."""
    if plan.rows is not None:
        rows = list(plan.rows)
        heads = kernel(q, k, v).clone()
        heads[rows] = _gathered(q[rows], k[rows], v[rows], plan.regions.at(*shape), kernel)
        return heads
    return _gathered(q, k, v, plan.regions.at(*shape), kernel)


def _gathered(q: Tensor, k: Tensor, v: Tensor, covered: Tensor, kernel: Kernel) -> Tensor:
    order, parts = [], []
    for queries, keys in groups(covered):
        order.append(queries)
        at = keys.to(k.device)
        everything = len(keys) == k.shape[2]
        parts.append(kernel(q[:, :, queries.to(q.device)], *((k, v) if everything else (k[:, :, at], v[:, :, at]))))
    back = torch.cat(order).argsort().to(q.device)
    return torch.cat(parts, dim=2)[:, :, back]


def visible(covered: Tensor) -> Tensor:
    """``[N, N]``, true where a query may see a key under isolation; for small layers."""
    free = ~covered.any(0)
    shared = (covered.T.float() @ covered.float()) > 0
    return shared | free[None, :] | free[:, None]


def from_frames(x: Tensor, table: Tensor) -> Tensor:
    """``[n * f, H, N, d]`` to ``[n * f, H, m * N, d]``: each frame's tokens replaced by those of its ``m`` key frames."""
    frames, several = table.shape
    picked = x.unflatten(0, (-1, frames))[:, table]
    return picked.movedim(2, 3).flatten(3, 4).flatten(0, 1) if several > 1 else picked[:, :, 0].flatten(0, 1)


def read(q: Tensor, k: Tensor, sets: Tensor | None, allowed: Tensor | None, kernel: Kernel) -> Tensor:
    """How much of each query's attention goes to each set of keys, mean over heads: ``[B, M, S]``, at least single precision.

    Args:
        q, k: ``[B, H, M, d]``, ``[B, H, N, d]``.
        sets: ``[S, N]`` or ``[B, S, N]``; None: every key by itself.
        allowed: ``[M, N]``, true where a query may look; None: everywhere.
    """
    queries, keys = q.shape[2], k.shape[2]
    if queries * keys <= EXPLICIT:
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = q.to(wide) @ k.to(wide).transpose(-1, -2) * q.shape[-1] ** -0.5
        if allowed is not None:
            logits = logits.masked_fill(~allowed.to(logits.device), float("-inf"))
        maps = logits.softmax(-1).mean(1)
        return maps if sets is None else maps @ sets.to(wide).transpose(-1, -2)
    if sets is None or allowed is not None:
        raise RequestError(
            f"this method reads who looks at whom entry by entry, and {queries} x {keys} places are too many for that: "
            "choose a smaller picture"
        )
    return mass(q, k, sets, kernel)


def mass(q: Tensor, k: Tensor, sets: Tensor, kernel: Kernel) -> Tensor:
    """The same through the kernel, with the sets' indicators as values: no map is ever written out."""
    size = k.shape[-1]
    parts = []
    for some in sets.split(size, dim=-2):
        values = k.new_zeros(k.shape)
        columns = some.transpose(-1, -2).to(k)
        values[..., : columns.shape[-1]] = columns if columns.ndim == 2 else columns[:, None]
        parts.append(kernel(q, k, values)[..., : columns.shape[-1]].float().mean(1))
    return torch.cat(parts, dim=-1)
