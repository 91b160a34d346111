from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.polling import wait_until
from tests.support.processes import is_gone
from tests.support.supervised import RunningSupervisor
from tests.support.worker_jobs import JobBench
from tests.support.worker_process import worker_argv

Start = Callable[..., RunningSupervisor]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[RunningSupervisor] = []

    def open_one(*parts: tuple[str, str | list[str], int], **options: object) -> RunningSupervisor:
        running.append(RunningSupervisor(tmp_path / "serve", parts, **options))  # type: ignore[arg-type]
        return running[-1]

    yield open_one
    for supervisor in running:
        supervisor.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_parts_in_order_and_ends_with_success(
    start: Start, number: signal.Signals
) -> None:
    supervisor = start(("engine", "calm", 2), ("api", "slow", 1), ("worker", "slow", 0))
    started = supervisor.wait_for_notes("started", 3)
    supervisor.wait_for_notes("ready", 1)
    supervisor.process.send_signal(number)
    assert supervisor.process.wait(10) == 0, supervisor.log.read_text()
    stopping = [
        (note.name, note.what) for note in supervisor.notes() if note.what in ("asked", "stopped")
    ]
    assert stopping == [
        (name, what) for name in ("worker", "api", "engine") for what in ("asked", "stopped")
    ]
    assert [note.pid for note in started if psutil.pid_exists(note.pid)] == []


def test_a_part_that_crashes_is_restarted_after_ever_longer_pauses(start: Start) -> None:
    supervisor = start(("calm", "calm", 0), ("crasher", "crasher", 0))
    wait_until(
        lambda: sum(note.name == "crasher" for note in supervisor.notes("started")) >= 3,
        20,
        lambda: supervisor.log.read_text(),
    )
    starts = [note.at for note in supervisor.notes("started") if note.name == "crasher"]
    pauses = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert pauses[0] >= 0.5
    assert pauses[1] >= 1.0
    assert [note.name for note in supervisor.notes("started")].count("calm") == 1
    supervisor.process.send_signal(signal.SIGINT)
    assert supervisor.process.wait(10) == 0


def test_a_killed_part_is_restarted_and_its_own_processes_are_ended(start: Start) -> None:
    supervisor = start(("api", "parent", 0))
    supervisor.wait_for_notes("forked", 1)
    before = supervisor.descendants()
    assert len(before) == 2
    before[0].kill()
    supervisor.wait_for_notes("forked", 2)
    assert [process for process in before if not is_gone(process)] == []


def test_a_part_that_ignores_the_request_is_killed_after_the_grace_period(start: Start) -> None:
    supervisor = start(("stubborn", "stubborn", 0), grace_seconds=0.3)
    (note,) = supervisor.wait_for_notes("started", 1)
    supervisor.process.send_signal(signal.SIGINT)
    assert supervisor.process.wait(5) == 0
    assert not psutil.pid_exists(note.pid)
    assert "killing" in supervisor.log.read_text()


def test_a_second_interrupt_kills_at_once(start: Start) -> None:
    supervisor = start(("stubborn", "stubborn", 0), ("calm", "calm", 1), grace_seconds=60)
    notes = supervisor.wait_for_notes("started", 2)
    supervisor.process.send_signal(signal.SIGINT)
    supervisor.wait_for_notes("asked", 1)
    supervisor.process.send_signal(signal.SIGINT)
    assert supervisor.process.wait(5) == 130
    assert [note.pid for note in notes if psutil.pid_exists(note.pid)] == []


def test_only_one_supervisor_runs_in_a_data_directory(start: Start) -> None:
    first = start(("calm", "calm", 0))
    first.wait_for_notes("started", 1)
    second = start(("calm", "calm", 0))
    assert second.process.wait(10) == 3
    assert f"process {first.process.pid}" in second.log.read_text()
    first.process.kill()
    first.process.wait(5)
    third = start(("calm", "calm", 0))
    third.wait_for_notes("started", 2)


def test_nothing_outlives_a_killed_supervisor_not_even_a_hanging_trainer(
    start: Start, tmp_path: Path
) -> None:
    bench = JobBench(tmp_path / "data", grace_seconds=1, idle_poll_seconds=0.2)
    try:
        job_id = bench.submit()
        supervisor = start(
            ("api", "calm", 1),
            ("train-worker", worker_argv("train", "hang"), 0),
            env=bench.settings.environment(),
        )
        supervisor.wait_for_notes("started", 1)
        bench.wait_for_work(job_id)
        processes = supervisor.descendants()
        assert len(processes) == 3, processes
        supervisor.process.kill()
        supervisor.process.wait(5)
        wait_until(
            lambda: all(is_gone(process) for process in processes),
            10,
            lambda: str([process for process in processes if not is_gone(process)]),
        )
    finally:
        bench.close()
