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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from compose.layerwise import cross_layers, reading_layers
from compose.routes import Grid, Route, Site, constant, read_route, site_of
from compose.stack import Layer, Stack
from studio.embeddings import Embedding, carried_embeddings
from studio.errors import LoraFileError, RequestError, WrongBaseError
from studio.lora.library import short_name
from studio.lora.model import Delta, Lora
from studio.lora.names import module_key

if TYPE_CHECKING:
    from studio.base import Base

Gains = Callable[[Site], Sequence[float]]
"""How much each LoRA weighs at one layer, beside route and weight: ``site -> [k]``."""

Fuse = Callable[[Sequence["Adapter"], Mapping[str, Layer]], Sequence["Adapter"]]
"""What to attach in place of a request's LoRAs, given the layers of the models by the names LoRAs use."""

OnLayer = Callable[[int, int], None]
"""Hears of how many layers weights are merged already, and of how many in all; it may raise to stop."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA of a request: its name for messages, what was read, and its weight."""

    name: str
    lora: Lora
    weight: float = 1.0

    @property
    def names(self) -> tuple[str, str]:
        """What options may call it: as the request does, or without folder and ``.safetensors``, other dots and all."""
        return self.name, short_name(self.name)

    @property
    def words(self) -> list[Embedding]:
        """The learnt words it carries; a prompt that calls one is read with them."""
        return carried_embeddings(self.name, self.lora)


def row_names(adapters: Sequence[Adapter]) -> list[str]:
    """What rows of figures call each LoRA: its short name, or its full one where two LoRAs share the short one."""
    short = [adapter.names[1] for adapter in adapters]
    return [name if short.count(name) == 1 else adapter.name for name, adapter in zip(short, adapters, strict=True)]


def refuse_ambiguous(name: str, option: str, adapters: Sequence[Adapter]) -> None:
    """Refuse that ``option`` names a LoRA by a ``name`` that several have: it would act on all of them.

    Raises:
        RequestError: more than one LoRA is called so.
    """
    fitting = [adapter.name for adapter in adapters if name in adapter.names]
    if len(fitting) > 1:
        raise RequestError(
            f"'{option}' names '{name}', which may mean {' or '.join(fitting)}: write the name of one in full, or rename a file"
        )


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
        self._reading = ExitStack()

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
            self._read_layers()
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
        self._words_fit(adapter)
        if not match.complete or not (match.total or adapter.lora.tokens):
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

    def _words_fit(self, adapter: Adapter) -> None:
        """Words with vectors for every cross-attention layer need a UNet with as many."""
        unet = self.models.get("unet")
        there = len(cross_layers(unet)) if unet is not None else 0
        odd = next((word for word in adapter.words if word.layers not in (0, there)), None)
        if odd is not None:
            raise WrongBaseError(
                f"the word '{odd.calls[0]}' of LoRA '{adapter.name}' was learnt for {odd.layers} cross-attention layers, but "
                f"the base has {there}: it was made for another model family"
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

    def _read_layers(self) -> None:
        """Words of a LoRA may say something else to every cross-attention layer: the UNet must read them so."""
        if any(adapter.weight != 0 and word.layers for adapter in self.requested for word in adapter.words):
            self._reading.enter_context(reading_layers(self.models["unet"]))

    def _restore(self) -> None:
        self._reading.close()
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
