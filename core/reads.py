"""What callers see of the stored objects, and the pages they come in."""

from __future__ import annotations

import base64
import binascii
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from core.data.report import DryRunReport
from core.errors import InvalidInput
from core.job_status import JobStatus
from core.specs import JobSpec

Item = TypeVar("Item")


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True)


class Page(_Read, Generic[Item]):
    """One page of a list; `next_cursor` is `None` on the last."""

    data: list[Item]
    next_cursor: str | None = None


class Progress(_Read):
    """How far a job is.

    Attributes:
        stage: What the pipeline does at present.
        step: Optimizer steps done.
        percent: From 0 to 100; `None` while the number of steps is unknown.
        eta_seconds: Estimate until the end of training; of a job that waits, the time until it
            starts included.
        queue_position: Jobs of any project that wait before this one by priority and age, counted
            up to 1000; turns between projects can change the order. Like the two below, only for
            a job read by itself.
        starts_in_seconds: Estimate until a worker takes it for training; `None` without history.
        waiting_reason: Why no worker takes it, if that is not just the queue.
        trained_tokens: Tokens the loss was computed on.
    """

    stage: str | None = None
    step: int = 0
    total_steps: int | None = None
    percent: float | None = None
    eta_seconds: float | None = None
    queue_position: int | None = None
    starts_in_seconds: float | None = None
    waiting_reason: str | None = None
    trained_tokens: int = 0


class VersionName(_Read):
    """Which adapter version a job published."""

    name: str
    version: int
    digest: str
    quarantine: str | None = Field(None, description="Why no alias may point at it.")


class JobRead(_Read):
    """A job as its owner sees it."""

    id: str
    status: JobStatus
    adapter: str
    base_model: str
    dataset: str
    spec: JobSpec
    priority: int
    attempt: int
    stop_requested: str | None = Field(
        description="`cancel` or `pause`, until the worker has stopped."
    )
    progress: Progress
    error: dict[str, Any] | None
    version: VersionName | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    metadata: dict[str, str]


class EventRead(_Read):
    """One entry of a job's history; `id` counts from 1 without gaps."""

    id: int
    attempt: int
    type: str
    data: dict[str, Any]
    created_at: datetime


class LogLine(_Read):
    """One line of a job's log."""

    id: int = Field(description="Grows from line to line; where the line ends, in bytes.")
    attempt: int
    created_at: datetime = Field(description="When the worker stored it.")
    text: str


class LogPage(Page[LogLine]):
    """Lines of a job's log, oldest first."""

    dropped_bytes: int = Field(description="How much of the log's beginning is kept no longer.")
    complete: bool = Field(description="The job has ended, and nothing comes behind these lines.")


class MetricRead(_Read):
    """Measurements of one logging step."""

    attempt: int
    step: int
    epoch: float | None
    loss: float | None
    eval_loss: float | None
    accuracy: float | None = Field(
        description="Share of the trained tokens that it chose right; of preference pairs, of those"
        " whose chosen answer it prefers more than the reference does."
    )
    eval_accuracy: float | None
    margin: float | None = Field(description="By how much it does, in units of DPO's reward.")
    eval_margin: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens_per_second: float | None
    memory_bytes: int | None = Field(
        description="Peak of the tensors on a GPU; on a CPU what the trainer holds."
    )
    created_at: datetime


class CheckpointRead(_Read):
    """A state of training that a later attempt can go on from."""

    step: int = Field(description="The optimizer step after which it was made.")
    attempt: int
    bytes: int
    created_at: datetime
    usable: bool
    reason: str | None = Field(description="Why it cannot be used.")


class Estimate(_Read):
    """What a training would take, as far as it can be told beforehand."""

    device: str | None = Field(None, description="Of the spec, else of a live train worker.")
    seconds: float | None = Field(
        None, description="From the start of training to the published adapter, without waiting."
    )
    seconds_reason: str | None = Field(None, description="Why there is no such estimate.")
    tokens_per_second: float | None = Field(
        None, description="By the speed of the last jobs on this kind of device."
    )
    measured_jobs: int = Field(0, description="Jobs that the speed comes from, at most 5.")
    peak_memory_bytes: int | None = Field(
        None,
        description="Libraries, weights, trained parameters with their optimizer, and the "
        "activations of a batch of the longest rows. With less, the trainer halves the batch.",
    )
    memory_reason: str | None = Field(None, description="Why there is no such estimate.")


class DryRunRead(_Read):
    """A dry run and what it found."""

    id: str
    status: Literal["validating", "succeeded", "failed"] = Field(
        description="`succeeded` once there is a report, whatever it says."
    )
    valid: bool | None = Field(description="Whether a job would go on to training.")
    report: DryRunReport | None
    estimate: Estimate | None
    error: dict[str, Any] | None = Field(
        description="Why there is no report when it `failed`, such as `attempts_exhausted`."
    )
    created_at: datetime
    finished_at: datetime | None


class WorkerRead(_Read):
    """A worker process, what it has and what it works on."""

    id: str
    queue: str
    host: str
    pid: int
    job_id: str | None
    device: str | None = Field(description="`cpu`, `cuda` or `mps`.")
    memory_bytes: int = Field(description="Memory that it offers to jobs; 0 is not known.")
    warm_base: str | None = Field(description="The base model that its child has in memory.")
    absent_base_models: list[str] = Field(description="Base models whose files its machine lacks.")
    seconds_since_heartbeat: float


class QuotaRead(_Read):
    """How much a project may have of something, and has."""

    limit: int | None = Field(description="`null` is no limit.")
    used: int


class UsageRead(_Read):
    """What a project has used, jobs that were deleted since included."""

    ended_jobs: dict[str, int] = Field(
        description="Status → how often a job ended so; a job that is tried again ends again."
    )
    trained_tokens: int = Field(description="Tokens that the loss of ended jobs was computed on.")
    used_seconds: float = Field(description="Time of training of ended jobs.")
    quotas: dict[str, QuotaRead]


class ProjectRead(_Read):
    """A project as the operator sees it; `own` names the quotas that differ from the default."""

    name: str
    quotas: dict[str, int | None]
    own: list[str]
    created_at: datetime


class DatasetRead(_Read):
    """An uploaded data set."""

    id: str
    filename: str
    format: str
    rows: int
    bytes: int
    sha256: str
    report: dict[str, Any]
    created_at: datetime


class AdapterRead(_Read):
    """An adapter's name with what it points at.

    Attributes:
        aliases: Alias → version number.
        pinned: The aliases whose versions engines keep in memory.
        latest: The version that a bare name means; `None` when none was promoted.
        versions: How many versions exist.
    """

    name: str
    base_model: str | None
    latest: int | None
    aliases: dict[str, int]
    pinned: list[str]
    versions: int
    created_at: datetime


class VersionRead(_Read):
    """One immutable build of an adapter."""

    adapter: str
    version: int
    digest: str
    bytes: int
    base_model: str
    base_digest: str
    origin: str
    job_id: str | None
    aliases: list[str]
    quarantine: str | None = Field(description="Why no alias may point at it.")
    manifest: dict[str, Any]
    provenance: dict[str, Any]
    created_at: datetime


class ExportRead(_Read):
    """A whole model made of an adapter version; its file can be downloaded once it succeeded."""

    id: str
    adapter: str
    version: int
    format: Literal["merged", "gguf"]
    dtype: Literal["fp32", "fp16", "bf16", "q8_0"]
    status: Literal["queued", "running", "succeeded", "failed"]
    attempt: int
    bytes: int | None
    sha256: str | None
    error: dict[str, Any] | None
    created_at: datetime
    finished_at: datetime | None


class BaseModelRead(_Read):
    """A base model that the service may train and serve."""

    name: str
    digest: str
    source: str = Field(description="`hf:ID@REVISION`, `gguf` or `local`.")
    architecture: str
    parameters: int
    context_length: int
    dtype: str
    chat_template: bool
    bytes: int
    created_at: datetime


class ApiKeyRead(_Read):
    """An API key without its secret."""

    id: str
    project: str
    name: str
    scopes: list[str]
    created_at: datetime
    revoked_at: datetime | None


def encode_cursor(position: str) -> str:
    """Return the opaque form of a list position."""
    return base64.urlsafe_b64encode(position.encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> str:
    """Return the position that `encode_cursor` made opaque.

    Raises:
        InvalidInput: Code `invalid_cursor`.
    """
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        position = raw.decode("ascii")
    except (binascii.Error, ValueError) as error:
        raise invalid_cursor() from error
    if not position.isprintable():
        raise invalid_cursor()
    return position


def invalid_cursor() -> InvalidInput:
    """Return the error for a cursor that no list gave out."""
    return InvalidInput(
        "the cursor is not one that a list answered with",
        code="invalid_cursor",
        field="cursor",
        hint="Take next_cursor of the page before, or leave it out to start at the newest.",
    )
