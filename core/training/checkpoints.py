"""Checkpoints: all that a later attempt, on whatever machine, needs to go on from a step exactly.

A checkpoint is what transformers' Trainer saves (optimizer, schedule, random numbers, its state),
the adapter's weights, what Trainer does not know of (`RunState`) and, where they are wanted, the
best weights so far. Nothing in it names a path, and nothing in it can run code when it is loaded.

Trainer itself goes on from it and skips the batches that were done. What is left to us: a training
that had ended already, and an evaluation that a stop had cut short.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import Trainer

from core import failpoints
from core.artifacts import WEIGHTS_FILE
from core.child import Stopped
from core.errors import TrainingFailed
from core.training.lora import load_weights, save_weights
from core.training.monitor import Monitor, stops_saved
from core.training.sampling import EpochBatches

_STATE_FILE = "run_state.json"
_BEST_FILE = "best.safetensors"


class Measured(BaseModel):
    """A loss on the validation rows, and the step after which it was measured."""

    step: int
    loss: float


class Tally(BaseModel):
    """How what was predicted since the last report of it was judged.

    Attributes:
        judged: Predictions that can be right or wrong, such as trained tokens or pairs.
        right: Of these.
        margin: Sum of the margins by which they are right; wrong ones count below zero.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")
    judged: int = 0
    right: int = 0
    margin: float | None = None

    def add(self, *, judged: int, right: int, margin: float | None = None) -> Tally:
        """Return the sum."""
        if margin is not None:
            margin += self.margin or 0.0
        return Tally(judged=self.judged + judged, right=self.right + right, margin=margin)

    def means(self) -> dict[str, float]:
        """Return `accuracy` and `margin`, as far as there are any."""
        if not self.judged:
            return {}
        means = {"accuracy": self.right / self.judged}
        if self.margin is not None:
            means["margin"] = self.margin / self.judged
        return means


class RunState(BaseModel):
    """What there is to a training besides the state of Trainer.

    Attributes:
        format: Of the checkpoint.
        step: Of the checkpoint.
        finished: Whether training has no more steps to do.
        evaluation_due: Whether an evaluation at this step is still to be done.
        seconds: Worked on the job until the checkpoint.
        seen_tokens: Tokens that went through the model, padding excluded.
        last_loss: The loss that was reported last.
        last_evaluation: The evaluation that was done last.
        best: The evaluation with the least loss.
        unlogged_loss: Sum of the losses of the steps after `logged_step`.
        logged_step: The last step whose loss was reported.
        tally: Of the steps after `logged_step`.
        resumed_from: The steps from which attempts went on, this one included.
    """

    model_config = ConfigDict(ser_json_inf_nan="constants")
    format: Literal[2] = 2
    step: int = 0
    finished: bool = False
    evaluation_due: bool = False
    seconds: float = 0.0
    seen_tokens: int = 0
    last_loss: float | None = None
    last_evaluation: Measured | None = None
    best: Measured | None = None
    unlogged_loss: float = 0.0
    logged_step: int = 0
    tally: Tally = Tally()
    resumed_from: list[int] = Field(default_factory=list)


@dataclass(frozen=True)
class _RandomState:
    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def now(cls) -> Self:
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


class ResumableTrainer(Trainer):  # type: ignore[misc]
    """Base class, before one of TRL's trainers, that writes our checkpoints and goes on from them.

    Args:
        monitor: Hears of each checkpoint.
        started: Time of the monotonic clock from which the work on the job counts.
        batches: The rows of each forward pass; by default Trainer chooses them.
        arguments: Those of TRL's trainer.
    """

    def __init__(
        self,
        *,
        monitor: Monitor,
        started: float,
        batches: EpochBatches | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.monitor = monitor
        self._batches = batches
        self.run = RunState()
        self.control: Any
        # Which moment the newest checkpoint is of; nothing is worth one before the first step.
        self._kept = self._moment(0, finished=False)
        # Random numbers at the end of the last step of this attempt.
        self._random_state: _RandomState | None = None
        # Tokens seen, tally and losses not logged at the beginning of this step.
        self._counts = (0, Tally(), torch.zeros(()))
        self._counted_at = started

    def train_from(self, resume_dir: Path | None) -> None:
        """Train to the end, from the beginning or from the checkpoint in a directory.

        Raises:
            TrainingFailed: Code `checkpoint_unreadable`, and whatever training raises.
        """
        if resume_dir is None:
            self.train()
            return
        try:
            self.run = RunState.model_validate_json((resume_dir / _STATE_FILE).read_bytes())
        except (OSError, ValidationError) as error:
            raise TrainingFailed(
                f"the checkpoint cannot be read: {error}",
                code="checkpoint_unreadable",
                hint="Another version of the software has written it; submit the job again.",
            ) from error
        self.run.resumed_from.append(self.run.step)
        self._kept = self._moment(self.run.step, self.run.finished)
        if (resume_dir / _BEST_FILE).is_file():
            self._best_path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(resume_dir / _BEST_FILE, self._best_path)
        self.train(resume_from_checkpoint=str(resume_dir))

    def take_up(self) -> None:
        """Do what Trainer's own way of resuming leaves out; called when training begins."""
        if not self.run.resumed_from:
            return
        self._tr_loss += self.run.unlogged_loss
        self._globalstep_last_logged = self.run.logged_step
        if self.run.finished:
            self.control.should_training_stop = True
        if self.run.evaluation_due:
            self._determine_best_metric(self.evaluate(), trial=None)

    def keep_best(self, measured: Measured) -> None:
        """Keep the weights of this moment as the best so far."""
        self.run.best = measured
        aside = self._best_path.with_suffix(".new")
        aside.parent.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, aside)
        os.replace(aside, self._best_path)

    def use_best(self) -> Measured | None:
        """Give the model its best weights back; `None` when no evaluation gave a number."""
        best = self.run.best
        if best is not None and best.step != self.state.global_step:
            load_weights(self.model, self._best_path)
        return best

    def save_now(self) -> None:
        """Write a checkpoint of this moment, unless the newest one is of it already."""
        if self._kept != self._moment(self.state.global_step, self._is_finished()):
            self._save_checkpoint(self.model, trial=None)

    def mark_begin(self) -> None:
        """Remember what the batches of the step that begins will add to."""
        self._counts = (self.run.seen_tokens, self.run.tally, self._tr_loss.clone())

    def mark_end(self) -> None:
        """Remember the random numbers that the next step begins with."""
        self._random_state = _RandomState.now()

    def save_last_step(self) -> None:
        """Write a checkpoint of the last step from amid the next one, which is given up.

        Weights and optimizer change at the end of a step only. Without a step of this attempt there
        is nothing to save.
        """
        if self._random_state is None:
            return
        self._random_state.restore()
        self.run.seen_tokens, self.run.tally, unlogged_loss = self._counts
        self._tr_loss.copy_(unlogged_loss)
        self.save_now()

    @contextlib.contextmanager
    def kept_on_stop(self) -> Iterator[None]:
        """Keep a finished training, when the block after it stops for a while."""
        try:
            yield
        except Stopped:
            if stops_saved(self.monitor):
                self.save_now()
            raise

    def count_seconds(self) -> float:
        """Return the seconds worked on the job, earlier attempts included."""
        now = time.monotonic()
        self.run.seconds += now - self._counted_at
        self._counted_at = now
        return self.run.seconds

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with what was judged since the last time."""
        if "loss" in logs:
            logs |= self.run.tally.means()
            self.run.tally = Tally()
        super().log(logs, start_time)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none; it is not for checkpoints."""

    @property
    def _best_path(self) -> Path:
        return Path(self.args.output_dir) / _BEST_FILE

    def _is_finished(self) -> bool:
        stopped_early = self.control.should_training_stop
        return bool(stopped_early or self.state.global_step >= self.state.max_steps)

    def _moment(self, step: int, finished: bool) -> tuple[int, bool, bool]:
        return step, finished, self.run.evaluation_due

    def get_train_dataloader(self) -> Any:
        """Return Trainer's loader, with our batches instead of its sampler."""
        if self._batches is None:
            return super().get_train_dataloader()
        return self.accelerator.prepare(
            DataLoader(
                self.train_dataset,
                batch_sampler=self._batches,
                collate_fn=self.data_collator,
                pin_memory=self.args.dataloader_pin_memory,
            )
        )

    def _run_epoch(self, **arguments: Any) -> None:
        # Trainer looks whether to stop after a step only.
        if not self.control.should_training_stop:
            if self._batches is not None:
                self._batches.set_epoch(arguments["epoch"])
            super()._run_epoch(**arguments)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Of each step, before the weights change; the one time that it waits for the device.
        norm = super()._get_grad_norm(model, grad_norm)
        loss = self._tr_loss
        values = [loss, torch.as_tensor(norm, device=loss.device), *self._pending()]
        loss_sum, norm_value, *numbers = torch.stack([value.float() for value in values]).tolist()
        if not math.isfinite(loss_sum):
            raise _not_finite("loss", self.state.global_step + 1)
        # A scaler of half-precision gradients leaves out such a step by itself.
        if not math.isfinite(norm_value) and self.accelerator.scaler is None:
            raise _not_finite("gradient", self.state.global_step + 1)
        self._settle(numbers)
        return norm

    def _pending(self) -> list[torch.Tensor]:
        """Return numbers of the step that are still on the device."""
        return []

    def _settle(self, numbers: list[float]) -> None:
        """Take the numbers of `_pending`, which came with the check of the step."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        directory = Path(self.args.output_dir) / f"checkpoint-{step}"
        self.run.step = step
        self.run.finished = self._is_finished()
        self.run.unlogged_loss = self._tr_loss.item()
        self.run.logged_step = self._globalstep_last_logged
        self.count_seconds()
        # It would grow with every step, and all of it was told to the monitor.
        self.state.log_history.clear()
        try:
            super()._save_checkpoint(model, trial)
            (directory / _STATE_FILE).write_text(self.run.model_dump_json())
            if self._best_path.is_file():
                shutil.copyfile(self._best_path, directory / _BEST_FILE)
        except (OSError, RuntimeError, SafetensorError) as error:
            # Such as a full disk. Only the way back to this step is lost.
            shutil.rmtree(directory, ignore_errors=True)
            self.monitor.send(
                "log", type="checkpoint_failed", data={"step": step, "reason": repr(error)}
            )
            return
        self._kept = self._moment(step, self.run.finished)
        # From here on the directory is the worker's.
        self.monitor.send("checkpoint", step=step, path=str(directory))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        failpoints.reached("checkpoint.write", step=self.state.global_step)
        super()._save_optimizer_and_scheduler(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Trainer would add the tokenizer, and its arguments as a pickle.
        assert output_dir is not None
        os.makedirs(output_dir, exist_ok=True)
        save_weights(self.model, Path(output_dir) / WEIGHTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Trainer would only log a warning about weights that are missing.
        load_weights(self.model, Path(resume_from_checkpoint) / WEIGHTS_FILE)


def _not_finite(what: Literal["loss", "gradient"], step: int) -> TrainingFailed:
    return TrainingFailed(
        f"the {what} is no longer a finite number at step {step}",
        code=f"{what}_not_finite",
        hint="Lower training.learning_rate, or lengthen training.warmup_ratio.",
    )
