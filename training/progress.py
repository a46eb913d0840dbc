"""Progress of a training for people: a bar with the time left on a terminal's stderr, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """After ``step`` of ``steps``: the smoothed loss and the seconds left at the present speed."""

    step: int
    steps: int
    loss: float
    seconds_left: float


Report = Callable[[Progress], None]


@contextmanager
def reporting(report: Report | None, steps: int, title: str) -> Iterator[Report]:
    """``report`` itself, or a bar when there is none and stderr is a terminal, or silence."""
    if report is not None or not sys.stderr.isatty():
        yield report or (lambda progress: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[left]} left"),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=steps, loss=0.0, left="?")

        def show(progress: Progress) -> None:
            minutes, seconds = divmod(round(progress.seconds_left), 60)
            bar.update(task, completed=progress.step, loss=progress.loss, left=f"{minutes}:{seconds:02d}")

        yield show
