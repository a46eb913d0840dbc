"""The Fourier profile of a LoRA (CMLoRA, ICLR 2025, section 3): whether it changes fine detail or broad shapes.

    F = fftshift(fft2(x)),  A(r) = mean over the ring r of log(|F| + 1e-8),  R(r) = A(r) / max A
    H_h(x) = mean of R(r) over r >= h r_max                        intensity of high frequencies, h = 0.2

of the latents after each step, averaged over channels. A LoRA's score is the mean of ``H(with it) - H(base)`` over the first
part of denoising: at 0 or above it counts as high-frequency (it acts early), below as low-frequency (it acts late).

What is different here: the published code sorts LoRAs into the two sets by hand; here the set follows from the score. It cuts
at a fixed ring, which a 64 x 64 latent does not reach; here the ring follows from r_max.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compose.routes import constant
from compose.run import Method, Run, Step
from compose.text import Reading, encode_pair
from studio.errors import FileError, RequestError
from studio.files import whole
from studio.hashes import cache_folder
from studio.lora.identity import trigger_words

if TYPE_CHECKING:
    from compose.bank import Adapter, LoraBank
    from compose.denoise import OnStep
    from studio.base import Base

VERSION = 2
HIGH = 0.2
EARLY = 0.6
STEPS = 10
SEEDS = (0, 1)
TEMPLATES = ("{}", "a {}", "a {} on grass", "a {} at night")
SUFFIX = ".profile.json"


def rings(height: int, width: int) -> Tensor:
    """The whole-numbered distance of every frequency from the middle, ``[h, w]``."""
    rows = torch.arange(height).view(-1, 1) - height // 2
    columns = torch.arange(width).view(1, -1) - width // 2
    return (rows.square() + columns.square()).double().sqrt().floor().long()


def radial(x: Tensor, log: bool = True) -> Tensor:
    """``A(r)`` of ``x [h, w]`` for r = 0 .. r_max."""
    size = torch.fft.fftshift(torch.fft.fft2(x.double())).abs()
    value = (size + 1e-8).log() if log else size
    ring = rings(*x.shape).flatten()
    total = torch.zeros(int(ring.max()) + 1, dtype=torch.float64).index_add_(0, ring, value.flatten())
    return total / torch.bincount(ring).clamp(min=1)


def high_frequency(x: Tensor, h: float = HIGH, log: bool = True) -> float:
    """``H_h`` of ``x [h, w]``: about 0 to 1, larger where fine detail is strong."""
    profile = radial(x.cpu(), log)
    first = int(h * (len(profile) - 1) + 0.5)
    return float((profile / profile.max())[first:].mean())


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What was measured: ``curve[i]`` is ``H(with the LoRA) - H(base)`` after step i, ``score`` its mean over the early part.

    ``high``: whether the LoRA counts as high-frequency.
    """

    lora_sha256: str
    base_sha256: str
    score: float
    curve: tuple[float, ...]
    h: float = HIGH
    early: float = EARLY
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = SEEDS
    version: int = VERSION

    @property
    def high(self) -> bool:
        return self.score >= 0

    def save(self, path: Path) -> None:
        """Write as JSON; the file appears whole or not at all."""
        with whole(path) as fresh:
            fresh.write_text(json.dumps(asdict(self), indent=1), "utf-8")


class Solo(Method):
    """One route throughout; remembers the latents after every step."""

    def __init__(self, route: Tensor | None) -> None:
        super().__init__()
        self.route = route
        self.seen: list[Tensor] = []

    def prepare(self, run: Run) -> None:
        if run.bank is not None and self.route is not None:
            run.bank.route = self.route

    def after_step(self, run: Run, step: Step) -> None:
        self.seen.append(run.latents.mean(1).cpu())


def prompts_for(adapter: Adapter) -> tuple[str, ...]:
    """What to measure a LoRA with: its trigger and class in a few sentences, or what other trainers note of its captions."""
    called = adapter.lora.called or next(iter(trigger_words(adapter.lora.metadata)), "")
    return tuple(template.format(called) for template in TEMPLATES) if called else ("",)


def measure(
    base: Base,
    bank: LoraBank,
    index: int,
    *,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    steps: int = STEPS,
    cancelled: Callable[[], bool] | None = None,
) -> Profile:
    """Profile LoRA ``index`` of an attached bank at weight 1, whatever its weight there, in the family's own size, sampler and
    guidance.

    Raises:
        RequestError: its weight is 0: such a LoRA is not attached.
        CancelledError: ``cancelled`` said so at some step.
    """
    adapter = bank.adapters[index]
    if adapter.weight == 0:
        raise RequestError(f"LoRA '{adapter.name}' has weight 0 here and cannot be profiled: give it another weight")
    told = tuple(prompts_for(adapter) if prompts is None else prompts)
    alone = [1 / adapter.weight if k == index else 0.0 for k in range(len(bank.adapters))]
    with_it, without = (
        _curve(solos(base, bank, constant(route), told, seeds, steps, cancelled=cancelled))
        for route in (alone, [0.0] * len(bank.adapters))
    )
    curve = (with_it - without).tolist()
    early = curve[: max(1, round(EARLY * len(curve)))]
    return Profile(
        lora_sha256=adapter.lora.sha256,
        base_sha256=base.sha256,
        score=sum(early) / len(early),
        curve=tuple(curve),
        prompts=told,
        seeds=tuple(seeds),
    )


def solos(
    base: Base,
    bank: LoraBank,
    route: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    *,
    on_step: OnStep | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Iterator[Solo]:
    """Runs of all prompts with all seeds under one route, as many side by side as the family's batch; prompts are encoded
    under that route too, with the words that LoRAs of the bank carry."""
    from compose.denoise import denoise

    rows = [(prompt, seed) for prompt in range(len(prompts)) for seed in seeds]
    with bank.acting(route):
        reading = Reading(embeddings=tuple(word for one in bank.adapters if one.weight != 0 for word in one.words))
        negative, positive = encode_pair(base, prompts, [""] * len(prompts), reading)
        for start in range(0, len(rows), base.family.batch):
            some = rows[start : start + base.family.batch]
            solo = Solo(route)
            denoise(
                base,
                negative.rows([prompt for prompt, _ in some]),
                positive.rows([prompt for prompt, _ in some]),
                seeds=[seed for _, seed in some],
                size=base.family.size,
                steps=steps,
                guidance=base.family.guidance,
                scheduler=base.family.scheduler,
                method=solo,
                bank=bank,
                on_step=on_step,
                cancelled=cancelled,
            )
            yield solo


def _curve(runs: Iterable[Solo]) -> Tensor:
    """Mean ``H`` after every step, over all rows of all runs."""
    totals, rows = [], 0
    for solo in runs:
        totals.append(torch.tensor([sum(high_frequency(x) for x in state) for state in solo.seen]))
        rows += len(solo.seen[0])
    return torch.stack(totals).sum(0) / rows


def places(adapter: Adapter, base: Base) -> list[Path]:
    """Where a profile may lie: beside the LoRA's file, or in this product's cache."""
    found = []
    if adapter.lora.source is not None:
        found.append(adapter.lora.source.with_name(adapter.lora.source.stem + SUFFIX))
    if adapter.lora.sha256:
        found.append(cache_folder() / "profiles" / f"{adapter.lora.sha256[:32]}-{base.sha256[:16]}{SUFFIX}")
    return found


def stored(adapter: Adapter, base: Base) -> Profile | None:
    """The profile that was measured with this very LoRA and base; None: there is none. Damaged files are as good as none."""
    for path in places(adapter, base):
        try:
            told: dict[str, Any] = json.loads(path.read_text("utf-8"))
            profile = Profile(**{**told, **{key: tuple(told[key]) for key in ("curve", "prompts", "seeds")}})
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if (profile.version, profile.lora_sha256, profile.base_sha256) == (VERSION, adapter.lora.sha256, base.sha256):
            return profile
    return None


def kept(found: Profile, where: Sequence[Path]) -> Path | None:
    """Write to the first of several places that can be written; None where none can: a read-only home only costs time."""
    for path in where:
        with suppress(FileError):
            found.save(path)
            return path
    return None


def profiled(base: Base, bank: LoraBank, index: int, cancelled: Callable[[], bool] | None = None) -> tuple[Profile, bool]:
    """The stored profile of LoRA ``index``, or a fresh one, which is kept in the cache; and whether it was fresh.

    Raises:
        RequestError, CancelledError: see :func:`measure`.
    """
    adapter = bank.adapters[index]
    known = stored(adapter, base)
    if known is not None:
        return known, False
    fresh = measure(base, bank, index, cancelled=cancelled)
    kept(fresh, places(adapter, base)[-1:] if adapter.lora.sha256 else ())
    return fresh, True
