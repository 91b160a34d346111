"""What tests do with a service that runs in processes of its own: its API and its command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx2

from tests.support.polling import wait_until

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
REPOSITORY = Path(__file__).resolve().parents[2]


class ServiceClient:
    """A service that answers at `client` and whose processes have the variables `environment`."""

    client: httpx2.Client
    environment: Mapping[str, str]

    def tails(self) -> str:
        """Return the ends of the processes' logs."""
        raise NotImplementedError

    def run(self, *arguments: str) -> str:
        """Run a command of the command line to its end and return what it printed."""
        finished = subprocess.run(
            [sys.executable, "-m", "service.cli", *arguments],
            cwd=REPOSITORY,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    def upload(self, rows: list[dict[str, Any]]) -> str:
        """Upload rows as JSONL and return the data set's id."""
        content = "".join(json.dumps(row) + "\n" for row in rows)
        files = {"file": ("rows.jsonl", content.encode(), "application/jsonl")}
        answer = self.client.post("/datasets", files=files)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def submit(self, spec: dict[str, Any], key: str | None = None) -> dict[str, Any]:
        """Post a job and return it."""
        headers = {"Idempotency-Key": key} if key else {}
        answer = self.client.post("/jobs", json=spec, headers=headers)
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def job(self, job_id: str) -> dict[str, Any]:
        """Return a job as the API shows it."""
        answer = self.client.get(f"/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait_for(
        self, job_id: str, reached: Callable[[dict[str, Any]], bool], seconds: float
    ) -> dict[str, Any]:
        """Poll a job until `reached` holds and return it; an API that is away is waited for."""
        latest: dict[str, Any] = {}

        def check() -> bool:
            try:
                answer = self.client.get(f"/jobs/{job_id}")
            except httpx2.TransportError:
                return False
            if answer.status_code == 503:
                return False
            assert answer.status_code == 200, answer.text
            latest.clear()
            latest.update(answer.json())
            return reached(latest)

        wait_until(check, seconds, lambda: f"{latest}\n{self.tails()}")
        return latest

    def finish(self, job_id: str, seconds: float = 120) -> dict[str, Any]:
        """Wait until a job has ended and return it."""
        return self.wait_for(job_id, lambda job: job["status"] in TERMINAL, seconds)
