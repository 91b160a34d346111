"""Trainer and engine on one machine: how fast each is alone, and both at the same time."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from benchmarks.report import Measurement
from benchmarks.serving.bench import Bench
from benchmarks.serving.client import Ask
from benchmarks.serving.ours import BASE, OurSide
from benchmarks.serving.works import NEW_TOKENS
from tests.support.service import chat_rows

_STREAMS: Final = 8
_SECONDS: Final = 12.0
_PROMPT_TOKENS: Final = 45
# What a step takes at first, until everything it needs has been allocated.
_FIRST_STEPS: Final = 2


def measure(model_dir: Path, rounds: int) -> list[Measurement]:
    """Have 8 streams alone, a training job alone, and both."""
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root), model_dir, rounds)
        with bench.ours(_STREAMS) as ours:
            _answer(bench, ours, lambda: False)
            for _ in range(rounds):
                for name, value in _measure_once(bench, ours).items():
                    samples.setdefault(name, []).append(value)
    together = {name: samples[f"{name}, both"] for name in ("answers", "training")}
    return [
        Measurement(
            f"{name}, while both are computed", "tokens/s", both, samples[name], f"{name} alone"
        )
        for name, both in together.items()
    ] + [
        Measurement(name, "MiB", samples[name], [])
        for name in ("memory of the engine", "memory of the trainer")
    ]


def _measure_once(bench: Bench, ours: OurSide) -> dict[str, float]:
    found = {"answers": _answer_for(bench, ours, _SECONDS)}
    job = _start_job(ours)
    try:
        _wait_for_steps(ours, job, _FIRST_STEPS)
        time.sleep(_SECONDS)
        alone = _steps(ours, job)
        found["answers, both"] = _answer_for(bench, ours, _SECONDS)
        both = _steps(ours, job)[len(alone) + 1 :]
        found["training"] = statistics.median(alone[_FIRST_STEPS:])
        found["training, both"] = statistics.median(both)
        processes = ours.service.processes()
        for name, role in (("engine", "engine"), ("trainer", "trainer")):
            found[f"memory of the {name}"] = processes[role].memory_info().rss / 1024**2
    finally:
        ours.service.client.post(f"/jobs/{job}/cancel")
        ours.service.finish(job)
    return found


def _answer_for(bench: Bench, ours: OurSide, seconds: float) -> float:
    """Return the tokens per second of 8 streams, each of which asks again and again."""
    end = time.monotonic() + seconds
    return _answer(bench, ours, lambda: time.monotonic() < end)


def _answer(bench: Bench, ours: OurSide, go_on: Callable[[], bool]) -> float:
    times: list[tuple[float, float]] = []

    async def client(adapter: int) -> None:
        while True:
            answer = await ours.ask(Ask(bench.prompts.make(_PROMPT_TOKENS), adapter, NEW_TOKENS))
            share = answer.tokens / len(answer.times)
            times.extend((moment, share) for moment in answer.times)
            if not go_on():
                return

    async def all_clients() -> float:
        started = time.monotonic()
        await asyncio.gather(*(client(adapter) for adapter in range(_STREAMS)))
        return started

    started = asyncio.run(all_clients())
    return sum(share for _, share in times) / (max(times)[0] - started)


def _start_job(ours: OurSide) -> str:
    job = ours.service.submit(
        {
            "base_model": BASE,
            "rows": chat_rows(64),
            "training": {"max_steps": 100_000},
            "evaluation": {"samples": 0},
        }
    )
    return str(job["id"])


def _wait_for_steps(ours: OurSide, job: str, steps: int) -> None:
    def reached(seen: dict[str, Any]) -> bool:
        return bool(seen["progress"] and (seen["progress"].get("step") or 0) > steps)

    ours.service.wait_for(job, reached, 120)


def _steps(ours: OurSide, job: str) -> list[float]:
    """Return the tokens per second of each training step so far."""
    found: list[float] = []
    cursor = None
    while True:
        answer = ours.service.client.get(
            f"/jobs/{job}/metrics", params={"cursor": cursor} if cursor else {}
        ).json()
        found += [row["tokens_per_second"] for row in answer["data"] if row["tokens_per_second"]]
        cursor = answer.get("next_cursor")
        if not cursor:
            return found
