"""The whole path in five minutes: ask the base model, train an adapter, ask the adapter.

`make demo` runs it. It starts a service of its own in processes of their own, speaks to it over
HTTP as any application would, and stops it at the end. It exits with 0 only if the adapter has
learned what the base model does not know.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from core.errors import TunesmithError, Unavailable
from examples.questions import Question, load_questions
from service.cli.client import ServiceClient
from service.cli.follow import check_succeeded, follow_job
from service.cli.output import print_error
from service.sample_model import SAMPLE_MODEL

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "support_desk"

MIN_ADAPTER_SHARE = 0.8
MAX_BASE_SHARE = 0.1
MAX_NEW_TOKENS = 36
READY_SECONDS = 120
STOP_SECONDS = 60

console = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())


def main() -> int:
    """Run the demo and return its exit code."""
    parser = argparse.ArgumentParser(description="Train an adapter and compare its answers.")
    parser.add_argument("--model", type=Path, required=True, help="the sample model, converted")
    parser.add_argument("--all", action="store_true", help="show the answers to all questions")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    (ROOT / "var").mkdir(exist_ok=True)
    data_dir = Path(tempfile.mkdtemp(prefix="demo-", dir=ROOT / "var"))
    code = 1
    try:
        code = run(data_dir, arguments.model.resolve(), show_all=arguments.all)
    except KeyboardInterrupt:
        console.print("\ninterrupted")
        code = 130
    except TunesmithError as error:
        print_error(error)
    finally:
        if code in {0, 130}:
            shutil.rmtree(data_dir, ignore_errors=True)
        else:
            console.print(f"The service's data and log are kept in {data_dir}")
    return code


def run(data_dir: Path, model: Path, *, show_all: bool) -> int:
    """Do all steps in order and return the exit code."""
    clock = Stopwatch()
    questions = load_questions(EXAMPLE / "questions.json")
    with running_service(data_dir, model) as url, ServiceClient(url) as service:
        clock.lap("service started")
        say(f"The service is ready at {url}")

        rows = EXAMPLE / "train.jsonl"
        dataset = service.upload("/datasets", rows)
        say(f"Uploaded {rows.relative_to(ROOT)}: {dataset['rows']} rows → {dataset['id']}")

        say(f"Asking the base model {len(questions)} questions that no row asks in these words …")
        before = ask_all(service, questions, adapter=None)
        clock.lap("base model asked")

        spec = json.loads((EXAMPLE / "job.json").read_text("utf-8"))
        job = service.call(
            "POST",
            "/jobs",
            json={**spec, "dataset": dataset["id"]},
            # Sent again after a broken connection, this would not start a second job.
            headers={"Idempotency-Key": f"demo-{dataset['id']}"},
        )
        say(f"POST /jobs → {job['id']}, training on {dataset['rows']} rows …")
        job = follow_job(service, job["id"])
        check_succeeded(job)
        clock.lap("adapter trained")
        version = job["version"]
        adapter = f"{version['name']}@{version['version']}"
        say(f"Published {adapter}, digest {version['digest'][:16]}…")

        say(f"POST /generate?adapter={version['name']}: the same questions …")
        after = ask_all(service, questions, adapter=version["name"])
        clock.lap("adapter asked")
    clock.lap("service stopped")

    shown = questions if show_all else one_per_topic(questions)
    print_answers(shown, before, after)
    base, tuned = score(questions, before), score(questions, after)
    total = len(questions)
    say(f"Right answers: base {base}/{total}, adapter {tuned}/{total}")
    say(clock.summary())
    if tuned < MIN_ADAPTER_SHARE * total or base > MAX_BASE_SHARE * total:
        say("The adapter has not learned enough, or the base model knew too much.")
        return 1
    print_next_steps(version["name"], questions[0].question)
    return 0


@contextlib.contextmanager
def running_service(data_dir: Path, model: Path) -> Iterator[str]:
    """Run `tunesmith serve` on a free port, give its URL, and stop it whatever happens.

    Raises:
        Unavailable: It does not become ready.
    """
    command = [sys.executable, "-m", "service.cli"]
    say("Starting a service of its own …")
    added = subprocess.run(
        [*command, "models", "add", SAMPLE_MODEL, str(model), "--data-dir", str(data_dir)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if added.returncode != 0:
        raise Unavailable(added.stderr.strip(), code="sample_model_not_added")

    log_path = data_dir / "serve.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*command, "serve", "--data-dir", str(data_dir), "--port", "0"],
            cwd=ROOT,
            # The service ends with this pipe, even if we are killed.
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, "TUNESMITH_LIFELINE": "stdin"},
            # Ctrl-C is ours to handle: we stop the service, once.
            start_new_session=True,
        )
    try:
        yield wait_until_ready(process, data_dir / "run" / "serve.json", log_path)
    finally:
        stop(process)


def wait_until_ready(process: subprocess.Popen[bytes], state: Path, log: Path) -> str:
    """Return the service's URL as soon as it says that it is ready.

    Raises:
        Unavailable: It ended, or takes too long.
    """
    deadline = time.monotonic() + READY_SECONDS
    while not state.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            tail = log.read_text("utf-8", "replace")[-3000:]
            raise Unavailable(f"the service did not become ready:\n{tail}", code="not_ready")
        time.sleep(0.1)
    return str(json.loads(state.read_text())["url"])


def stop(process: subprocess.Popen[bytes]) -> None:
    """Press Ctrl-C once for the service and wait until all its processes are gone."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        # Its parts watch the supervisor and end with it.
        process.kill()
        process.wait()
    finally:
        if process.stdin is not None:
            process.stdin.close()


def ask_all(
    service: ServiceClient, questions: list[Question], *, adapter: str | None
) -> dict[str, str]:
    """Return the greedy answer to every question."""
    answers: dict[str, str] = {}
    for question in questions:
        answer: dict[str, Any] = service.call(
            "POST",
            "/generate",
            params={"adapter": adapter} if adapter else {},
            json={
                "messages": [{"role": "user", "content": question.question}],
                "max_new_tokens": MAX_NEW_TOKENS,
                "temperature": 0,
            },
        )
        answers[question.question] = answer["text"]
    return answers


def score(questions: list[Question], answers: dict[str, str]) -> int:
    """Count the questions that are answered with the fact they ask for."""
    return sum(question.is_answered_by(answers[question.question]) for question in questions)


def one_per_topic(questions: list[Question]) -> list[Question]:
    """Return the first question of every topic."""
    return list({question.topic: question for question in reversed(questions)}.values())[::-1]


def print_answers(questions: list[Question], before: dict[str, str], after: dict[str, str]) -> None:
    """Print questions with the answers before and after training."""
    say("")
    if not console.is_terminal:
        for question in questions:
            say(f"Q:       {question.question}")
            say(f"base:    {mark(question, before)} {shorten(before[question.question])}")
            say(f"adapter: {mark(question, after)} {shorten(after[question.question])}")
            say("")
        return
    table = Table(show_lines=True)
    for title, share in (("Question", 2), ("Base model", 3), ("Adapter", 3)):
        table.add_column(title, ratio=share, overflow="fold")
    for question in questions:
        table.add_row(
            question.question,
            f"{mark(question, before)} {shorten(before[question.question])}",
            f"{mark(question, after)} {shorten(after[question.question])}",
        )
    console.print(table)


def mark(question: Question, answers: dict[str, str]) -> str:
    """Return a tick for a right answer and a cross for a wrong one."""
    return "✓" if question.is_answered_by(answers[question.question]) else "✗"


def shorten(text: str, length: int = 120) -> str:
    """Return the beginning of an answer on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def print_next_steps(adapter: str, question: str) -> None:
    """Tell how to have the same in a service that stays."""
    body = json.dumps({"messages": [{"role": "user", "content": question}], "max_new_tokens": 40})
    folder = EXAMPLE.relative_to(ROOT)
    say("")
    say("To keep a service running:   make serve")
    say("Then, in another terminal:")
    say(
        f"  .venv/bin/tunesmith jobs submit {folder}/job.json "
        f"--upload {folder}/train.jsonl --follow"
    )
    say(
        f"  curl -s 'http://127.0.0.1:8000/generate?adapter={adapter}' "
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


class Stopwatch:
    """Measures the time between named moments."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self._laps: list[tuple[str, float]] = []

    def lap(self, name: str) -> None:
        """End the present stretch under a name."""
        now = time.monotonic()
        self._laps.append((name, now - self._last))
        self._last = now

    def summary(self) -> str:
        """Return all stretches and their sum."""
        stretches = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self._laps)
        return f"Time: {stretches}; {self._last - self._started:.0f} s in all"


def say(text: str) -> None:
    """Print a line."""
    console.print(text)


if __name__ == "__main__":
    sys.exit(main())
