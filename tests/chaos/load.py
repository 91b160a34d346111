"""Clients of the service under chaos: they submit small jobs and insist until they are answered.

Owns what was accepted and which answers were none that a client may get. A client retries what did
not reach the service or was answered with 503, always under the same Idempotency-Key.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

# Few, so that jobs publish versions of one adapter at the same time.
_ADAPTERS = 4
_RETRY_SECONDS = 0.25
_TIMEOUT_SECONDS = 20.0
_POLL_SECONDS = 0.1
_GENERATED_TOKENS = 200


@dataclass(frozen=True)
class Accepted:
    """A job that the service has promised to do."""

    key: str
    job_id: str
    spec: dict[str, Any]


class Load:
    """Submits jobs so that there are always some.

    Args:
        url: Of the API.
        dataset: Rows that all jobs train on.
        base_models: Names; a trainer that changes between them loads anew.
        seed: Of the specs.
        unfinished: Counts accepted jobs that have not ended.
        in_flight: How many there shall be.
    """

    def __init__(
        self,
        url: str,
        dataset: str,
        base_models: Sequence[str],
        seed: int,
        unfinished: Callable[[], int],
        in_flight: int,
    ) -> None:
        self.accepted: list[Accepted] = []
        self.complaints: list[str] = []
        self.retries = 0
        self._client = httpx2.Client(base_url=url, timeout=_TIMEOUT_SECONDS, trust_env=False)
        self._dataset = dataset
        self._base_models = base_models
        self._seed = seed
        self._chance = random.Random(seed)
        self._unfinished = unfinished
        self._in_flight = in_flight
        self._count = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_submitting, name="load", daemon=True)

    def start(self) -> None:
        """Begin to submit."""
        self._thread.start()

    def stop(self) -> None:
        """Submit nothing more; what was begun is seen through."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def close(self) -> None:
        """Give up the connections."""
        self._client.close()

    def submit(self) -> Accepted | None:
        """Submit one job and insist until it is accepted; safe from any thread."""
        with self._lock:
            self._count += 1
            key, spec = f"chaos-{self._seed}-{self._count}", self._spec(self._count)
        answer = self._insist(
            lambda: self._client.post("/jobs", json=spec, headers={"Idempotency-Key": key})
        )
        if answer.status_code != 202:
            self.complaints.append(f"POST /jobs: {answer.status_code} {answer.text[:500]}")
            return None
        accepted = Accepted(key, answer.json()["id"], spec)
        with self._lock:
            self.accepted.append(accepted)
        return accepted

    def generate(self, adapter: str, digest: str) -> None:
        """Have an adapter's version answer at length, and insist that it does."""
        body = {
            "prompt": "item",
            "max_new_tokens": _GENERATED_TOKENS,
            "min_new_tokens": _GENERATED_TOKENS,
        }
        answer = self._insist(
            lambda: self._client.post("/generate", params={"adapter": adapter}, json=body)
        )
        if answer.status_code != 200 or answer.json()["adapter"]["digest"] != digest:
            self.complaints.append(f"POST /generate: {answer.status_code} {answer.text[:500]}")

    def _keep_submitting(self) -> None:
        while not self._stopping.wait(_POLL_SECONDS):
            if self._unfinished() < self._in_flight:
                self.submit()

    def _insist(self, send: Callable[[], httpx2.Response]) -> httpx2.Response:
        while True:
            try:
                answer = send()
            except httpx2.TransportError:
                pass
            else:
                # 503 says "not now"; any other answer is final.
                if answer.status_code != 503:
                    return answer
                if "retry-after" not in answer.headers:
                    self.complaints.append(f"503 without Retry-After: {answer.text[:500]}")
            self.retries += 1
            time.sleep(_RETRY_SECONDS)

    def _spec(self, number: int) -> dict[str, Any]:
        return {
            "base_model": self._chance.choice(self._base_models),
            "dataset": self._dataset,
            "adapter": f"adapter-{number % _ADAPTERS}",
            "training": {
                "max_steps": self._chance.randint(24, 36),
                "save_steps": 8,
                "learning_rate": 1e-3,
                # Other weights for each job: equal artifacts would be stored only once.
                "seed": number,
            },
            "evaluation": {"samples": 0},
        }
