"""Decides when a checkpoint is written, which weights are the best, and stops a saved training."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from core.child import Stopped
from core.specs import TrainingSpec
from core.training.checkpoints import Measured, ResumableTrainer
from core.training.monitor import Monitor, stops_saved


class SavingCallback(TrainerCallback):  # type: ignore[misc]
    """Has the trainer save by step, by time and before a stop after which the job goes on.

    A checkpoint is of a moment at which everything due at its step was done, an evaluation too,
    except before a stop: that waits for the batch in hand and for nothing else.

    Args:
        monitor: Asked whether to stop.
        spec: When to save, and whether to keep the best weights.
    """

    def __init__(self, monitor: Monitor, spec: TrainingSpec) -> None:
        self._monitor = monitor
        self._spec = spec
        self._saved_at = 0.0
        self._evaluated_at = 0.0
        self._saves_after_epoch = False
        self.trainer: ResumableTrainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; go on where an earlier attempt was."""
        self._saved_at = self._evaluated_at = time.monotonic()
        self.trainer.take_up()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remember where the step begins."""
        self.trainer.mark_begin()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop between the batches of an accumulated step, which is to be done again then."""
        if stops_saved(self._monitor):
            self.trainer.save_last_step()
            raise Stopped

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Have a checkpoint written if it is time."""
        self.trainer.mark_end()
        ends = control.should_training_stop
        ends_epoch = ends or float(state.epoch).is_integer()
        epoch_ends = args.eval_strategy == IntervalStrategy.EPOCH and ends_epoch
        if self._evaluation_is_due(args, ends):
            control.should_evaluate = True
        self.trainer.run.evaluation_due = bool(control.should_evaluate or epoch_ends)
        if stops_saved(self._monitor):
            control.should_evaluate = False
            control.should_save = True
        elif not ends and self._is_due(state.global_step, ends_epoch):
            # Trainer saves now, before the evaluation that an epoch ends with.
            self._saves_after_epoch = epoch_ends
            control.should_save = not epoch_ends

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Have the checkpoint written that waited for the evaluation."""
        if self._saves_after_epoch:
            self._saves_after_epoch = False
            control.should_save = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop between the batches of an evaluation, which is to be done again then."""
        if stops_saved(self._monitor):
            if self.trainer.is_in_train:
                self.trainer.save_now()
            raise Stopped

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any
    ) -> None:
        """Remember the loss, and the weights if they are the best so far."""
        run = self.trainer.run
        self._evaluated_at = time.monotonic()
        run.evaluation_due = False
        run.last_evaluation = measured = Measured(step=state.global_step, loss=metrics["eval_loss"])
        if (
            self._spec.load_best_model_at_end
            and math.isfinite(measured.loss)
            and (run.best is None or measured.loss < run.best.loss)
        ):
            self.trainer.keep_best(measured)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop, if the checkpoint was written for that."""
        self._saved_at = time.monotonic()
        if stops_saved(self._monitor):
            raise Stopped

    def _evaluation_is_due(self, args: Any, ends: bool) -> bool:
        """Tell whether to evaluate although Trainer does not: by time, and at the very end."""
        if args.eval_strategy != IntervalStrategy.STEPS:
            return False
        waited = time.monotonic() - self._evaluated_at
        return ends or (self._spec.eval_seconds is not None and waited >= self._spec.eval_seconds)

    def _is_due(self, step: int, ends_epoch: bool) -> bool:
        by_step = self._spec.save_steps is not None and step % self._spec.save_steps == 0
        by_epoch = self._spec.save_strategy == "epoch" and ends_epoch
        return by_step or by_epoch or time.monotonic() - self._saved_at >= self._spec.save_seconds
