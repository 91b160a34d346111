from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.children import REPOSITORY
from tests.support.polling import wait_until
from tests.support.processes import is_gone

# A process that a multiprocessing parent started, as uvicorn starts its workers.
SPAWNED = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from core.lifeline import exit_with_parent

def work(told, deaf):
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert exit_with_parent(0.3)
    Path(told + ".tmp").write_text(str(os.getpid()))
    Path(told + ".tmp").rename(told)
    time.sleep(600)

if __name__ == "__main__":
    arguments = (sys.argv[1], sys.argv[2] == "deaf")
    multiprocessing.get_context("spawn").Process(target=work, args=arguments).start()
"""


@pytest.mark.parametrize("hearing", ["hearing", "deaf"])
def test_a_spawned_process_ends_with_its_killed_parent(tmp_path: Path, hearing: str) -> None:
    program, told = tmp_path / "spawned.py", tmp_path / "pid"
    program.write_text(SPAWNED)
    with subprocess.Popen(
        [sys.executable, str(program), str(told), hearing],
        env={"PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
    ) as parent:
        try:
            wait_until(told.exists, 20, "the process did not start")
            process = psutil.Process(int(told.read_text()))
        finally:
            parent.kill()
    wait_until(lambda: is_gone(process), 5, "it outlived its parent")


def test_a_process_nobody_holds_a_lifeline_of_lives_on() -> None:
    program = "from core.lifeline import exit_with_parent; print(exit_with_parent(0.1))"
    finished = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert finished.stdout == "False\n"
    assert finished.returncode == 0
