"""Several independent LoRAs in one process: one subfolder each, the base loaded once, one failure stops nothing else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from studio.errors import CancelledError, FileError, RequestError, StudioError
from training.config import ALPHA, ConceptConfig, make_config
from training.config_file import read_options

if TYPE_CHECKING:
    from training.concept import Preview
    from training.progress import Report

log = logging.getLogger(__name__)

OWN = "train.yaml"
"""What a subfolder may hold: options of its own, which win over the shared ones."""
State = Literal["done", "skipped", "failed", "cancelled", "not started"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one of several trainings ended. ``loss`` is the last one's; ``error`` a sentence, "" when all is well; ``stopped``:
    the user wants no more of them."""

    name: str
    state: State
    path: Path | None = None
    steps: int = 0
    seconds: float = 0.0
    loss: float | None = None
    error: str = ""
    notes: tuple[str, ...] = ()
    stopped: bool = False


def configs_of(folder: Path, out: Path | None = None, **shared: Any) -> dict[str, ConceptConfig | StudioError]:
    """One configuration for every subfolder that is not hidden, or the reason there is none, in the order of their names.

    Args:
        folder: of subfolders with pictures. A subfolder's ``train.yaml`` holds options of its own.
        out: folder for the LoRAs, each called like its subfolder; None: ``folder`` itself.
        shared: options of all. Without a trigger each takes the name of its subfolder.

    Raises:
        FileError: no such folder. RequestError: no subfolders, or an option that cannot be shared.
    """
    if not folder.is_dir():
        raise FileError(f"the folder of several trainings '{folder}' does not exist: check the path")
    for key in ("data", "output"):
        if key in shared:
            raise RequestError(f"'{key}' cannot be the same for several trainings: it follows from the subfolder")
    if shared.get("masks") not in (None, ALPHA):
        raise RequestError(
            f"'masks' cannot be one folder for several trainings: set it in the {OWN} of each subfolder, or to {ALPHA}"
        )
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and _is_job(path))
    if not subfolders:
        raise RequestError(f"'{folder}' has no subfolders: put the pictures of each LoRA into one of its own")
    found: dict[str, ConceptConfig | StudioError] = {}
    for path in subfolders:
        values = {"trigger": path.name, **shared, "data": path, "output": (out or folder) / f"{path.name}.safetensors"}
        try:
            found[path.name] = _with_own(path / OWN, values)
        except StudioError as error:
            found[path.name] = error
    return found


def _is_job(path: Path) -> bool:
    """Not hidden, and not what a training left behind."""
    return not path.name.startswith(".") and path.suffix not in (".train", ".previews")


def _with_own(file: Path, values: Mapping[str, Any]) -> ConceptConfig:
    if not file.is_file():
        return make_config(**values)
    own = read_options(file)
    taken = [key for key in ("data", "output") if key in own]
    if taken:
        raise RequestError(f"'{file}' sets '{taken[0]}', which follows from its folder: leave it out")
    return make_config(**{**values, **own})


def train_many(
    configs: Mapping[str, ConceptConfig | StudioError],
    progress: Report | None = None,
    preview: Callable[[ConceptConfig], Preview] | None = None,
    told: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Train one after the other. A finished LoRA is skipped, an unfinished one resumed, a failure noted.

    Args:
        configs: by name, as :func:`configs_of` gives them.
        preview: makes the preview of a configuration.
        told: called with every outcome as it is known.

    Returns:
        One outcome for each, in the same order. After a cancellation the rest is "not started".
    """
    outcomes: dict[str, Outcome] = {}
    stopped = False
    for name, config in configs.items():
        if stopped:
            outcome = Outcome(name=name, state="not started")
        elif isinstance(config, StudioError):
            outcome = Outcome(name=name, state="failed", error=str(config))
        else:
            outcome = _train_one(name, config, progress, preview)
        stopped = stopped or outcome.stopped
        outcomes[name] = outcome
        if told is not None:
            told(outcome)
    return list(outcomes.values())


def _train_one(
    name: str, config: ConceptConfig, progress: Report | None, preview: Callable[[ConceptConfig], Preview] | None
) -> Outcome:
    from training.concept import train_concept

    started = time.monotonic()
    path = config.output
    try:
        result = train_concept(config, progress, preview(config) if preview is not None else None)
    except (CancelledError, KeyboardInterrupt) as error:
        seconds = time.monotonic() - started
        return Outcome(name=name, state="cancelled", error=str(error) or "cancelled", seconds=seconds, stopped=True)
    except StudioError as error:
        return Outcome(name=name, state="failed", error=str(error), seconds=time.monotonic() - started)
    except Exception as error:  # whatever goes wrong with one, the others go on
        log.exception("training '%s' failed", name)
        sentence = f"{type(error).__name__}: {error}"
        return Outcome(name=name, state="failed", error=sentence, seconds=time.monotonic() - started)
    if not result.losses:
        return Outcome(name=name, state="skipped", path=path)
    loss = result.losses[-1]
    return Outcome(
        name=name, state="done", path=path, steps=result.steps, seconds=result.seconds, loss=loss, notes=result.notes,
        stopped=result.stopped,
    )  # fmt: skip


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many ended in which way: ``3 done, 1 failed``."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome.state] = counts.get(outcome.state, 0) + 1
    return ", ".join(f"{count} {state}" for state, count in counts.items())
