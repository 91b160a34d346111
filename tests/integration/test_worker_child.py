from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.children import REPOSITORY, child_argv, environment
from tests.support.polling import wait_until
from tests.support.processes import is_gone
from worker.child import ChildProcess, Crashed, Failed, Finished, Outcome, Stopped


class Conversation:
    """A child and what came of running tasks in it."""

    def __init__(self, log_path: Path, mode: str, **options: Any) -> None:
        self.child = ChildProcess(
            child_argv(mode), log_path=log_path, environment=environment(), **options
        )
        self.events: list[dict[str, Any]] = []
        self.reason: str | None = None

    def run(self, task: dict[str, Any] | None = None, grace_seconds: float = 10) -> Outcome:
        return self.child.run(
            task or {},
            on_event=self.events.append,
            stop_reason=lambda: self.reason,
            grace_seconds=grace_seconds,
        )

    def stop_after_first_event(self) -> str | None:
        return "cancel" if self.events else None


@pytest.fixture
def converse(tmp_path: Path) -> Iterator[Callable[..., Conversation]]:
    opened: list[Conversation] = []

    def start(mode: str, **options: Any) -> Conversation:
        opened.append(Conversation(tmp_path / "logs" / "child.log", mode, **options))
        return opened[-1]

    yield start
    for conversation in opened:
        conversation.child.close()


def test_a_child_stays_warm_and_what_it_prints_goes_to_the_log(
    converse: Callable[..., Conversation], tmp_path: Path
) -> None:
    conversation = converse("succeed", niceness=3)
    base = {"base": {"digest": "a" * 64}}
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        outcome = conversation.run({"work_dir": str(tmp_path / str(number)), **base})
        assert isinstance(outcome, Finished)
    pids = {event["data"]["pid"] for event in conversation.events if event["event"] == "log"}
    assert pids == {conversation.child.pid}
    steps = [event["step"] for event in conversation.events if event["event"] == "metric"]
    assert steps == [1, 2, 3, 1, 2, 3]
    log = (tmp_path / "logs" / "child.log").read_text()
    assert log.count("a library's chatter on stdout") == 2


def test_a_child_is_started_with_its_niceness_and_gets_the_task_as_it_is(
    converse: Callable[..., Conversation],
) -> None:
    task = {"text": "grüße\n\u2028", "large": "x" * 300_000}
    outcome = converse("echo", niceness=4).run(task)
    assert isinstance(outcome, Finished)
    assert outcome.result["task"] == task
    assert outcome.result["niceness"] == os.nice(0) + 4
    if (group := outcome.result["autogroup"]) is not None:
        # Linux looks at the session's value first, where the feature is on.
        assert group.split()[-1] == str(os.nice(0) + 4)


@pytest.mark.parametrize(
    ("mode", "code", "stays"),
    [
        ("refuse", "invalid_dataset", True),
        ("break_down", "internal_error", False),
        ("run_out_of_memory", "out_of_memory", False),
    ],
)
def test_a_failure_comes_with_its_code_and_a_doubtful_child_is_replaced(
    converse: Callable[..., Conversation], mode: str, code: str, stays: bool
) -> None:
    conversation = converse(mode)
    outcome = conversation.run()
    assert isinstance(outcome, Failed)
    assert outcome.error["code"] == code
    assert (conversation.child.pid is not None) == stays


def test_a_crash_is_told_apart_and_the_next_task_gets_a_new_child(
    converse: Callable[..., Conversation],
) -> None:
    conversation = converse("crash")
    for _ in range(2):
        outcome = conversation.run()
        assert isinstance(outcome, Crashed)
        assert "SIGKILL" in outcome.reason
        assert conversation.child.pid is None
    assert [event["type"] for event in conversation.events] == ["crashing", "crashing"]


def test_nonsense_on_the_event_pipe_is_a_crash(converse: Callable[..., Conversation]) -> None:
    conversation = converse("talk_nonsense")
    assert isinstance(conversation.run(), Crashed)
    assert conversation.child.pid is None


def test_a_program_that_cannot_start_is_a_crash_with_its_exit_code(tmp_path: Path) -> None:
    child = ChildProcess(
        [sys.executable, "-c", "import sys; sys.exit(7)"], log_path=tmp_path / "child.log"
    )
    outcome = child.run({}, on_event=lambda _: None, stop_reason=lambda: None, grace_seconds=1)
    assert isinstance(outcome, Crashed)
    assert "code 7" in outcome.reason


def test_a_stop_request_is_honoured_at_the_step_boundary_and_the_child_stays(
    converse: Callable[..., Conversation],
) -> None:
    conversation = converse("stop_slowly")
    for _ in range(2):
        conversation.events.clear()
        outcome = conversation.child.run(
            {},
            on_event=conversation.events.append,
            stop_reason=conversation.stop_after_first_event,
            grace_seconds=10,
        )
        assert outcome == Stopped(forced=False)
    assert conversation.child.pid is not None


@pytest.mark.parametrize("mode", ["hang", "hold_the_interpreter"])
def test_a_child_that_does_not_stop_is_killed_after_the_grace_period(
    converse: Callable[..., Conversation], mode: str
) -> None:
    conversation = converse(mode)
    started: list[float] = []

    def stop_reason() -> str | None:
        if conversation.events and not started:
            started.append(time.monotonic())
        return "cancel" if conversation.events else None

    outcome = conversation.child.run(
        {}, on_event=conversation.events.append, stop_reason=stop_reason, grace_seconds=0.5
    )
    assert outcome == Stopped(forced=True)
    assert 0.5 <= time.monotonic() - started[0] < 5
    assert conversation.child.pid is None


def test_a_child_that_died_while_idle_is_replaced_unnoticed(
    converse: Callable[..., Conversation],
) -> None:
    conversation = converse("echo")
    first = conversation.run()
    assert isinstance(first, Finished)
    os.kill(first.result["pid"], signal.SIGKILL)
    wait_until(
        lambda: psutil.Process(first.result["pid"]).status() == psutil.STATUS_ZOMBIE,
        5,
        "the child did not die",
    )
    second = conversation.run()
    assert isinstance(second, Finished)
    assert second.result["pid"] != first.result["pid"]


def test_a_child_that_has_grown_is_replaced_after_its_task(
    converse: Callable[..., Conversation],
) -> None:
    conversation = converse("echo", max_rss_bytes=100 * 1024**2)
    first = conversation.run()
    assert isinstance(first, Finished)
    assert conversation.child.pid == first.result["pid"]
    assert isinstance(conversation.run({"grow_bytes": 120 * 1024**2}), Finished)
    assert conversation.child.pid is None
    assert not psutil.pid_exists(first.result["pid"])


@pytest.mark.parametrize("mode", ["hang", "hold_the_interpreter", "stop_slowly"])
def test_a_child_dies_with_its_killed_parent_whatever_it_is_doing(
    tmp_path: Path, mode: str
) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.support.children import child_argv\n"
        "from worker.child import ChildProcess\n"
        "child = ChildProcess(child_argv(sys.argv[1]), log_path=Path(sys.argv[2]))\n"
        "child.run({}, on_event=lambda _: Path(sys.argv[3]).write_text(str(child.pid)),"
        " stop_reason=lambda: None, grace_seconds=60)\n"
    )
    told = tmp_path / "pid"
    with subprocess.Popen(
        [sys.executable, "-c", program, mode, str(tmp_path / "child.log"), str(told)],
        cwd=REPOSITORY,
    ) as parent:
        try:
            wait_until(lambda: told.exists() and told.read_text(), 20, "the child did not work")
            child = psutil.Process(int(told.read_text()))
            # Busy in its call: it uses all of a core, or nothing.
            busy = mode == "hold_the_interpreter"
            wait_until(lambda: not busy or child.cpu_percent(0.2) > 20, 10, "it does not work")
        finally:
            parent.kill()
    wait_until(lambda: is_gone(child), 5, "the child outlived its parent")
