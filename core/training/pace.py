"""How fast a job was trained, for estimates of the next one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from core import costs
from core.data.pairs import PreferencePair
from core.data.rendering import TrainingRow
from core.specs import JobSpec
from core.training.checkpoints import ResumableTrainer
from core.training.lora import auto_targets


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Adds up the seconds of an attempt's optimizer steps, without evaluations and checkpoints.

    Args:
        started: Time of the monotonic clock at which the attempt began.
    """

    def __init__(self, started: float) -> None:
        self._started = started
        self._begun = 0.0
        self._seconds = 0.0
        self._steps = 0
        self._tokens_before = 0
        self.trainer: ResumableTrainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remember what earlier attempts have done."""
        self._tokens_before = self.trainer.run.seen_tokens

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._begun = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop it."""
        self._seconds += time.monotonic() - self._begun
        self._steps += 1

    def describe(
        self,
        spec: JobSpec,
        modules: Mapping[str, list[int]],
        training: Sequence[TrainingRow | PreferencePair],
        validation: Sequence[TrainingRow | PreferencePair],
    ) -> dict[str, float]:
        """Return what this attempt computed and how long that took, as `core.costs` counts it."""
        trainer = self.trainer
        spec = costs.with_recomputing(spec, bool(trainer.args.activation_checkpointing))
        description = {
            "linear_modules": modules,
            "auto_target_modules": auto_targets(trainer.model.config.model_type, modules),
            "vocab_size": trainer.model.get_input_embeddings().num_embeddings,
        }
        shape = costs.shape_of(spec, description)
        passes = self._steps * trainer.args.gradient_accumulation_steps
        tokens = trainer.run.seen_tokens - self._tokens_before
        return {
            "training_seconds": self._seconds,
            "training_operations": costs.training_operations(
                spec, shape, _count(training), tokens=tokens, passes=passes
            ),
            "other_seconds": time.monotonic() - self._started - self._seconds,
            "evaluation_operations": costs.evaluation_operations(
                spec,
                shape,
                _count(validation),
                costs.count_evaluations(spec, self._steps),
                training=_count(training),
            ),
        }


def _count(rows: Sequence[TrainingRow | PreferencePair]) -> costs.Rows:
    return costs.Rows(
        rows=len(rows),
        tokens=sum(row.tokens for row in rows),
        trained_tokens=sum(row.trained_tokens for row in rows),
    )
