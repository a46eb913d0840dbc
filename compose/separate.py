"""What Switch, Composite and CMLoRA share: LoRAs that act one by one, each with its own rows, route and prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import field_validator
from torch import Tensor

from compose.bank import Adapter
from compose.routes import Route, per_row
from compose.run import Method, Options, Run, joined
from compose.text import Encoded
from studio.errors import RequestError


def names(value: object) -> object:
    """A list of names, also written ``name,name``."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class SeparateOptions(Options):
    """Options of every method that lets LoRAs act one by one.

    Args:
        always: LoRAs that act in every pass, such as one that makes few steps possible. They are no concepts of their own.
    """

    always: tuple[str, ...] = ()

    _names = field_validator("always", mode="before")(names)


class Separate(Method):
    """Base of methods that let the LoRAs of a request act one by one.

    Attributes after :meth:`prepare`:
        concepts: indices of the LoRAs that take turns; none when there is no LoRA with a weight.
        prompts: ``(negative, positive)`` of each concept, encoded with that LoRA alone where one changes the text encoder.
    """

    takes: ClassVar[type[Options]] = SeparateOptions
    options: SeparateOptions
    always: tuple[int, ...] = ()
    concepts: tuple[int, ...] = ()
    prompts: dict[int, tuple[Encoded, Encoded]]
    _rows: dict[tuple[int, ...], Encoded]

    def check(self, adapters: Sequence[Adapter]) -> None:
        self.known(self.options.always, "always", adapters)

    @staticmethod
    def known(wanted: Sequence[str], option: str, adapters: Sequence[Adapter]) -> None:
        """Refuse an option that names a LoRA the request does not have."""
        have = ", ".join(adapter.name for adapter in adapters) or "it has none"
        for name in wanted:
            if not any(name in adapter.names for adapter in adapters):
                raise RequestError(f"'{option}' names '{name}', which is none of the request's LoRAs ({have})")

    def prepare(self, run: Run) -> None:
        self.prompts, self._rows = {}, {}
        bank = run.bank
        self.check(bank.adapters if bank is not None else ())
        if bank is None:
            self.always = self.concepts = ()
            return
        self.always = tuple(k for k in bank.active if {*bank.adapters[k].names} & {*self.options.always})
        self.concepts = tuple(k for k in bank.active if k not in self.always)
        speaking = any(key.startswith("text_encoder") for k in bank.active for key in bank.adapters[k].lora.layers)
        for concept in self.concepts:
            if speaking and run.encode is not None:
                with bank.acting(self.only(run, concept)):
                    self.prompts[concept] = run.encode()
            else:
                self.prompts[concept] = (run.negative, run.positive)
        bank.route = self.only(run, None)

    def weights(self, run: Run, concept: int | None) -> list[float]:
        """One number per LoRA: 1 for ``concept`` and for those that always act."""
        count = len(run.bank.adapters) if run.bank is not None else 0
        return [1.0 if k == concept or k in self.always else 0.0 for k in range(count)]

    def only(self, run: Run, concept: int | None) -> Route:
        """The route that lets one concept act, with those that always do."""
        return torch.tensor(self.weights(run, concept)).view(1, 1, 1, 1, 1, -1)

    def each(self, run: Run, x: Tensor, timestep: Tensor, concepts: Sequence[int]) -> tuple[Tensor | None, Tensor]:
        """What each of ``concepts`` alone predicts, in one batched forward: ``(uncond or None, cond)``, ``[K, n, c, h, w]``."""
        if run.bank is None:
            raise RuntimeError("concepts without a bank")
        halves = 2 if run.guided else 1
        key = tuple(concepts)
        if key not in self._rows:
            parts = [part for k in concepts for part in (self.prompts[k] if run.guided else self.prompts[k][1:])]
            self._rows[key] = joined(*parts)
        rows = len(x) * halves
        run.bank.route = per_row(torch.tensor([self.weights(run, k) for k in concepts for _ in range(rows)]))
        out = run.forward(x.repeat(len(concepts) * halves, 1, 1, 1), timestep, self._rows[key])
        out = out.unflatten(0, (len(concepts), halves, len(x)))
        return (out[:, 0] if run.guided else None), out[:, -1]


def chunks(concepts: Sequence[int], size: int) -> list[Sequence[int]]:
    """Runs of at most ``size`` concepts."""
    return [concepts[start : start + size] for start in range(0, len(concepts), size)]


def at_once(run: Run, wanted: int | None) -> int:
    """How many concepts share a forward: as many as told, else as fit the rows the family denoises side by side; at least 1."""
    return wanted or max(1, run.base.family.batch // len(run.latents))
