"""The faults: what is done to a running cluster, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping

import psutil
from kombu.exceptions import OperationalError

from core.queue import QUEUES, WAKE_TASKS, create_celery
from tests.chaos.clock import Clock
from tests.chaos.disk import Disk
from tests.chaos.instants import Hold
from tests.chaos.load import Load
from tests.chaos.schedule import GENERATE, SUBMIT, TRAINER_BUSY, Injection
from tests.chaos.watch import Recovery, Watch
from tests.support.cluster import Cluster, Part
from tests.support.service import role_of

# How long a request may be on its way before the fault.
_MAX_REQUEST_LEAD_SECONDS = {SUBMIT: 0.03, GENERATE: 0.4}
_DOWN_SECONDS = 0.3
_FULL_SECONDS = 1.0
_CHILD_END_SECONDS = 10.0
# A worker that is stopped in a transaction keeps its job until Postgres ends that.
_LOSE_LEASE_SECONDS = 30.0
_BROKER_SECONDS = 10.0


class Faults:
    """Does harm.

    Args:
        cluster: To what.
        clocks: Of the workers, by part.
        disk: Of all data directories and the store.
        watch: Knows where jobs are and hears what must recover.
        load: Has requests on their way where a fault wants one.
    """

    def __init__(
        self,
        cluster: Cluster,
        clocks: Mapping[str, Clock],
        disk: Disk,
        watch: Watch,
        load: Load,
    ) -> None:
        self._cluster = cluster
        self._clocks = clocks
        self._disk = disk
        self._watch = watch
        self._load = load
        self._celery = create_celery(cluster.settings)
        self._background: list[threading.Thread] = []
        self._stopped: set[str] = set()
        self.complaints: list[str] = []
        self.jobs_without_disk: set[str] = set()
        """Jobs that were at work while the disk was full: these may fail."""
        self._methods: dict[str, Callable[[Recovery, Part, Hold | None], None]] = {
            "kill trainer": self._kill_trainer,
            "kill worker": self._kill_worker,
            "stop worker past its lease": self._stop_worker,
            "jump worker's clock": self._jump_clock,
            "kill API": self._kill_api,
            "kill engine": self._kill_engine,
            "flush Redis": self._flush_redis,
            "restart Redis": self._restart_redis,
            "restart Postgres": self._restart_postgres,
            "kill Postgres": self._kill_postgres,
            "fill disk": self._fill_disk,
            "wake workers twice": self._wake_twice,
        }

    def inflict(self, injection: Injection, hold: Hold | None) -> bool:
        """Do a fault, let a held process go on if it lives, and expect the recovery.

        Returns:
            Whether it was done; `False` when the held process has ended meanwhile.
        """
        part = self._part_of(hold) if hold else self._some_worker(injection)
        if part is None:
            return False
        self._watch.refresh()
        job_id = hold.details.get("job_id") if hold else None
        job_id = job_id or self._watch.job_of(part.pid)
        recovery = Recovery(injection, job_id, self._watch.jobs.get(job_id) if job_id else None)
        if injection.instant in _MAX_REQUEST_LEAD_SECONDS:
            recovery.job_id = None
            answered = self._send_request(injection.instant)
            recovery.ready = [answered]
            time.sleep(injection.fraction * _MAX_REQUEST_LEAD_SECONDS[injection.instant])
            recovery.started = time.monotonic()
        try:
            self._methods[injection.fault](recovery, part, hold)
        finally:
            if hold is not None:
                hold.release()
        self._watch.expect(recovery)
        return True

    def finish(self) -> None:
        """Wait for what goes on in the background."""
        for thread in self._background:
            thread.join()
        self._celery.close()

    def _kill_trainer(self, recovery: Recovery, part: Part, hold: Hold | None) -> None:
        for child in part.children():
            if role_of(child) in {"trainer", "validator"}:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        # Afterwards the trainer has done its work.
        recovery.lost = recovery.injection.instant in TRAINER_BUSY

    def _kill_worker(self, recovery: Recovery, part: Part, hold: Hold | None) -> None:
        children = part.children()
        recovery.lost = True
        part.kill()
        _, alive = psutil.wait_procs(children, timeout=_CHILD_END_SECONDS)
        if alive:
            self.complaints.append(f"{part.name} was killed and {alive} outlived it")
        part.start()
        recovery.worker_pid = part.pid

    def _stop_worker(self, recovery: Recovery, part: Part, hold: Hold | None) -> None:
        pid = part.pid
        recovery.lost = True
        part.send(signal.SIGSTOP)
        self._stopped.add(part.name)

        def go_on() -> None:
            deadline = time.monotonic() + _LOSE_LEASE_SECONDS
            while time.monotonic() < deadline and not self._has_lost(recovery, pid):
                time.sleep(0.1)
            time.sleep(recovery.injection.fraction)
            self._stopped.discard(part.name)
            # Another fault may have killed it meanwhile.
            if part.pid == pid and part.running:
                part.send(signal.SIGCONT)

        self._in_background(go_on)
        recovery.ready = [*recovery.ready, lambda: part.name not in self._stopped]

    def _has_lost(self, recovery: Recovery, worker_pid: int) -> bool:
        if recovery.job_id is None:
            return False
        job = self._watch.jobs.get(recovery.job_id)
        return job is not None and f":{worker_pid}:" not in (job.worker_id or "")

    def _jump_clock(self, recovery: Recovery, part: Part, hold: Hold | None) -> None:
        self._clocks[part.name].jump(recovery.injection.fraction)

    def _kill_api(self, recovery: Recovery, part: Part, hold: Hold | None) -> None:
        self._restart("api", recovery)

    def _kill_engine(self, recovery: Recovery, part: Part, hold: Hold | None) -> None:
        self._restart("engine", recovery)

    def _restart(self, name: str, recovery: Recovery) -> None:
        self._cluster.parts[name].kill()
        self._cluster.parts[name].start()
        recovery.ready = [*recovery.ready, self._cluster.is_ready]

    def _flush_redis(self, recovery: Recovery, part: Part, hold: Hold | None) -> None:
        self._cluster.redis.flush()

    def _restart_redis(self, recovery: Recovery, part: Part, hold: Hold | None) -> None:
        self._cluster.redis.stop(signal.SIGKILL)
        self._go_on_while_down(hold)
        self._cluster.redis.start()

    def _restart_postgres(self, recovery: Recovery, part: Part, hold: Hold | None) -> None:
        # SIGINT is the fast shutdown: it ends all sessions.
        self._bounce_postgres(recovery, hold, signal.SIGINT)

    def _kill_postgres(self, recovery: Recovery, part: Part, hold: Hold | None) -> None:
        self._bounce_postgres(recovery, hold, signal.SIGKILL)

    def _bounce_postgres(
        self, recovery: Recovery, hold: Hold | None, number: signal.Signals
    ) -> None:
        self._cluster.postgres.stop(number)
        # Half of the processes find it away, the others find it back with their sessions gone.
        if recovery.injection.fraction < 0.5:
            self._go_on_while_down(hold)
        self._cluster.postgres.start()
        recovery.ready = [*recovery.ready, self._cluster.is_ready]

    def _fill_disk(self, recovery: Recovery, part: Part, hold: Hold | None) -> None:
        self.jobs_without_disk |= set(self._watch.unfinished())
        processes = [psutil.Process(part.pid), *part.children()]
        with self._disk.full(processes):
            if hold is not None:
                hold.release()
            time.sleep(_FULL_SECONDS)
        self._watch.refresh()
        self.jobs_without_disk |= set(self._watch.unfinished())
        recovery.ready = [*recovery.ready, self._cluster.is_ready]

    def _wake_twice(self, recovery: Recovery, part: Part, hold: Hold | None) -> None:
        for queue, task in WAKE_TASKS.items():
            for _ in range(2):
                self._send_task(task, QUEUES[queue])

    def _send_task(self, name: str, queue: str) -> None:
        deadline = time.monotonic() + _BROKER_SECONDS
        while True:
            try:
                self._celery.send_task(name, queue=queue, declare=[], ignore_result=True)
                return
            except OperationalError:
                # Redis may have been killed since the last one.
                if time.monotonic() > deadline:
                    raise

    def _go_on_while_down(self, hold: Hold | None) -> None:
        if hold is not None:
            hold.release()
        time.sleep(_DOWN_SECONDS)

    def _send_request(self, instant: str) -> Callable[[], bool]:
        if instant == SUBMIT:
            thread = self._in_background(self._load.submit)
        else:
            adapter, digest = self._watch.newest_version()
            thread = self._in_background(lambda: self._load.generate(adapter, digest))
        return lambda: not thread.is_alive()

    def _in_background(self, work: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self._background.append(thread)
        return thread

    def _part_of(self, hold: Hold) -> Part | None:
        """Return the worker that a held process is, or is a child of."""
        for part in self._cluster.workers:
            if hold.pid == part.pid or hold.pid in {child.pid for child in part.children()}:
                return part
        return None

    def _some_worker(self, injection: Injection) -> Part:
        """Return a train worker, rather one with a job."""
        workers = [part for part in self._cluster.workers if part.name.startswith("train")]
        workers = [part for part in workers if part.name not in self._stopped] or workers
        busy = [part for part in workers if self._watch.job_of(part.pid)]
        return random.Random(injection.fraction).choice(busy or workers)
