"""Tells the monitor how training goes, and stops it on request."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from transformers import TrainerCallback

from core import failpoints
from core.training.checkpoints import ResumableTrainer
from core.training.memory_use import used_memory
from core.training.monitor import Monitor, check_stop_at_once

# The remaining time is judged by this many last steps.
_RATE_WINDOW = 30


class MonitorCallback(TrainerCallback):  # type: ignore[misc]
    """Sends progress each step and measurements each logging step; stops what need not be saved.

    Args:
        monitor: Hears the events.
        details: Name the attempt at fail points.
    """

    def __init__(self, monitor: Monitor, **details: Any) -> None:
        self._monitor = monitor
        self._details = details
        self._step_ends: deque[float] = deque(maxlen=_RATE_WINDOW + 1)
        self._logged_at = 0.0
        self._logged_tokens = 0
        self.trainer: ResumableTrainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clocks and report the number of steps."""
        now = time.monotonic()
        self._step_ends.append(now)
        self._logged_at = now
        self._logged_tokens = self.trainer.run.seen_tokens
        self._send_progress(state)
        self._monitor.check_stop()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop between the batches of an accumulated step, whose gradients are not needed."""
        check_stop_at_once(self._monitor)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report progress."""
        failpoints.reached("train.step", step=state.global_step, **self._details)
        self._step_ends.append(time.monotonic())
        if state.global_step >= state.max_steps:
            control.should_log = True
        self._send_progress(state)
        check_stop_at_once(self._monitor)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop between the batches of an evaluation."""
        check_stop_at_once(self._monitor)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Report measurements; values of one step may come in two events."""
        logs = logs or {}
        if "eval_loss" in logs:
            self._monitor.send(
                "metric",
                step=state.global_step,
                epoch=state.epoch,
                eval_loss=logs["eval_loss"],
                eval_accuracy=logs.get("eval_accuracy"),
                eval_margin=logs.get("eval_margin"),
            )
            # Evaluation is no training time.
            self._logged_at = time.monotonic()
        if "loss" not in logs:
            return
        now, tokens = time.monotonic(), self.trainer.run.seen_tokens
        seconds = now - self._logged_at
        rate = (tokens - self._logged_tokens) / seconds if seconds > 0 else None
        self._logged_at, self._logged_tokens = now, tokens
        self.trainer.run.last_loss = loss = float(logs["loss"])
        self._monitor.send(
            "metric",
            step=state.global_step,
            epoch=state.epoch,
            loss=loss,
            accuracy=logs.get("accuracy"),
            margin=logs.get("margin"),
            learning_rate=logs.get("learning_rate"),
            grad_norm=_as_float(logs.get("grad_norm")),
            tokens_per_second=rate,
            memory_bytes=used_memory(args.device),
        )

    def _send_progress(self, state: Any) -> None:
        intervals = len(self._step_ends) - 1
        remaining = state.max_steps - state.global_step
        eta_seconds = None
        if intervals > 0:
            eta_seconds = remaining * (self._step_ends[-1] - self._step_ends[0]) / intervals
        self._monitor.send(
            "progress",
            stage="train",
            step=state.global_step,
            total_steps=state.max_steps,
            eta_seconds=eta_seconds,
            trained_tokens=self.trainer.run.seen_tokens,
        )


def _as_float(value: Any) -> float | None:
    return None if value is None else float(value)
