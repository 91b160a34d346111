"""The pipeline: from a data set and a base model to a published-ready adapter directory.

    ingest → render and mask → split → load base → attach LoRA → train → select best
    → evaluate before/after → package → gate

`run_training` reads as that list. Training itself is TRL's.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from accelerate.state import GradientState
from transformers import set_seed

from core import failpoints
from core.artifacts import sha256_file
from core.causal_lm import linear_modules
from core.data.dry_run import (
    RenderedDataset,
    RenderedRow,
    check_row_count,
    render_dataset,
    row_limit,
)
from core.data.split import split_rows
from core.data.tokenizer import TokenizerCache, read_context_length
from core.training.base_model import WarmBase
from core.training.callback import MonitorCallback
from core.training.checkpoints import Measured
from core.training.device import select_device, select_dtype, set_threads
from core.training.evaluation import answer_samples
from core.training.lora import attach_lora
from core.training.memory_ladder import BatchPlan, plan_batches
from core.training.monitor import Monitor, start_stage
from core.training.packaging import measure_effect, package_adapter
from core.training.saving import SavingCallback
from core.training.task import TrainTask
from core.training.trainer import AdapterTrainer, build_trainer

_SAMPLES_AT_ONCE = 8
_RECORDED_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "tunesmith")


class Pipeline:
    """Runs jobs one after another, with the base model and its tokenizer kept warm.

    A job leaves nothing behind that the next one could notice.
    """

    def __init__(self) -> None:
        self._bases = WarmBase()
        self._tokenizers = TokenizerCache()

    def run(self, task: TrainTask, monitor: Monitor) -> dict[str, Any]:
        """Train one job.

        Returns:
            `artifact_dir` (a complete artifact with its manifest, in the task's work directory),
            `report` and `provenance`.

        Raises:
            InvalidInput: The data set or the spec cannot be trained.
            TrainingFailed: Training gave no usable adapter.
            Stopped: The monitor asked for it. What was learnt is in the last checkpoint that was
                sent, if it stops for a while only.
        """
        try:
            return self._run(task, monitor)
        except BaseException as error:
            # The frames that it went through hold the model, the gradients and the activations.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            # Trainer and model refer to each other; the next job needs the memory.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _run(self, task: TrainTask, monitor: Monitor) -> dict[str, Any]:
        started = time.monotonic()
        spec = task.spec
        device = select_device(task.device)
        dtype = select_dtype(spec.training.dtype, device)
        threads = set_threads(task.threads)
        tokenizer = self._tokenizers.get(task.base.digest, task.base.path)

        start_stage(monitor, "render")
        data = _render(task, tokenizer, monitor)
        training, validation = _split(task, data)

        start_stage(monitor, "load")
        failpoints.reached("base.load", job_id=task.job_id, attempt=task.attempt)
        model = self._bases.borrow(task.base, dtype, device)
        modules = linear_modules(model)
        _seed(spec.training.seed)
        model = attach_lora(model, spec.lora, modules, task.base.name)

        start_stage(monitor, "train")
        plan = _plan_batches(task, monitor)
        reporting = MonitorCallback(monitor, job_id=task.job_id, attempt=task.attempt)
        saving = SavingCallback(monitor, spec.training)
        trainer = reporting.trainer = saving.trainer = build_trainer(
            model,
            tokenizer,
            spec,
            [row.rendered for row in training],
            [row.rendered for row in validation],
            plan=plan,
            work_dir=task.work_dir,
            device=device,
            dtype=dtype,
            monitor=monitor,
            callbacks=[reporting, saving],
            started=started,
        )
        trainer.train_from(task.resume_dir)
        _report_early_stop(trainer, monitor)
        best = _select_best(trainer, monitor) if spec.training.load_best_model_at_end else None

        with trainer.kept_on_stop():
            start_stage(monitor, "evaluate")
            model.eval()
            report = _evaluate(trainer, best, tokenizer, task, training, validation, monitor)

            start_stage(monitor, "package")
            directory = task.work_dir / "artifact"
            manifest = package_adapter(model, tokenizer, task.base, modules, directory)

            start_stage(monitor, "gate")
            effect = measure_effect(model, manifest.golden_token_ids)

        trainable, total = model.get_nb_trainable_parameters()
        provenance = {
            "dataset_sha256": sha256_file(task.data_path),
            "base_model": task.base.name,
            "base_digest": task.base.digest,
            "seconds": round(trainer.count_seconds(), 3),
            "steps": trainer.state.global_step,
            "best_step": best.step if best else None,
            "resumed_from_steps": trainer.run.resumed_from,
            "tokens": trainer.run.seen_tokens,
            "final_loss": trainer.run.last_loss,
            "golden_logit_change": effect,
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": threads,
            "seed": spec.training.seed,
            "versions": _versions(),
        }
        report |= {
            "train_loss": trainer.run.last_loss,
            "training_rows": len(training),
            "validation_rows": len(validation),
            "trainable_parameters": trainable,
            "total_parameters": total,
        }
        return {"artifact_dir": str(directory), "report": report, "provenance": provenance}


def _render(task: TrainTask, tokenizer: Any, monitor: Monitor) -> RenderedDataset:
    data = render_dataset(
        task.data_path,
        task.data_format,
        tokenizer,
        max_length=row_limit(task.spec, read_context_length(task.base.path)),
        spec=task.spec.data,
        check_stop=monitor.check_stop,
    )
    check_row_count(task.spec, len(data.rows))
    return data


def _split(task: TrainTask, data: RenderedDataset) -> tuple[list[RenderedRow], list[RenderedRow]]:
    training, validation = split_rows(len(data.rows), task.spec.data, task.spec.training.seed)
    return [data.rows[index] for index in training], [data.rows[index] for index in validation]


def _seed(seed: int) -> None:
    """Give the job the random numbers and the accelerator state of a fresh process."""
    # A job that ended by an exception leaves its data loader registered there.
    GradientState._reset_state()
    set_seed(seed)


def _plan_batches(task: TrainTask, monitor: Monitor) -> BatchPlan:
    plan = plan_batches(task.spec.training, task.memory_rung)
    if task.memory_rung:
        data = {"rung": task.memory_rung, **plan.as_dict()}
        monitor.send("log", type="memory_rung", data=data)
    return plan


def _report_early_stop(trainer: AdapterTrainer, monitor: Monitor) -> None:
    state = trainer.state
    if state.global_step < state.max_steps:
        data = {"step": state.global_step, "total_steps": state.max_steps}
        monitor.send("log", type="early_stopped", data=data)


def _select_best(trainer: AdapterTrainer, monitor: Monitor) -> Measured | None:
    best = trainer.use_best()
    if best is not None:
        data = {"step": best.step, "eval_loss": best.loss}
        monitor.send("log", type="best_selected", data=data)
    return best


def _evaluate(
    trainer: AdapterTrainer,
    best: Measured | None,
    tokenizer: Any,
    task: TrainTask,
    training: Sequence[RenderedRow],
    validation: Sequence[RenderedRow],
    monitor: Monitor,
) -> dict[str, Any]:
    losses: dict[str, float | None] = {"eval_loss": None, "base_eval_loss": None}
    if validation:
        known = best or trainer.run.last_evaluation
        step = best.step if best else trainer.state.global_step
        if known is not None and known.step == step:
            loss = known.loss
        else:
            loss = trainer.mean_loss(trainer.eval_dataset)
        losses["eval_loss"] = loss
        with trainer.model.disable_adapter():
            losses["base_eval_loss"] = trainer.mean_loss(trainer.eval_dataset)
    samples = answer_samples(
        trainer.model,
        tokenizer,
        [row.example for row in validation or training],
        task.spec.evaluation,
        monitor,
        batch_rows=max(1, _SAMPLES_AT_ONCE >> task.memory_rung),
    )
    return {"samples": samples, **losses}


def _versions() -> dict[str, str]:
    versions = {}
    for name in _RECORDED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
