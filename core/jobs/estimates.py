"""How long a training would take and what memory it would need, told before it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from sqlalchemy.orm import Session

from core import costs
from core.data.report import DryRunReport
from core.db.models import BaseModel
from core.db.repositories.dry_runs import TrainedJob, list_trained
from core.db.repositories.workers import WorkerRepository
from core.jobs import requirements
from core.reads import Estimate
from core.specs import JobSpec

_MEASURED_JOBS = 5


def estimate_training(
    session: Session, spec: JobSpec, report: DryRunReport, base: BaseModel | None
) -> Estimate:
    """Return what a training would take.

    The seconds come from the speed of the last jobs on the kind of device, in operations: those on
    the same base model where there are any. The memory is that of one forward and backward pass
    over a batch of the longest rows.

    Args:
        session: Where.
        spec: What would be trained.
        report: Of the dry run.
        base: The base model.
    """
    device: str | None = spec.resources.device
    if device == "any":
        workers = WorkerRepository(session).list()
        device = next((worker.device for worker, _ in workers if worker.device), None)
    if report.tokens is None or base is None:
        reason = "no row is without error"
        return Estimate(device=device, seconds_reason=reason, memory_reason=reason)
    if device is None:
        reason = "no train worker has told which device it has"
        return Estimate(seconds_reason=reason, memory_reason=reason)
    parameters = base.description.get("parameters", 0)
    spec = costs.with_recomputing(spec, costs.recomputes(spec.training, device, parameters))
    peak_memory_bytes = requirements.peak_memory_bytes(
        spec,
        base.description,
        on_cuda=device == "cuda",
        tokens=spec.training.batch_size * report.tokens.max,
        trained_share=report.trained_tokens / report.tokens.total,
    )
    measured = _choose(list_trained(session, device), base.digest)
    if not measured:
        return Estimate(
            device=device,
            seconds_reason=f"no job has been trained on {device!r} lately",
            peak_memory_bytes=peak_memory_bytes,
        )
    shape = costs.shape_of(spec, base.description)
    rows = costs.Rows(report.rows, report.tokens.total, report.trained_tokens)
    training = costs.training_operations(
        spec, shape, rows, tokens=report.total_tokens, passes=count_passes(spec, report)
    )
    seconds = predict_seconds(measured, training, _evaluation(spec, shape, rows, report))
    return Estimate(
        device=device,
        seconds=round(seconds, 1),
        tokens_per_second=round(report.total_tokens * _speed(measured) / training, 1),
        measured_jobs=len(measured),
        peak_memory_bytes=peak_memory_bytes,
    )


def count_passes(spec: JobSpec, report: DryRunReport) -> int:
    """Return the forward passes of a training."""
    training = spec.training
    if training.max_steps is not None:
        return training.max_steps * training.gradient_accumulation_steps
    return math.ceil(report.training_rows / training.batch_size * training.epochs)


def predict_seconds(
    measured: Sequence[TrainedJob], training_operations: float, evaluation_operations: float
) -> float:
    """Return the seconds of a job from those of others.

    Args:
        measured: At least one.
        training_operations: Of the job.
        evaluation_operations: Of the job.
    """
    speed = _speed(measured)
    # Loading, packaging and whatever else does not depend on the rows.
    rest = fmean(
        max(0.0, job.other_seconds - job.evaluation_operations / speed) for job in measured
    )
    return (training_operations + evaluation_operations) / speed + rest


def _choose(trained: Sequence[TrainedJob], base_digest: str) -> Sequence[TrainedJob]:
    same = [job for job in trained if job.base_digest == base_digest]
    return (same or trained)[:_MEASURED_JOBS]


def _speed(measured: Sequence[TrainedJob]) -> float:
    """Return operations per second."""
    operations = sum(job.training_operations for job in measured)
    return operations / sum(job.training_seconds for job in measured)


def _evaluation(
    spec: JobSpec, shape: costs.ModelShape, rows: costs.Rows, report: DryRunReport
) -> float:
    share = report.validation_rows / max(1, report.rows)
    validation = costs.Rows(
        report.validation_rows, round(rows.tokens * share), round(rows.trained_tokens * share)
    )
    evaluations = costs.count_evaluations(spec, report.steps)
    return costs.evaluation_operations(spec, shape, validation, evaluations, training=rows)
