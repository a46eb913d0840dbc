"""One sampling run as its methods see it: the state, the forwards, and the hooks of a method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from compose.bank import Adapter, Layer, LoraBank, OnLayer
from compose.routes import Grid
from compose.text import Encoded, Wording, added_conditions, encode_pair
from studio.errors import CancelledError
from studio.requests import Region, Request

if TYPE_CHECKING:
    from compose.attention import Attention
    from compose.figures import Figure
    from compose.plan import AttentionPlan
    from compose.residuals import Residuals
    from studio.base import Base

Encode = Callable[[], tuple[Encoded, Encoded]]
"""Encodes the prompts of a run again, ``(negative, positive)``, with whatever LoRAs the bank's route lets act just now."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One timestep of the loop: ``index`` of ``count`` (samplers of second order visit some noise levels twice).

    ``skipped`` timesteps of the schedule lie before the first one, when a run starts from a picture.
    """

    index: int
    count: int
    timestep: Tensor
    skipped: int = 0

    @property
    def fraction(self) -> float:
        """How much of the schedule lies behind, 0..1: a noise level, also in runs that start from a picture."""
        return (self.skipped + self.index) / (self.skipped + self.count)


@dataclass
class Passes:
    """Rows of passes through the UNet: ``whole`` forwards, also those that reuse deep features, ``early`` ones that stop at the
    last map, and ``backward`` ones; ``skipped`` are those whose gradient was not finite.
    """

    whole: int = 0
    early: int = 0
    backward: int = 0
    skipped: int = 0


@dataclass(eq=False, kw_only=True)
class Run:
    """Everything of one sampling run, handed to every hook.

    Args:
        latents: the present state ``[n, c, h, w]``, single precision; a hook may replace it.
        noise: the unit noise it started from. first: the state to begin with, from unit noise.
        fresh: makes a scheduler that stands before the first timestep.
        negative, positive: conditioning, one row per row of ``latents``. ``negative`` is not used when nothing is guided.
        guidance: one number, or one per row ``[n, 1, 1, 1]``.
        generators: one CPU generator per row: all randomness of row ``i`` comes from its own.
        size: picture (width, height) in pixels.
        states: latent states side by side; state ``s`` has the rows ``run.rows(s)``.
        encode: encodes the prompts again; None when only the conditioning is known.
        wording: the prompts as written; None when only the conditioning is known.
        timesteps, skipped: what the loop will visit, and how many timesteps of the schedule lie before.
        notes: sentences for the user.
        passes: what was computed, counted; probe runs count too.
        regions: parts of the picture with LoRAs of their own, for methods that take them.
        explaining: whether somebody wants :meth:`Method.explain` afterwards, so that maps are worth keeping.
        residuals: what an image condition adds inside the UNet, asked for each forward.
        room: rows that memory has room for in a forward, for methods that make passes side by side.
    """

    base: Base
    positive: Encoded
    negative: Encoded
    size: tuple[int, int]
    guidance: float | Tensor
    generators: list[torch.Generator]
    scheduler: Any
    latents: Tensor
    noise: Tensor
    first: Callable[[Tensor], Tensor]
    fresh: Callable[[], Any]
    bank: LoraBank | None = None
    cancelled: Callable[[], bool] | None = None
    encode: Encode | None = None
    wording: Wording | None = None
    states: int = 1
    timesteps: Tensor = field(default_factory=lambda: torch.zeros(0))
    skipped: int = 0
    notes: list[str] = field(default_factory=list)
    passes: Passes = field(default_factory=Passes)
    regions: tuple[Region, ...] = ()
    explaining: bool = False
    residuals: Residuals | None = None
    room: int = 1
    resources: ExitStack = field(default_factory=ExitStack, repr=False)
    again: bool = field(default=False, repr=False)
    _attention: Attention | None = field(default=None, repr=False)
    _both: Encoded | None = field(default=None, repr=False)

    @property
    def guided(self) -> bool:
        return bool((self.guidance > 1).any()) if isinstance(self.guidance, Tensor) else self.guidance > 1

    def rows(self, state: int) -> slice:
        """The rows of one of the states side by side."""
        each = len(self.latents) // self.states
        return slice(state * each, (state + 1) * each)

    def check_cancelled(self) -> None:
        """Raise when the user has cancelled; methods with inner passes call it between them."""
        if self.cancelled is not None and self.cancelled():
            raise CancelledError("cancelled")

    def attend(self, plan: AttentionPlan | None) -> Attention:
        """Let ``plan`` act in every attention layer from now on, until the run ends or another plan is set."""
        if self._attention is None:
            from compose.attention import Attention

            self._attention = self.resources.enter_context(Attention(self.base.unet, bank=self.bank))
        self._attention.plan = plan
        return self._attention

    @contextmanager
    def planned(self, plan: AttentionPlan) -> Iterator[Attention]:
        """``plan`` acts in the forwards made meanwhile; then the plan from before acts again."""
        before = None if self._attention is None else self._attention.plan
        attention = self._attention if self._attention is not None and before is plan else self.attend(plan)
        try:
            yield attention
        finally:
            if before is not plan:
                attention.plan = before

    def forward(self, x: Tensor, timestep: Tensor, encoded: Encoded) -> Tensor:
        """One pass of the UNet over rows ``x [n, c, h, w]`` with as many rows of conditioning; single precision in and out."""
        unet = self.base.unet
        grid = Grid(rows=len(x), height=x.shape[-2], width=x.shape[-1])
        if self.bank is not None:
            self.bank.at(grid)
        if self._attention is not None:
            self._attention.at(grid)
        added = added_conditions(self.base, encoded, self.size)
        more: dict[str, Any] = {} if added is None else {"added_cond_kwargs": added}
        if self.residuals is not None:
            more |= self.residuals(x, timestep, encoded)
        out = unet(x.to(unet.dtype), timestep, encoder_hidden_states=encoded.states, return_dict=False, **more)[0]
        self.passes.whole += len(x)
        return out.to(x.dtype)

    def forward_guided(self, x: Tensor, timestep: Tensor) -> tuple[Tensor | None, Tensor]:
        """The stock prediction: unconditional and conditional rows in one pass."""
        if not self.guided:
            return None, self.forward(x, timestep, self.positive)
        if self._both is None:
            self._both = joined(self.negative, self.positive)
        uncond, cond = self.forward(torch.cat([x, x]), timestep, self._both).chunk(2)
        return uncond, cond

    def say(self, prompt: str, negative: str | None = None) -> tuple[Encoded, Encoded]:
        """Other prompts, ``(negative, positive)`` with a row per row of the latents; what the bank's route lets act now, acts.

        ``negative`` None: the request's own.
        """
        told = self.wording or Wording(prompt=prompt)
        pair = encode_pair(self.base, [prompt], [told.negative if negative is None else negative], told.reading)
        rows = [0] * len(self.latents)
        return pair[0].rows(rows), pair[1].rows(rows)

    def condition(self, negative: Encoded, positive: Encoded) -> None:
        """Use other prompts from now on; as many rows as before."""
        self.negative, self.positive, self._both = negative, positive, None

    def restart(self, noise: Tensor | None = None) -> None:
        """Begin again, once the present timestep is done, from ``noise`` (unit noise; None: the same as before)."""
        if noise is not None:
            self.noise = noise
        self.again = True

    def probe(self, method: Method, steps: int, *, noise: Tensor | None = None) -> Run:
        """The first ``steps`` timesteps with another method, from the same noise unless told; this run stays as it was.

        Returns:
            The probe's own run at its end: its ``latents`` and ``notes``.
        """
        from compose.denoise import loop

        start = self.noise if noise is None else noise
        states = [generator.get_state() for generator in self.generators]
        twin = replace(
            self,
            scheduler=self.fresh(),
            generators=[torch.Generator("cpu").set_state(state) for state in states],
            noise=start,
            latents=self.first(start),
            resources=ExitStack(),
            notes=[],
            again=False,
            _attention=None,
        )
        with self._unplanned():
            loop(twin, method, stop=steps)
        return twin

    @contextmanager
    def _unplanned(self) -> Iterator[None]:
        """The attention layers as they were before this run, for a while."""
        if self._attention is None:
            yield
        else:
            with self._attention.lifted():
                yield


class Options(Request):
    """Base of the options of a method: typed, unknown ones refused. Values may come as text from a command line."""


class Method:
    """How a prediction is made. The base class is the stock model, with whatever the bank's route lets act."""

    takes: ClassVar[type[Options]] = Options
    regions: ClassVar[Literal["none", "optional", "required"]] = "none"
    """Whether a request of this method may or must have regions."""

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or self.takes()

    @classmethod
    def of(cls, **options: Any) -> Self:
        """With checked options.

        Raises:
            UnknownNameError, RequestError: an option that is unknown or does not fit.
        """
        return cls(cls.takes.of(**options))

    @property
    def divisible(self) -> bool:
        """Whether less :attr:`Run.room` would mean less memory: passes are made side by side, and nobody said how many."""
        return getattr(self.options, "chunk", 1) is None

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise a RequestError when these LoRAs cannot be composed this way; called before anything is loaded or attached."""

    def survey(
        self, base: Base, adapters: Sequence[Adapter], layers: Mapping[str, Layer], on_step: OnLayer | None = None
    ) -> Sequence[str]:
        """Called before :meth:`fuse`, with the base as it is: what merging needs to know of it is measured here.

        Returns:
            Notes for people.
        """
        return ()

    def fuse(
        self, adapters: Sequence[Adapter], layers: Mapping[str, Layer], on_layer: OnLayer | None = None
    ) -> Sequence[Adapter]:
        """What the bank shall attach in place of a request's LoRAs: merges of weights happen here."""
        return adapters

    def prepare(self, run: Run) -> None:
        """Called once, before the first step."""

    def before_step(self, run: Run, step: Step) -> None:
        """Called before each timestep: set routes here."""

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """``(eps_uncond or None, eps_cond)`` for the scaled input ``x [n, c, h, w]``; the loop does guidance."""
        return run.forward_guided(x, step.timestep)

    def after_step(self, run: Run, step: Step) -> None:
        """Called after each timestep, with the new ``run.latents``."""

    def explain(self, run: Run) -> Sequence[Figure]:
        """What was done, for people to look at; called once after a run that is :attr:`Run.explaining`."""
        return ()


def joined(*several: Encoded) -> Encoded:
    """The rows of all, one after the other."""
    pooled = [each.pooled for each in several if each.pooled is not None]
    return Encoded(
        states=torch.cat([each.states for each in several]),
        ids=torch.cat([each.ids for each in several]),
        pooled=torch.cat(pooled) if pooled else None,
    )
