"""What a training leaves for people to look at: curves and pictures for TensorBoard, previews as files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from training.config import ConceptConfig

Note = Callable[[str], None]


class Journal:
    """Writes down losses and previews. Whatever goes wrong here is noted once and never ends a run.

    Args:
        folder: for previews, ``<step>-<i>.png``.
        writer: TensorBoard's, or None.
        note: where notes go.
    """

    def __init__(self, folder: Path, writer: Any, note: Note) -> None:
        self.folder, self.writer, self.note = folder, writer, note
        self.broken = False

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step by name."""
        if self.writer is not None and not self.broken:
            with self._harmless():
                for name, value in values.items():
                    self.writer.add_scalar(name, value, step)

    def pictures(self, step: int, found: object) -> None:
        """Previews of one step: a sequence of PIL pictures; anything else is left alone."""
        if not isinstance(found, Sequence) or isinstance(found, str):
            return
        pictures = [picture for picture in found if hasattr(picture, "save")]
        if pictures:
            self.folder.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures):
            picture.save(self.folder / f"{step:06d}-{number}.png")
            if self.writer is not None and not self.broken:
                with self._harmless():
                    self.writer.add_image(f"preview/{number}", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Bring the log to the disk."""
        if self.writer is not None:
            with self._harmless():
                self.writer.close()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            if not self.broken:
                self.note(f"TensorBoard's log cannot be written ({error}): nothing more is logged")
            self.broken = True


@contextmanager
def journal(config: ConceptConfig, main: bool, note: Note) -> Iterator[Journal]:
    """The journal of a run; of several processes only the main one writes."""
    folder = config.output.with_suffix(".previews")
    if not (config.tensorboard and main):
        yield Journal(folder, None, note)
        return
    if find_spec("tensorboard") is None:
        note("tensorboard is not installed, so nothing is logged for it: pip install tensorboard")
        yield Journal(folder, None, note)
        return
    kept = Journal(folder, None, note)
    with kept._harmless():
        kept.writer = _writer(config.work)
    try:
        yield kept
    finally:
        kept.close()


def _writer(work: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    from training.state import find, step_of

    found = find(work)
    again = None if found is None else step_of(found) + 1  # what came after is logged once more
    return SummaryWriter(str(work / "tensorboard"), purge_step=again)
