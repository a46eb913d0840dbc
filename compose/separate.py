"""LoRAs that act one by one, each with its own rows, route and prompt: what Switch, Composite, CMLoRA and CLoRA share.

Composite and CMLoRA are means of what each LoRA alone predicts, ``e = sum_k s_k e_k`` with shares that sum to 1. At share
``1/n`` a LoRA changes the picture by an n-th of what it does alone. So the mean may be amplified, away from the base alone:

    e = e_0 + a (sum_k s_k e_k - e_0)        e_0: the UNet with those LoRAs only that always act

``a = 1`` is the mean, as published; ``a = n`` adds up, in noise space, what every LoRA changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import field_validator
from torch import Tensor

from compose.bank import Adapter, LoraBank, refuse_ambiguous
from compose.options import Count, Strength, names
from compose.regions import speaking
from compose.routes import Route, constant, per_row
from compose.run import Method, Options, Run, joined
from compose.text import Encoded
from studio.errors import RequestError

BASE = -1
"""The pass in which no concept acts, among the indices of LoRAs."""


Predict = Callable[[Sequence[int]], tuple[Tensor | None, Tensor]]
"""What some passes predict, side by side: ``(uncond or None, cond)``, ``[P, n, c, h, w]`` each."""


class SeparateOptions(Options):
    """Options of every method that lets LoRAs act one by one.

    Args:
        always: LoRAs that act in every pass and take no turns, such as one that makes 4 to 8 steps possible.
    """

    always: tuple[str, ...] = ()

    _names = field_validator("always", mode="before")(names)


class MeanOptions(SeparateOptions):
    """Options of the methods that take a mean.

    Args:
        amplify: how far to go from the base alone towards the mean, and beyond it; the papers have 1. Any other number takes
            a pass without those LoRAs too.
        chunk: LoRAs that share a forward; 1 needs least memory. By default as many as fit the base's batch.
    """

    amplify: Strength = 1.0
    chunk: Count | None = None


class Separate(Method):
    """Base of methods that let the LoRAs of a request act one by one.

    Attributes after :meth:`prepare`:
        concepts: indices of the LoRAs that take turns; none when there is no LoRA with a weight.
        prompts: ``(negative, positive)`` of each pass, encoded with that LoRA alone where one changes the text encoder.
    """

    takes: ClassVar[type[Options]] = SeparateOptions
    options: SeparateOptions
    always: tuple[int, ...] = ()
    concepts: tuple[int, ...] = ()
    prompts: dict[int, tuple[Encoded, Encoded]]

    def check(self, adapters: Sequence[Adapter]) -> None:
        known(self.options.always, "always", adapters)

    def is_always(self, adapter: Adapter) -> bool:
        """Whether a LoRA acts in every pass."""
        return bool({*adapter.names} & {*self.options.always})

    @property
    def passes(self) -> tuple[int, ...]:
        """What acts in turn: every concept."""
        return self.concepts

    def parted(self, run: Run) -> LoraBank | None:
        """Check the request and part its LoRAs into ``always`` and ``concepts``; the bank, None when there are no LoRAs."""
        self.prompts = {}
        bank = run.bank
        self.check(bank.adapters if bank is not None else ())
        if bank is None:
            self.always = self.concepts = ()
            return None
        self.always = tuple(k for k in bank.active if self.is_always(bank.adapters[k]))
        self.concepts = tuple(k for k in bank.active if k not in self.always)
        return bank

    def prepare(self, run: Run) -> None:
        bank = self.parted(run)
        if bank is None:
            return
        own_prompts = speaking([bank.adapters[k] for k in bank.active])
        for concept in self.passes:
            if own_prompts and run.encode is not None:
                with bank.acting(self.only(run, concept)):
                    self.prompts[concept] = run.encode()
            else:
                self.prompts[concept] = (run.negative, run.positive)
        bank.route = self.only(run, BASE)

    def weights(self, run: Run, concept: int) -> list[float]:
        """One number per LoRA: 1 for ``concept``, if it is one, and for those that always act."""
        count = len(run.bank.adapters) if run.bank is not None else 0
        return [1.0 if k == concept or k in self.always else 0.0 for k in range(count)]

    def only(self, run: Run, concept: int) -> Route:
        """The route that lets one concept act, with those that always do."""
        return constant(self.weights(run, concept))

    def each(self, run: Run, x: Tensor, timestep: Tensor, passes: Sequence[int]) -> tuple[Tensor | None, Tensor]:
        """What each of ``passes`` predicts, in one batched forward: ``(uncond or None, cond)``, ``[K, n, c, h, w]``."""
        return side_by_side(run, x, timestep, [(self.weights(run, k), self.prompts[k]) for k in passes])


class Mean(Separate):
    """Base of methods that take a mean of what each LoRA alone predicts, amplified if asked for."""

    takes: ClassVar[type[Options]] = MeanOptions
    options: MeanOptions

    @property
    def passes(self) -> tuple[int, ...]:
        """Every concept, and the base where the mean is amplified."""
        return (*self.concepts, BASE) if self.options.amplify != 1 and self.concepts else self.concepts

    def mean(
        self, run: Run, x: Tensor, shares: Mapping[int, float], parts: Sequence[tuple[Sequence[int], Predict]]
    ) -> tuple[Tensor | None, Tensor]:
        """The amplified mean over all passes, a chunk at a time: ``(uncond or None, cond)``, ``[n, c, h, w]`` each.

        Args:
            shares: of the concepts; they sum to 1. parts: all passes, with what predicts them.
        """
        amplify = self.options.amplify
        factors = {k: amplify * share for k, share in shares.items()} | {BASE: 1 - amplify}
        uncond, cond = torch.zeros_like(x), torch.zeros_like(x)
        for passes, predict in parts:
            for some in chunks(passes, at_once(run, self.options.chunk)):
                run.check_cancelled()
                u, v = predict(some)
                w = x.new_tensor([factors[k] for k in some]).view(-1, 1, 1, 1, 1)
                cond += (w * v).sum(0)
                if u is not None:
                    uncond += (w * u).sum(0)
        return (uncond if run.guided else None), cond

    @property
    def told(self) -> str:
        """What figures add where the mean is amplified."""
        if BASE not in self.passes:
            return ""
        return f" The mean is amplified {self.options.amplify:g} times from what the base alone predicts."


def known(wanted: Iterable[str], option: str, adapters: Sequence[Adapter]) -> None:
    """Refuse an option that names a LoRA the request does not have, or several of them by one name.

    Raises:
        RequestError: it does.
    """
    have = ", ".join(adapter.name for adapter in adapters) or "it has none"
    for name in wanted:
        if not any(name in adapter.names for adapter in adapters):
            raise RequestError(f"'{option}' names '{name}', which is none of the request's LoRAs ({have})")
        refuse_ambiguous(name, option, adapters)


def side_by_side(
    run: Run, x: Tensor, timestep: Tensor, passes: Sequence[tuple[Sequence[float], tuple[Encoded, Encoded]]]
) -> tuple[Tensor | None, Tensor]:
    """What each of several passes over ``x [n, c, h, w]`` predicts, in one batched forward.

    Args:
        passes: for each one weight per LoRA, and its ``(negative, positive)`` prompts. The joined prompts are not kept: that
            would cost memory for every pass, and joining costs next to nothing.

    Returns:
        ``(uncond or None, cond)``, ``[P, n, c, h, w]`` each.
    """
    if run.bank is None:
        raise RuntimeError("passes of their own without a bank")
    halves = 2 if run.guided else 1
    encoded = joined(*(part for _, pair in passes for part in pair[2 - halves :]))
    route = per_row(torch.tensor([weights for weights, _ in passes for _ in range(len(x) * halves)]))
    with run.bank.acting(route):  # or a method around this one would find the route of the last chunk
        out = run.forward(x.repeat(len(passes) * halves, 1, 1, 1), timestep, encoded)
    out = out.unflatten(0, (len(passes), halves, len(x)))
    return (out[:, 0] if run.guided else None), out[:, -1]


def chunks(passes: Sequence[int], size: int) -> list[Sequence[int]]:
    """Runs of at most ``size`` passes."""
    return [passes[start : start + size] for start in range(0, len(passes), size)]


def at_once(run: Run, wanted: int | None) -> int:
    """How many passes share a forward: as many as told, else as fit ``run.room``; at least 1."""
    return wanted or max(1, run.room // len(run.latents))
