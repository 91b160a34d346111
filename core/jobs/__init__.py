"""Jobs: the state machine of a fine-tuning run and everything that may happen to it.

The states and moves are in `core.job_status`.

`submission`, `control` and `views` serve the job's owner; `leases` and `sweep` serve workers, whose
every write names the attempt it belongs to. Knows no queue: whoever commits a submission sends the
wake-up. Knows no files but through the artifact store.
"""

from core.capabilities import Capabilities
from core.db.repositories.queue import Stage
from core.jobs.checkpoints import (
    CheckpointRef,
    add_checkpoint,
    begin_training,
    reject_checkpoint,
)
from core.jobs.control import cancel, delete, pause, resume, retry, set_priority
from core.jobs.dry_runs import get_dry_run, start_dry_run, validation_done, without_rows
from core.jobs.leases import (
    Claim,
    cancelled,
    claim,
    fail,
    heartbeat,
    record,
    release,
    succeed,
    validated,
)
from core.jobs.logs import read_log
from core.jobs.sources import FetchedRows, SourceRef, check_hub_reference
from core.jobs.submission import accept, submit
from core.jobs.sweep import (
    attempt_lost,
    forget_worker,
    held_attempts,
    list_workers,
    register_worker,
    sweep,
)
from core.jobs.updates import EventUpdate, MetricUpdate, ProgressUpdate, Update
from core.jobs.views import checkpoints, events, get, list_jobs, metrics, report
from core.reads import JobRead, Page

__all__ = [
    "Capabilities",
    "CheckpointRef",
    "Claim",
    "EventUpdate",
    "FetchedRows",
    "JobRead",
    "MetricUpdate",
    "Page",
    "ProgressUpdate",
    "SourceRef",
    "Stage",
    "Update",
    "accept",
    "add_checkpoint",
    "attempt_lost",
    "begin_training",
    "cancel",
    "cancelled",
    "check_hub_reference",
    "checkpoints",
    "claim",
    "delete",
    "events",
    "fail",
    "forget_worker",
    "get",
    "get_dry_run",
    "heartbeat",
    "held_attempts",
    "list_jobs",
    "list_workers",
    "metrics",
    "pause",
    "read_log",
    "record",
    "register_worker",
    "reject_checkpoint",
    "release",
    "report",
    "resume",
    "retry",
    "set_priority",
    "start_dry_run",
    "submit",
    "succeed",
    "sweep",
    "validated",
    "validation_done",
    "without_rows",
]
