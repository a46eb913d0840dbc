"""A progress bar for people: on standard error, only on a terminal, only for what takes longer than two seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE = 2.0


class Bar:
    """``with Bar("denoising", total) as bar: bar.reach(done)``.

    Args:
        shown: True or False decides; None asks whether standard error is a terminal.
    """

    def __init__(self, title: str, total: int, shown: bool | None = None) -> None:
        self.title, self.total = title, total
        self.done = 0.0
        self.wanted = sys.stderr.isatty() if shown is None else shown
        self.started = time.monotonic()
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> Self:
        self.started = time.monotonic()
        return self

    def reach(self, done: float) -> None:
        """So much of the total is done; the bar appears once the work has taken :data:`PATIENCE` seconds."""
        self.done = done
        if self.bar is None and self.wanted and time.monotonic() - self.started > PATIENCE:
            self._show()
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done)

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=self.total)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()
