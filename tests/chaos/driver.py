"""The chaos run: a cluster under load, faults at named instants, and the verdict.

Owns the order of it all. One fault at a time is done; the next one does not wait until all is well
again, but only a few may be unrecovered from at any time.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.clock import Clock
from tests.chaos.disk import FULL_DISK_SIGNS, Disk, LimitedFiles, open_disk
from tests.chaos.faults import Faults
from tests.chaos.instants import Hold, Listener
from tests.chaos.load import Load
from tests.chaos.schedule import Agenda, Injection
from tests.chaos.verdict import Evidence, judge
from tests.chaos.watch import Recovery, Watch
from tests.support.cluster import Cluster
from tests.support.polling import wait_until
from tests.support.service import chat_rows
from tests.support.tiny_model import make_tiny_model

_DISK_BYTES = 512 * 1024**2
_MAX_PENDING = 2
_GAP_SECONDS = 0.3
# An instant that does not come in this time is tried again later.
_UNREACHED_SECONDS = 45.0
_DRAIN_SECONDS = 180.0
# Longer than the watch waits for each.
_RECOVERY_SECONDS = 120.0

SETTINGS = {
    "TUNESMITH_LEASE_SECONDS": "4",
    "TUNESMITH_IDLE_POLL_SECONDS": "1",
    "TUNESMITH_GRACE_SECONDS": "5",
    # However often a job is hit, it shall come to its end.
    "TUNESMITH_MAX_ATTEMPTS": "1000",
    # Often, and with little grace, so that it runs beside everything else.
    "TUNESMITH_GC_INTERVAL_SECONDS": "5",
    "TUNESMITH_GC_GRACE_SECONDS": "60",
    # A job is to be fast, not polite.
    "TUNESMITH_TRAINER_NICENESS": "0",
}


@dataclass
class Outcome:
    """What a run showed.

    Attributes:
        seed: Of the load and the schedule.
        done: The faults that were done, with how long the recovery took.
        unreached: Faults whose instant never came.
        violations: What must not be; empty is the verdict one hopes for.
        jobs: How many ended in which state.
        retried: Jobs that failed for a full disk and were tried again: how often.
        retries: Requests that clients had to send again.
        disk: How the disk was made full.
        seconds: Of the whole run, by phase.
    """

    seed: int
    done: list[Recovery] = field(default_factory=list)
    unreached: list[Injection] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    jobs: dict[str, int] = field(default_factory=dict)
    retried: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    disk: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


class Driver:
    """Runs a schedule against a cluster below `root`.

    Args:
        root: An empty directory.
        schedule: The faults.
        seed: Of the load.
        base_models: How many there are; trainers change between them.
        mount: Whether a small file system may be mounted, for a disk that is really full.
        in_flight: Jobs at a time.
        say: Hears what happens.
    """

    def __init__(
        self,
        root: Path,
        schedule: Sequence[Injection],
        *,
        seed: int,
        base_models: int = 2,
        mount: bool = False,
        in_flight: int = 4,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._root = root
        self._agenda = Agenda(schedule, window=6)
        self._in_flight = in_flight
        self._seed = seed
        self._models = [f"tiny-{number}" for number in range(base_models)]
        self._mount = mount
        self._say = say
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._ready_for_more = False
        self._due: queue.SimpleQueue[tuple[Injection, Hold]] = queue.SimpleQueue()
        self.outcome = Outcome(seed)

    def run(self) -> Outcome:
        """Run everything: the cluster, the faults, the drain and the verdict."""
        disk_path = self._root / "disk"
        disk = open_disk(disk_path, _DISK_BYTES) if self._mount else LimitedFiles()
        self.outcome.disk = disk.description
        listener = Listener(self._take)
        try:
            clocks = {
                name: Clock(self._root / f"{name}.clock")
                for name in ("train-1", "train-2", "light-1")
            }
            for number, name in enumerate(self._models):
                make_tiny_model(self._root / name, seed=number)
            with Cluster(
                self._root / "cluster",
                train_workers=2,
                environment={
                    **SETTINGS,
                    "TUNESMITH_ARTIFACT_URL": f"file://{disk_path / 'store'}",
                },
                part_environment={
                    name: {**clock.environment, "TUNESMITH_FAILPOINTS": str(listener.path)}
                    for name, clock in clocks.items()
                },
                separate_nodes=True,
                disk=disk_path,
            ) as cluster:
                self._run(cluster, clocks, disk)
        finally:
            listener.close()
            disk.close()
        return self.outcome

    def _run(self, cluster: Cluster, clocks: dict[str, Clock], disk: Disk) -> None:
        cluster.prepare({name: self._root / name for name in self._models})
        cluster.start()
        self._phase("start")
        with cluster.database() as database:
            watch = Watch(database)
            load = Load(
                str(cluster.client.base_url),
                cluster.upload(chat_rows(16)),
                self._models,
                self._seed,
                lambda: len(watch.unfinished()),
                self._in_flight,
            )
            faults = Faults(cluster, clocks, disk, watch, load)
            watch.start()
            load.start()
            try:
                self._wait_for_first_success(watch)
                self._phase("first jobs")
                self._inflict_all(cluster, faults, watch)
                self._phase("faults")
                load.stop()
                faults.finish()
                self._drain(watch)
                self._retry_failed(cluster, watch, faults.jobs_without_disk)
                self._phase("drain")
            except AssertionError as error:
                # The verdict tells what became of it all.
                self.outcome.violations.append(str(error))
            finally:
                self._ready_for_more = False
                load.stop()
                watch.stop()
            self.outcome.done = watch.recovered
            self.outcome.retries = load.retries
            self.outcome.violations += [
                *load.complaints,
                *faults.complaints,
                *(f"no recovery from {recovery.injection}" for recovery in watch.stuck),
            ]
            evidence = Evidence(
                cluster=cluster,
                settings=cluster.settings,
                database=database,
                accepted=load.accepted,
                retried=self.outcome.retried,
                directory=self._root / "reference",
            )
            counts, violations = judge(evidence, self._say)
            load.close()
        self.outcome.jobs = counts
        self.outcome.violations += violations
        self._phase("verdict")

    def _wait_for_first_success(self, watch: Watch) -> None:
        def succeeded() -> int:
            return sum(job.status == "succeeded" for job in watch.jobs.values())

        wait_until(lambda: succeeded() >= 2, 120, "no job succeeded before any fault")

    def _inflict_all(self, cluster: Cluster, faults: Faults, watch: Watch) -> None:
        last = time.monotonic()
        while len(self._agenda) or not self._due.empty():
            self._check_parts(cluster)
            if self._inflict_next(faults, watch):
                last = time.monotonic()
                time.sleep(_GAP_SECONDS)
            elif time.monotonic() - last > _UNREACHED_SECONDS:
                with self._lock:
                    self._agenda.postpone()
                last = time.monotonic()
        self.outcome.unreached = self._agenda.unreached

    def _inflict_next(self, faults: Faults, watch: Watch) -> bool:
        """Do the next fault that is due; tell whether there was one within a second."""
        if self._due.empty():
            self._wait_until_few_are_pending(watch)
            with self._lock:
                timed = self._agenda.timed()
                self._ready_for_more = timed is None
            if timed is not None:
                time.sleep(timed.delay_seconds)
                return self._inflict(faults, timed, None)
        try:
            injection, hold = self._due.get(timeout=1.0)
        except queue.Empty:
            return False
        return self._inflict(faults, injection, hold)

    def _inflict(self, faults: Faults, injection: Injection, hold: Hold | None) -> bool:
        where = hold.details if hold else ""
        done = faults.inflict(injection, hold)
        if not done:
            # The process came to the instant while another fault was ending it.
            with self._lock:
                self._agenda.put_back(injection)
        self._say(
            f"{self._age():6.0f} s  {injection}  {where}{'' if done else '  too late, again later'}"
        )
        return done

    def _age(self) -> float:
        return time.monotonic() - self._began

    def _wait_until_few_are_pending(self, watch: Watch) -> None:
        wait_until(
            lambda: watch.pending <= _MAX_PENDING,
            _RECOVERY_SECONDS,
            "faults are not recovered from",
        )

    def _take(self, hold: Hold) -> bool:
        with self._lock:
            if not self._ready_for_more:
                return False
            injection = self._agenda.at(hold.instant)
            if injection is None:
                return False
            self._ready_for_more = False
            self._due.put((injection, hold))
            return True

    def _check_parts(self, cluster: Cluster) -> None:
        for part in cluster.parts.values():
            if not part.running:
                self.outcome.violations.append(f"{part.name} ended by itself:\n{part.tail()}")
                part.start()

    def _drain(self, watch: Watch) -> None:
        wait_until(
            lambda: watch.refresh() and not watch.unfinished(),
            _DRAIN_SECONDS,
            lambda: f"after {_DRAIN_SECONDS:.0f} s of peace these have not ended: {watch.jobs}",
        )
        wait_until(lambda: watch.pending == 0, _RECOVERY_SECONDS, "faults are not recovered from")

    def _retry_failed(self, cluster: Cluster, watch: Watch, without_disk: set[str]) -> None:
        """Try again what failed, as its owner would once there is room again."""
        failed = [job_id for job_id, job in watch.jobs.items() if job.status == "failed"]
        for job_id in failed:
            error = cluster.job(job_id)["error"]
            full = any(sign in f"{error}" for sign in FULL_DISK_SIGNS)
            if not full or job_id not in without_disk:
                self.outcome.violations.append(f"{job_id} failed: {error}")
            answer = cluster.client.post(f"/jobs/{job_id}/retry")
            assert answer.status_code == 202, answer.text
            self.outcome.retried[job_id] += 1
        if failed:
            self._drain(watch)

    def _phase(self, name: str) -> None:
        self.outcome.seconds[name] = self._age() - sum(self.outcome.seconds.values())
        self._say(f"{self._age():6.0f} s  {name}: done")
