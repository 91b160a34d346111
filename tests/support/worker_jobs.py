"""Jobs for a worker whose child is a small program of `tests.support.children`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import migrations
from core import jobs
from core.config import Settings
from core.db.models import BaseModel
from core.db.session import Database
from core.principal import LOCAL
from core.queue import JobQueue, QueueName
from core.reads import JobRead
from core.specs import JobSpec
from core.storage import LocalStore
from tests.support.children import MODULE, child_argv, environment
from tests.support.polling import wait_until
from worker.child import ChildProcess
from worker.runner import Runner, Stage
from worker.training import TrainStage
from worker.validation import ValidateStage

BASE_DIGEST = "b" * 64
ROWS = [{"prompt": f"question {number}", "completion": "answer"} for number in range(3)]


class JobBench:
    """A migrated SQLite database with a base model, and the means to run jobs in it.

    Args:
        root: The data directory.
        settings: Further settings.
    """

    def __init__(self, root: Path, **settings: Any) -> None:
        quick = {"lease_seconds": 5, "idle_poll_seconds": 0.3, "grace_seconds": 5} | settings
        self.settings = Settings(data_dir=root, **quick)
        migrations.upgrade(self.settings.resolved_database_url)
        self.database = Database(self.settings.resolved_database_url)
        self.store = LocalStore(self.settings.root)
        self._runners: list[Runner] = []
        with self.database.session(write=True) as session:
            session.add(
                BaseModel(
                    name="tiny",
                    source="local",
                    path=str(root),
                    digest=BASE_DIGEST,
                    description={"linear_modules": {MODULE: [2, 2]}},
                )
            )

    def submit(self, *, validated: bool = True, **fields: Any) -> str:
        """Submit a job and return its id; it waits for training unless not `validated`."""
        spec = JobSpec.model_validate({"base_model": "tiny", "rows": ROWS, **fields})
        with self.database.session(write=True) as session:
            job, _ = jobs.submit(session, LOCAL, spec, settings=self.settings, store=self.store)
        if validated:
            claim = jobs.claim(
                self.database, worker_id="validator", stage="validate", lease_seconds=60
            )
            assert claim is not None
            assert claim.job_id == job.id
            jobs.validated(self.database, claim, "validator", {"rows": len(ROWS)})
        return job.id

    def runner(self, mode: str, **settings: Any) -> Runner:
        """Start a train worker's runner with a child of this mode."""
        chosen = self.settings.model_copy(update=settings)
        return self._start("train", TrainStage(chosen, self.store), mode, chosen)

    def light_runner(self, mode: str, queue: JobQueue) -> Runner:
        """Start a light worker's runner with a child of this mode."""
        stage = ValidateStage(self.settings, self.store, queue)
        return self._start("light", stage, mode, self.settings)

    def _start(self, queue: QueueName, stage: Stage, mode: str, settings: Settings) -> Runner:
        child = ChildProcess(
            child_argv(mode),
            log_path=settings.root / "logs" / f"{mode}.log",
            environment=environment(),
        )
        runner = Runner(queue, stage, settings, self.database, child)
        self._runners.append(runner)
        runner.start()
        return runner

    def job(self, job_id: str) -> JobRead:
        """Return a job as it stands."""
        with self.database.session() as session:
            return jobs.get(session, LOCAL, job_id)

    def events(self, job_id: str, kind: str) -> list[dict[str, Any]]:
        """Return the data of a job's events of one type, oldest first."""
        with self.database.session() as session:
            found = jobs.events(session, LOCAL, job_id, limit=1000).data
        return [event.data for event in found if event.type == kind]

    def event_types(self, job_id: str) -> list[str]:
        """Return the types of a job's events, oldest first."""
        with self.database.session() as session:
            return [event.type for event in jobs.events(session, LOCAL, job_id).data]

    def cancel(self, job_id: str) -> None:
        """Cancel a job as its owner."""
        with self.database.session(write=True) as session:
            jobs.cancel(session, LOCAL, job_id)

    def wait_for(self, job_id: str, status: str, seconds: float = 20) -> JobRead:
        """Wait until a job has a status and return it."""
        wait_until(
            lambda: self.job(job_id).status == status,
            seconds,
            lambda: f"not {status}: {self.job(job_id)}",
        )
        return self.job(job_id)

    def wait_for_work(self, job_id: str) -> None:
        """Wait until a job's child has reported progress."""
        wait_until(
            lambda: self.job(job_id).progress.step > 0,
            20,
            lambda: f"no progress: {self.job(job_id)}",
        )

    def work_left(self) -> list[str]:
        """Return the names of the work directories that exist."""
        directory = self.settings.root / "work"
        return sorted(path.name for path in directory.iterdir()) if directory.exists() else []

    def close(self) -> None:
        """Stop the runners and close the database."""
        for runner in self._runners:
            runner.stop()
        for runner in self._runners:
            assert runner.join(15), "a runner did not stop"
        self.database.close()
