"""What composing LoRAs costs, as ratios measured in one run on one machine.

    python -m tests.bench.speed --report docs/performance.md              # the numbers; the machine must be quiet
    python -m tests.bench.speed --shapes embedded --repeats 2 --steps 2   # a look

One thread. Contestants take turns (A B C A B C ...), so that a slow minute hits all of them; ratios are formed within a turn,
and the median is given with the lowest and highest. Peak memory is measured in fresh processes.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from studio.errors import RequestError, StudioError
from tests.bench.compose_rows import counted
from tests.bench.page import replace_section
from tests.bench.speed_models import LATENTS, Stage, agree, shape_named

MARK = "speed of composition: written by tests/bench/speed.py"
PEAK_COUNTS = (2, 3, 5)
STEPS = {"embedded": 20, "sd15": 4}
"""Steps of a run unless told."""


@dataclass(frozen=True)
class Ratio:
    """Median, lowest and highest of what a ratio was in each turn."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.middle:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Line:
    """One line of the table: what, its value in words, the bar in words ("" for none), and whether it is held."""

    what: str
    value: str
    bar: str = ""
    holds: bool = True


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, list[float]]:
    """Seconds of each contestant in each of ``repeats`` turns; all have run before. ``say`` hears each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats):
        for name, run in contestants.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
        say(f"turn {turn + 1} of {repeats}: " + ", ".join(f"{name} {spent[-1]:.2f} s" for name, spent in seconds.items()))
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], a: str, b: str, factor: float = 1.0) -> Ratio:
    """``a / (factor b)``, turn by turn."""
    return Ratio.of([x / (factor * y) for x, y in zip(seconds[a], seconds[b], strict=True)])


@dataclass(frozen=True)
class Course:
    """What CMLoRA computes: for each step how many whole and how many shallow passes, each kind in one batched forward.

    Args:
        count: LoRAs. share: of a whole pass's operations that a shallow one has.
    """

    forwards: tuple[tuple[int, int], ...]
    count: int
    share: float

    @classmethod
    def of(cls, method: Any, count: int, share: float) -> Course:
        """That of a :class:`~compose.cmlora.CMLoRA` which has run."""
        return cls(tuple((len(turn.whole), count - len(turn.whole)) for turn in method.course), count, share)

    def seconds(self, alone: float, together: float) -> float:
        """How long it should take where a run of one LoRA takes ``alone`` and one of Composite ``together`` seconds.

        Passes side by side are cheaper than one after the other, so a forward of n of them is taken to lie on the line
        between those two: ``T(n) = T(1) + (n - 1) / (K - 1) (T(K) - T(1))``.
        """
        one, all_of_them = alone / len(self.forwards), together / len(self.forwards)

        def forward(passes: int) -> float:
            return one + (passes - 1) / (self.count - 1) * (all_of_them - one) if passes else 0.0

        return sum(forward(whole) + self.share * forward(shallow) for whole, shallow in self.forwards)

    @property
    def told(self) -> str:
        """In words."""
        whole, shallow = (sum(passes) for passes in zip(*self.forwards, strict=True))
        return f"{whole} whole and {shallow} shallow passes ({self.share:.3f} of a whole one each)"


def shallow_share(stage: Stage) -> float:
    """What a shallow forward of one LoRA computes, as a share of a whole one; counted in runs with and without the cache."""
    flops = {}
    for cache in (True, False):
        run, method = stage.composed("cmlora", high=stage.names, cache=cache)
        with counted() as total:
            run()
            flops[cache] = total(), method.whole, method.shallow  # type: ignore[attr-defined]
    whole = flops[False][0] / flops[False][1]
    total_flops, wholes, shallows = flops[True]
    return (total_flops - wholes * whole) / (shallows * whole)


def peak_bytes(run: Callable[[], object]) -> int:
    """The largest running sum of live tensor bytes allocated within ``run``, from torch's profiler, after one run before it."""
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def composite_peak(stage: Stage) -> int:
    """Peak memory of Composite, one LoRA at a time; the bank is attached before, its tensors count as weights."""
    from compose import method_named
    from compose.bank import LoraBank

    with LoraBank.on(stage.shape.base, stage.adapters()) as bank:
        return peak_bytes(lambda: stage.sampled(method_named("composite", chunk=1), bank))


def peak_in_fresh_process(shape: str, count: int, side: int) -> int:
    """:func:`composite_peak` in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.speed", "--peak", str(count), "--shapes", shape, "--side", str(side)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RequestError(f"measuring memory failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])


def told(text: str) -> None:
    """A line about how far it is."""
    print(text, file=sys.stderr, flush=True)


def measure(shape: str, stage: Stage, repeats: int) -> list[Line]:
    """All lines of one shape."""
    peft = stage.peft()
    merged = stage.merged()
    composite, _ = stage.composed("composite")
    cmlora, method = stage.composed("cmlora", high=stage.names)
    summed, _ = stage.composed("merge")
    alone, _ = stage.composed("merge", 1)

    def scaled() -> Tensor:
        peft.keep_all_active()
        return peft.composite(peft.set_scale)

    contestants: dict[str, Callable[[], Tensor]] = {
        "composite": composite,
        "set_scale": scaled,
        "set_active": lambda: peft.composite(peft.set_active),
        "set_adapters": lambda: peft.composite(peft.set_adapters),
        "cmlora": cmlora,
        "alone": alone,
        "sum": summed,
        "merged": merged,
    }
    drawn = {}
    for name, run in contestants.items():
        told(f"{shape}: {name}, a turn that does not count")
        drawn[name] = run()
    for a, b in (("composite", "set_scale"), ("composite", "set_active"), ("composite", "set_adapters"), ("sum", "merged")):
        agree(drawn[a], drawn[b], (a, b))
    told(f"{shape}: counting operations")
    course = Course.of(method, stage.count, shallow_share(stage))
    return lines_of(shape, take_turns(contestants, repeats, say=told), course)


def lines_of(shape: str, seconds: Mapping[str, Sequence[float]], course: Course) -> list[Line]:
    """Ratios against their bars. ``course``: what CMLoRA computes in a run."""
    batched = ratio(seconds, "set_scale", "composite")
    predicted = [course.seconds(*both) for both in zip(seconds["alone"], seconds["composite"], strict=True)]
    cached = ratio({**seconds, "predicted": predicted}, "cmlora", "predicted")
    routed = ratio(seconds, "sum", "merged")
    bar = "<= 1.25" if shape == "sd15" else ""
    return [
        Line(
            f"sequential passes, cached set_scale / composite, K = {course.count}",
            str(batched),
            ">= 1.3",
            batched.middle >= 1.3,
        ),
        Line("sequential passes, only the one adapter active / composite", str(ratio(seconds, "set_active", "composite"))),
        Line("sequential passes, set_adapters / composite", str(ratio(seconds, "set_adapters", "composite"))),
        Line(
            f"cmlora / what its {course.told} predict, at the speed of composite and of one LoRA alone",
            str(cached),
            "within 25 %",
            0.75 <= cached.middle <= 1.25,
        ),
        Line("cmlora / composite", str(ratio(seconds, "cmlora", "composite"))),
        Line(
            f"routed sum of {course.count} / truly merged model",
            str(routed),
            "<= 1.25" if bar else "",
            not bar or routed.middle <= 1.25,
        ),
        Line("composite, seconds a run", str(Ratio.of(seconds["composite"]))),
    ]


def memory_lines(shape: str, side: int, peak: Callable[[str, int, int], int] = peak_in_fresh_process) -> list[Line]:
    """Composite's peak at chunk 1 for several K."""
    peaks = [peak(shape, count, side) for count in PEAK_COUNTS]
    told = ", ".join(f"{value / 2**20:.1f}" for value in peaks)
    flat = max(peaks) / min(peaks)
    counts = ", ".join(map(str, PEAK_COUNTS))
    return [Line(f"composite, chunk 1: peak MiB at K = {counts}", f"{told} (ratio {flat:.3f})", "flat: <= 1.02", flat <= 1.02)]


def section(found: Mapping[str, Sequence[Line]], repeats: int, steps: Mapping[str, int], side: int) -> str:
    """The markdown of a run."""
    titles = {
        "embedded": "embedded base, rank 8, attention and feed-forward",
        "sd15": "random UNet of SD 1.5's shape, rank 32, attention and feed-forward",
    }
    told = [
        "## What composing costs", "", "    make bench-speed", "",
        f"One thread, {side} x {side} latents, guided runs, attaching the LoRAs included; medians of {repeats} turns "
        "with the lowest and highest.",
        f"Machine: {machine()}.", "",
    ]  # fmt: skip
    for shape, lines in found.items():
        told += [
            f"### {titles[shape]}, {steps[shape]} steps",
            "",
            "| ratio | median [lowest, highest] | bar | |",
            "|---|---|---|---|",
        ]
        told += [f"| {line.what} | {line.value} | {line.bar} | {verdict(line)} |" for line in lines]
        told.append("")
    return "\n".join(told)


def verdict(line: Line) -> str:
    return ("holds" if line.holds else "**missed**") if line.bar else ""


def machine() -> str:
    """Processor and versions."""
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return f"{cpu}, torch {torch.__version__}"


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text("utf-8").splitlines() if file.is_file() else []


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", default="embedded,sd15")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of a run (embedded 20, sd15 4)")
    parser.add_argument("--side", type=int, default=LATENTS, help="of the latents, a multiple of 8")
    parser.add_argument("--report", type=Path, help="page whose section is replaced")
    parser.add_argument("--peak", type=int, help="only print composite's peak memory in bytes, with so many LoRAs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    shapes = given.shapes.split(",")
    try:
        if min(given.repeats, 1 if given.steps is None else given.steps, given.side // 8) < 1 or given.side % 8:
            raise RequestError("--repeats and --steps must be at least 1, and --side a multiple of 8")
        if given.peak:
            print(composite_peak(Stage(shape_named(shapes[0]), given.peak, 2, given.side)))
            return 0
        steps = {shape: given.steps or STEPS.get(shape, 4) for shape in shapes}
        found: dict[str, list[Line]] = {}
        for shape in shapes:
            told(f"{shape}: peaks")
            memory = memory_lines(shape, given.side)
            found[shape] = measure(shape, Stage(shape_named(shape), 4, steps[shape], given.side), given.repeats) + memory
            text = section(found, given.repeats, steps, given.side)
            if given.report:  # each shape as it is done: the second takes much longer
                replace_section(given.report, text, MARK)
    except StudioError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0 if all(line.holds for lines in found.values() for line in lines) else 2


if __name__ == "__main__":
    raise SystemExit(main())
