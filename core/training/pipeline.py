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
from core.data.dry_run import render_dataset
from core.data.rendered import RenderedDataset, RenderedRow
from core.data.tokenizer import TokenizerCache, read_context_length
from core.logging import get_logger
from core.training.base_model import WarmBase
from core.training.before_after import build_report
from core.training.callback import MonitorCallback
from core.training.checkpoints import Measured, ResumableTrainer
from core.training.device import select_device, select_dtype, set_threads
from core.training.lora import attach_lora, begin_from
from core.training.memory_ladder import BatchPlan, plan_batches
from core.training.methods import build_trainer, loss_measure, report_validation
from core.training.monitor import Monitor, start_stage
from core.training.pace import StepClock
from core.training.packaging import measure_effect, package_adapter
from core.training.saving import SavingCallback
from core.training.task import TrainTask
from core.training.trackers import TrackingCallback

_RECORDED_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "tunesmith")

log = get_logger(__name__)


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
        dtype = select_dtype(spec, device)
        threads = set_threads(task.threads)
        tokenizer = self._tokenizers.get(task.base.digest, task.base.path)

        start_stage(monitor, "render")
        data = _render(task, tokenizer, monitor)
        training, validation = data.divide(spec)

        start_stage(monitor, "load")
        failpoints.reached("base.load", job_id=task.job_id, attempt=task.attempt)
        model = self._bases.borrow(task.base, dtype, device, in_4bit=spec.training.load_in_4bit)
        modules = linear_modules(model)
        _seed(spec.training.seed)
        model = attach_lora(model, spec.lora, modules, task.base.name)
        if task.continue_dir is not None:
            begin_from(model, task.continue_dir)

        start_stage(monitor, "train")
        plan = _plan_batches(task, monitor)
        log.info(
            "training_planned",
            rows=len(training),
            validation_rows=len(validation),
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            threads=threads,
            **plan.as_dict(),
        )
        reporting = MonitorCallback(monitor, job_id=task.job_id, attempt=task.attempt)
        saving = SavingCallback(monitor, spec.training)
        clock = StepClock(started)
        tracking = TrackingCallback(task, monitor)
        trainer = reporting.trainer = saving.trainer = clock.trainer = build_trainer(
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
            callbacks=[reporting, saving, clock, tracking],
            started=started,
        )
        with tracking:
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
            **_describe_sources(task),
            "base_model": task.base.name,
            "base_digest": task.base.digest,
            "seconds": round(trainer.count_seconds(), 3),
            "steps": trainer.state.global_step,
            "best_step": best.step if best else None,
            "resumed_from_steps": trainer.run.resumed_from,
            "tokens": trainer.run.seen_tokens,
            "pace": clock.describe(
                spec,
                modules,
                [row.rendered for row in training],
                [row.rendered for row in validation],
            ),
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
        task.spec,
        task.sources,
        tokenizer,
        context_length=read_context_length(task.base.path),
        check_stop=monitor.check_stop,
    )
    for note in data.notes:
        monitor.send("log", type=note.code, data={"message": note.message})
    return data


def _describe_sources(task: TrainTask) -> dict[str, Any]:
    """Return the members of the provenance that tell where the rows came from."""
    described = [
        {
            "dataset": source.name,
            "sha256": sha256_file(source.path),
            "role": source.role,
            "weight": source.weight,
        }
        for source in task.sources
    ]
    sha256 = {"dataset_sha256": described[0]["sha256"]}
    return sha256 | ({"sources": described} if len(described) > 1 else {})


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


def _report_early_stop(trainer: ResumableTrainer, monitor: Monitor) -> None:
    state = trainer.state
    if state.global_step < state.max_steps:
        data = {"step": state.global_step, "total_steps": state.max_steps}
        monitor.send("log", type="early_stopped", data=data)


def _select_best(trainer: ResumableTrainer, monitor: Monitor) -> Measured | None:
    best = trainer.use_best()
    if best is not None:
        data = {"step": best.step, "eval_loss": best.loss}
        monitor.send("log", type="best_selected", data=data)
    return best


def _evaluate(
    trainer: ResumableTrainer,
    best: Measured | None,
    tokenizer: Any,
    task: TrainTask,
    training: Sequence[RenderedRow],
    validation: Sequence[RenderedRow],
    monitor: Monitor,
) -> dict[str, Any]:
    batch_rows = trainer.args.per_device_eval_batch_size
    rows = [row.rendered for row in validation]
    report = build_report(
        trainer.model,
        tokenizer,
        task.spec,
        [row.example for row in validation or training],
        monitor,
        measure=loss_measure(trainer, rows, monitor, batch_rows=batch_rows),
        context_length=read_context_length(task.base.path),
        batch_rows=batch_rows,
        memory_rung=task.memory_rung,
    )
    known = best or trainer.run.last_evaluation
    step = best.step if best else trainer.state.global_step
    if known is not None and known.step == step:
        # What the job's metrics say, to the last digit.
        report["eval_loss"] = known.loss
    if validation:
        seed = task.spec.training.seed
        report |= report_validation(trainer, report["verdict"], seed=seed) or {}
    return report


def _versions() -> dict[str, str]:
    versions = {}
    for name in _RECORDED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
