"""Teach a base a concept or style from a few pictures: one LoRA file, made on accelerate and PEFT.

Every batch is a pure function of the seed and its number (see ``training.batches``), so a run killed at any moment and
started again ends with the same bits as one that was never stopped, and ``accelerate launch`` on n processes sees the data
of n-fold accumulation.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.errors import CancelledError, FileError, NumericsError, OutOfMemoryError, StudioError
from training.accelerators import accelerator_for, out_of_memory, smaller
from training.config import ConceptConfig
from training.finished import finished, nothing_to_do
from training.interrupt import Stop, interruptible
from training.journal import journal
from training.plan import Plan, prepare
from training.progress import Progress, Report, reporting

if TYPE_CHECKING:
    from accelerate import Accelerator

    from studio.base import Base
    from studio.lora.model import Lora
    from studio.lora.write import Layout
    from training.batches import Source

log = logging.getLogger(__name__)

Preview = Callable[[int, "Lora"], Any]
"""Called with the step and the LoRA so far, while the base is free of training layers; returned pictures are kept as files,
and go to TensorBoard. ``pipelines.preview.previewer`` makes one that draws as ``generate`` does."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """``path`` of the LoRA; ``losses`` one per step, of all sittings; ``seconds`` of training; ``notes`` for the user.

    A LoRA that was there already, trained with the same values, has its ``steps``, no ``losses`` and a note. ``stopped``:
    Ctrl-C was pressed, but in the last step, so that nothing was left to stop.
    """

    path: Path
    steps: int
    seconds: float
    losses: tuple[float, ...]
    notes: tuple[str, ...]
    stopped: bool = False


def train_concept(
    config: ConceptConfig, progress: Report | None = None, preview: Preview | None = None, *, base: Base | None = None
) -> TrainResult:
    """Train a LoRA and write it to ``config.output``. A run found unfinished there is resumed, one found finished is left as
    it is, unless ``config.restart`` is set. Ctrl-C ends the run after the step it falls into; a second one at once.

    Args:
        progress: called after every step; None draws a bar on a terminal. It may raise ``CancelledError`` to stop resumably.
        preview: see :data:`Preview`; called every ``preview_every`` steps and at the end, after saving. Its failures are
            only noted.
        base: a loaded base to use instead of ``config.base``.

    Raises:
        StudioError: one sentence; bad input, and another file at the output, are found before any training.
        CancelledError: stopped by the user, resumably: after saving a checkpoint, or inside a step, from the last one.
    """
    with accelerator_for(config) as accelerator:
        plan = prepare(config, base, accelerator.device, accelerator.num_processes)
        if finished(plan):
            return TrainResult(path=config.output, steps=plan.steps, seconds=0.0, losses=(), notes=(nothing_to_do(plan),))
        try:
            return _Run(plan, accelerator, preview).train(progress)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise OutOfMemoryError(smaller(config)) from None


@dataclass(eq=False)
class _Run:
    """One training in progress. ``whole`` unless a step is under way, when weights and step number may not belong together."""

    plan: Plan
    accelerator: Accelerator
    preview: Preview | None
    step: int = 0
    whole: bool = True
    stopped: bool = False
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    adapters: Any = None
    optimizer: Any = None
    journal: Any = None

    @property
    def config(self) -> ConceptConfig:
        return self.plan.config

    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def train(self, report: Report | None) -> TrainResult:
        from training.adapters import attached, checkpointing

        for note in self.plan.notes:
            self._note(note, logging.INFO)
        if self.config.restart and self.main:
            shutil.rmtree(self.config.work, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with (
            attached(self.plan.base, self.config) as adapters,
            checkpointing(self.plan.base, self.config),
            journal(self.config, self.main, self._note) as self.journal,
        ):
            self.adapters = adapters
            self._set_up()
            with reporting(report if self.main else _silent, self.plan.steps, self.config.output.stem) as show:
                self._loop(show)
            if self.main:
                self._finish()
        return TrainResult(
            path=self.config.output,
            steps=self.step,
            seconds=self.seconds,
            losses=tuple(self.losses),
            notes=tuple(self.notes),
            stopped=self.stopped,
        )

    def _set_up(self) -> None:
        from training.batches import PRIOR, Captions, Source
        from training.objective import Objective
        from training.optim import make_optimizer
        from training.state import find, load

        plan, config = self.plan, self.config
        self.captions = Captions(plan.base, config.cache_text, config.clip_skip, plan.chunks)
        self.source = Source(
            plan.base,
            plan.pictures,
            plan.captions,
            self.captions,
            sizes=plan.sizes,
            batch=config.batch,
            seed=config.seed,
            flip=config.flip,
            dropout=config.caption_dropout,
            noise_offset=config.noise_offset,
            levels=plan.levels,
            unmasked=config.unmasked_weight,
            kept_clauses=config.keep_tokens if config.shuffle_caption else None,
            keep=config.cache_latents,
        )
        self.prior: Source | None = None
        if config.prior == "images":
            self.prior = Source(
                plan.base,
                plan.prior_pictures,
                plan.prior_captions,
                self.captions,
                sizes=plan.sizes,
                batch=config.prior_rows,
                seed=config.seed,
                kind=PRIOR,
                levels=plan.levels,
                keep=config.cache_latents,
            )
        self.prompts = [self.captions.number(text) for text in plan.prior_captions] if config.prior == "consistency" else []
        self.lasting = len(self.captions.texts)
        if config.train_text == "none" or self.prompts:
            self.captions.warm()  # before autocast, whatever the precision
        device = self.accelerator.device
        objective = Objective(plan.base, self.adapters, self.captions, config, device)
        optimizer = make_optimizer(config, self.adapters.groups(config))
        found = find(config.work)
        if found:
            state = load(found, self._identity())
            self.adapters.load(state.weights)
            optimizer.load_state_dict(dict(state.optimizer))
            if self.accelerator.scaler is not None and state.scaler:
                self.accelerator.scaler.load_state_dict(dict(state.scaler))
            self.step, self.losses, self.seconds = state.step, list(state.losses), state.seconds
            self._note(f"resumed at step {self.step}", logging.INFO)
        elif plan.start.weights:
            self.adapters.load(plan.start.weights)
        objective.train()
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)

    def _loop(self, show: Report) -> None:
        started, before, first = time.monotonic(), self.seconds, self.step
        smooth: float | None = None
        with interruptible() as stop:
            try:
                while self.step < self.plan.steps:
                    self._stop_if_asked(stop)
                    self.whole = False
                    losses = self._one_step()
                    loss = losses["loss"]
                    self.step += 1
                    self.losses.append(loss)
                    self.seconds = before + time.monotonic() - started
                    self.whole = True
                    smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
                    left = (self.plan.steps - self.step) * (self.seconds - before) / (self.step - first)
                    self._after_step(losses)
                    show(Progress(self.step, self.plan.steps, smooth, left))
                self.stopped = stop.asked
            except (KeyboardInterrupt, CancelledError):
                if self.main and self.whole:
                    self._checkpoint()
                raise CancelledError(f"stopped at step {self.step} of {self.plan.steps}: {self._again()}") from None

    def _stop_if_asked(self, stop: Stop) -> None:
        """All processes stop after the same step, though each hears of it at its own time."""
        import torch

        asked = torch.tensor(float(stop.asked), device=self.accelerator.device)
        if self.accelerator.reduce(asked, "sum").item():
            raise CancelledError("asked to stop")

    def _one_step(self) -> dict[str, float]:
        """One optimiser step; the denoising ``loss`` and the ``prior``'s over all its rows, of all processes."""
        import torch

        from training.optim import rate_share, set_rate

        config, accelerator = self.config, self.accelerator
        total = torch.zeros(2, device=accelerator.device)
        for part in range(config.accumulation):
            index = (self.step * config.accumulation + part) * accelerator.num_processes + accelerator.process_index
            last = part == config.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(self.objective):
                losses = self._losses(index)
                accelerator.backward(losses["loss"] / config.accumulation)
            parts = [losses[name].detach() for name in ("denoising", "prior") if name in losses]
            total[: len(parts)] += torch.stack(parts) / config.accumulation
        loss, prior = accelerator.reduce(total, "mean").tolist()
        self._check_finite("the loss", loss)
        self._check_finite("the prior's loss", prior)
        if config.clip:
            norm = accelerator.clip_grad_norm_(list(self.adapters.weights().values()), config.clip)
            if norm is not None and accelerator.scaler is None:  # a scaler leaves such a step out by itself
                self._check_finite("the norm of the gradients", float(norm))
        share = rate_share(self.step, self.plan.steps, config.warmup, config.schedule, config.cycles)
        set_rate(self.optimizer.optimizer, share)
        with self.adapters.held():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss} | ({"prior": prior} if config.prior != "none" else {})

    def _check_finite(self, what: str, value: float) -> None:
        """Before the weights follow ``value``, which would spoil them and the checkpoints to come."""
        config = self.config
        if not math.isfinite(value):
            raise NumericsError(
                f"{what} became {value} at step {self.step + 1}: lower learning_rate (now {config.learning_rate:g})"
                + (", or use precision bf16" if config.precision == "fp16" else "")
            )

    def _losses(self, index: int) -> Any:
        import torch

        from training.batches import PRIOR, stream

        self.captions.forget(self.lasting)
        prompts: tuple[int, ...] = ()
        if self.prompts:
            rows = (self.config.prior_rows,)
            picks = torch.randint(len(self.prompts), rows, generator=stream(self.config.seed, PRIOR, index))
            prompts = tuple(self.prompts[pick] for pick in picks.tolist())
        return self.objective(self.source.batch(index), self.prior.batch(index) if self.prior else None, prompts)

    def _after_step(self, losses: dict[str, float]) -> None:
        """Save first, then sample: a preview can never cost the run."""
        from training.optim import rates

        if not self.main:
            return
        config, last = self.config, self.step == self.plan.steps
        self.journal.scalars(self.step, {**losses, **rates(self.optimizer.optimizer, self.adapters.labels(config))})
        if not last and config.checkpoint_every and self.step % config.checkpoint_every == 0:
            self._checkpoint()
        if not last and config.save_every and self.step % config.save_every == 0:
            self._save_between()
        if not last and config.preview_every and self.step % config.preview_every == 0:
            self._show_preview()

    def _save_between(self) -> None:
        from training.export import write

        config = self.config

        def named(step: int) -> Path:
            return config.output.with_name(f"{config.output.stem}-{step:06d}.safetensors")

        try:
            write(named(self.step), self._lora(), self._layout())
            if config.keep_last and (past := self.step - config.keep_last * config.save_every) > 0:
                named(past).unlink(missing_ok=True)
        except (FileError, OSError) as error:  # OSError: of deleting. The run goes on: only a file in between is missing
            self._note(str(error))

    def _again(self) -> str:
        """What a run that ends early has kept."""
        from training.state import find, step_of

        found = find(self.config.work)
        if found is None:
            return "nothing was kept"
        same = " without restart" if self.config.restart else ""
        return f"run it again{same} to go on from step {step_of(found)}"

    def _finish(self) -> None:
        from training.export import write

        try:
            write(self.config.output, self._lora(), self._layout())
        except FileError as error:
            self._checkpoint()
            raise FileError(f"{error}: make room, then {self._again()}") from None
        self._show_preview()
        curves = (self.config.work / "tensorboard").is_dir()
        for folder in self.config.work.glob("*checkpoint-*") if curves else (self.config.work,):
            shutil.rmtree(folder, ignore_errors=True)

    def _lora(self) -> Lora:
        from training.export import make_lora

        word = self.adapters.word
        return make_lora(self.plan, self.adapters.deltas(), self.step, word.learnt() if word else None)

    def _layout(self) -> Layout:
        from training.export import layout_of

        return layout_of(self.config.layout, self.plan.base.family.name)

    def _identity(self) -> dict[str, Any]:
        return self.plan.identity() | {"processes": self.accelerator.num_processes}

    def _checkpoint(self) -> bool:
        """Whether it could be written; a full disk must not end a run that may still finish."""
        from training.state import Checkpoint, save

        scaler = self.accelerator.scaler
        state = Checkpoint(
            self.step,
            self.adapters.weights(),
            self.optimizer.optimizer.state_dict(),
            tuple(self.losses),
            self.seconds,
            self._identity(),
            {} if scaler is None else scaler.state_dict(),
        )
        try:
            save(self.config.work, state)
        except FileError as error:
            self._note(f"{error}; the last good checkpoint is kept")
            return False
        return True

    def _show_preview(self) -> None:
        from training.state import random_state_kept

        if self.preview is None:
            return
        models = list(self.adapters.models.values())
        modes = [model.training for model in models]
        try:
            with random_state_kept(), self.adapters.absent():
                for model in models:
                    model.eval()
                pictures = self.preview(self.step, self._lora())
            self.journal.pictures(self.step, pictures)
        except Exception as error:  # whatever a preview does, the run goes on
            text = str(error) if isinstance(error, StudioError) else f"{type(error).__name__}: {error}"
            self._note(f"the preview at step {self.step} failed ({text})")
        finally:
            for model, training in zip(models, modes, strict=True):
                model.train(training)

    def _note(self, text: str, level: int = logging.WARNING) -> None:
        """Kept for the result, and said at once in the log, with the run's name as ``run``."""
        self.notes.append(text)
        if self.main:
            log.log(level, text, extra={"run": self.config.output.stem})


def _silent(progress: Progress) -> None:
    """Processes other than the first report nothing."""
