"""What a dry run says of time and memory, beside what the trainer then took."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.report import Measurement
from core import costs
from core.data.dry_run import dry_run
from core.data.report import DryRunReport
from core.data.sources import DataSource
from core.data.tokenizer import load_tokenizer, read_context_length
from core.db.repositories.dry_runs import TrainedJob
from core.jobs import requirements
from core.jobs.estimates import count_passes, predict_seconds
from core.specs import JobSpec
from core.training.inspect_model import inspect_model
from worker.child import ChildProcess, Finished

ROWS = Path(__file__).parents[1] / "examples" / "support_desk" / "train.jsonl"
STEPS = 8
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Case:
    """One job.

    Attributes:
        name: Of the job.
        turns: Exchanges in a row, which make it longer.
        spec: Members of the JobSpec.
    """

    name: str
    turns: int
    spec: dict[str, Any]


def _case(name: str, turns: int, batch_size: int, accumulation: int, **spec: Any) -> Case:
    training = {
        "max_steps": STEPS,
        "batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
    } | spec.pop("training", {})
    return Case(name, turns, {"training": training, "evaluation": {"samples": 0}, **spec})


# The first is the job whose speed the others are told from.
_KNOWN = _case("2 x 2, medium rows", 2, 2, 2)
CASES = (
    _case("1 x 4, short rows", 1, 1, 4),
    _case("2 x 2, longer rows, rank 64", 4, 2, 2, lora={"r": 64}),
    _case(
        "4 x 1, long rows, attention only", 6, 4, 1, lora={"target_modules": ["q_proj", "v_proj"]}
    ),
)


def measure(model_dir: Path, rounds: int) -> list[Measurement]:
    """Run every case `rounds` times in a trainer of its own."""
    description = inspect_model(model_dir)
    tokenizer = load_tokenizer(model_dir)
    found: list[Measurement] = []
    with tempfile.TemporaryDirectory() as name:
        known = _run(_KNOWN, model_dir, Path(name))[0]
        for case in CASES:
            spec, report = _examine(case, model_dir, tokenizer, Path(name))
            seconds, bytes_ = _estimate(spec, report, description, known)
            runs = [_run(case, model_dir, Path(name)) for _ in range(rounds)]
            took = [job.training_seconds + job.other_seconds for job, _ in runs]
            peaks = [peak / 1024**2 for _, peak in runs]
            found += [
                Measurement(f"time, {case.name}", "s", [seconds], took, "measured"),
                Measurement(f"memory, {case.name}", "MiB", [bytes_ / 1024**2], peaks, "measured"),
            ]
    return found


def _estimate(
    spec: JobSpec, report: DryRunReport, description: dict[str, Any], known: TrainedJob
) -> tuple[float, int]:
    assert report.tokens is not None
    shape = costs.shape_of(spec, description)
    rows = costs.Rows(report.rows, report.tokens.total, report.trained_tokens)
    operations = costs.training_operations(
        spec, shape, rows, tokens=report.total_tokens, passes=count_passes(spec, report)
    )
    evaluation = costs.evaluation_operations(spec, shape, costs.Rows(0, 0, 0), 1)
    memory = requirements.peak_memory_bytes(
        spec,
        description,
        on_cuda=False,
        tokens=spec.training.batch_size * report.tokens.max,
        trained_share=report.trained_tokens / report.tokens.total,
    )
    return predict_seconds([known], operations, evaluation), memory


def _examine(
    case: Case, model_dir: Path, tokenizer: Any, directory: Path
) -> tuple[JobSpec, DryRunReport]:
    spec = JobSpec.model_validate({"base_model": "sample", "dataset": "rows", **case.spec})
    report = dry_run(
        spec,
        [DataSource(path=_write_rows(case.turns, directory))],
        tokenizer,
        context_length=read_context_length(model_dir),
    )
    return spec, report


def _run(case: Case, model_dir: Path, directory: Path) -> tuple[TrainedJob, int]:
    """Train in a fresh child; return its pace and its peak memory."""
    work_dir = Path(tempfile.mkdtemp(dir=directory))
    child = ChildProcess(
        [sys.executable, "-m", "core.training.process"], log_path=directory / "trainer.log"
    )
    task = {
        "job_id": "job-1",
        "attempt": 1,
        "spec": {"base_model": "sample", "dataset": "rows", **case.spec},
        "base": {"name": "sample", "digest": "0" * 64, "path": str(model_dir)},
        "sources": [{"path": str(_write_rows(case.turns, directory))}],
        "work_dir": str(work_dir),
        "device": "cpu",
    }
    try:
        child.ensure_running()
        assert child.pid is not None
        with _peak_memory(child.pid) as peak:
            outcome = child.run(
                task, on_event=lambda frame: None, stop_reason=lambda: None, grace_seconds=60
            )
        assert isinstance(outcome, Finished), outcome
        pace = outcome.result["provenance"]["pace"]
        return TrainedJob(base_digest="0" * 64, device="cpu", **pace), max(peak)
    finally:
        child.close()


@contextmanager
def _peak_memory(pid: int) -> Iterator[list[int]]:
    """Yield a list that gets the resident size of a process again and again."""
    sizes, done = [0], threading.Event()
    process = psutil.Process(pid)

    def watch() -> None:
        while not done.wait(_POLL_SECONDS):
            sizes.append(process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        done.set()
        thread.join()


def _write_rows(turns: int, directory: Path) -> Path:
    path = directory / f"rows-{turns}.jsonl"
    messages = [json.loads(line)["messages"] for line in ROWS.read_text().splitlines()]
    grouped = [
        {"messages": [turn for part in messages[start : start + turns] for turn in part]}
        for start in range(0, len(messages) - turns + 1, turns)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in grouped))
    return path
