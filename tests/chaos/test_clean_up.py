"""A cluster for tests ends with the process that started it, even if that was killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil

from tests.support.polling import wait_until
from tests.support.processes import is_gone
from tests.support.service_client import REPOSITORY

PROGRAM = """
import json, sys, time
from pathlib import Path
from tests.support.cluster import Cluster
cluster = Cluster(Path(sys.argv[1]))
cluster.start("engine")
pids = [process.pid for process in cluster.processes()]
pids += [cluster.postgres.process.pid, cluster.redis.process.pid]
directories = [str(server.directory) for server in (cluster.postgres, cluster.redis)]
print(json.dumps([pids, directories]), flush=True)
time.sleep(600)
"""


def test_nothing_outlives_a_killed_owner(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "cluster")],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
    )
    try:
        assert owner.stdout is not None
        pids, directories = json.loads(owner.stdout.readline())
        processes = [psutil.Process(pid) for pid in pids]
    finally:
        owner.kill()
        owner.communicate()
    assert len(processes) == 3
    wait_until(
        lambda: all(is_gone(process) for process in processes),
        40,
        lambda: f"left: {[process for process in processes if not is_gone(process)]}",
    )
    wait_until(
        lambda: not any(Path(directory).exists() for directory in directories),
        20,
        lambda: f"one of {directories} is left",
    )
