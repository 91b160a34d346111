"""What others notice: a job's status beside answers and training, a long prompt beside rows."""

from __future__ import annotations

import asyncio
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Event
from typing import Any, Final

from benchmarks.report import Measurement
from benchmarks.serving.bench import Bench
from benchmarks.serving.client import Ask
from benchmarks.serving.ours import BASE, OurSide
from benchmarks.serving.works import NEW_TOKENS
from tests.support.service import chat_rows

_ROWS: Final = 8
_STATUS_CALLS: Final = 200
# Paced, so that the calls do not become the load themselves.
_PAUSE_SECONDS: Final = 0.02
_LONG_PROMPT_TOKENS: Final = 1500
_USUAL_SECONDS: Final = 3.0
# More than the rows can get while the long prompt is read.
_LONG_ANSWER_TOKENS: Final = 800


def measure_status(bench: Bench) -> list[Measurement]:
    """Time `GET /jobs/{id}` while 8 answers are computed and a job trains, all the time."""
    with bench.ours(_ROWS) as ours:
        return [
            Measurement(
                "job status, p99, while 8 answers are computed and a job trains",
                "ms",
                [_status_p99(bench, ours) for _ in range(bench.rounds)],
                [],
            )
        ]


def measure_long_prompt(bench: Bench) -> list[Measurement]:
    """Have a prompt of 1,500 tokens come while 8 rows decode; find their longest gap."""
    with bench.ours(_ROWS) as ours:
        found = [asyncio.run(_disturb(bench, ours)) for _ in range(bench.rounds)]
    rows = f"8 rows, a prompt of {_LONG_PROMPT_TOKENS:,} tokens arrives"
    usual, longest, first = (list(column) for column in zip(*found, strict=True))
    return [
        Measurement(f"{rows}, usual step", "ms", usual, []),
        Measurement(
            f"{rows}, longest gap",
            "usual steps",
            [gap / step for gap, step in zip(longest, usual, strict=True)],
            [],
        ),
        Measurement(f"{rows}, its first token", "ms", first, []),
    ]


def _status_p99(bench: Bench, ours: OurSide) -> float:
    service = ours.service
    job = service.submit(
        {
            "base_model": BASE,
            "rows": chat_rows(32),
            "training": {"max_steps": 100_000},
            "evaluation": {"samples": 0},
        }
    )
    service.wait_for(job["id"], _trains, 120)
    done = Event()
    try:
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(_answer_until, bench, ours, done)
            samples: list[float] = []
            while len(samples) < _STATUS_CALLS:
                time.sleep(_PAUSE_SECONDS)
                started = time.monotonic()
                latest = service.job(job["id"])
                samples.append((time.monotonic() - started) * 1000)
                if load.done() or not _trains(latest):
                    raise RuntimeError("the load ended before the calls did")
            done.set()
            load.result()
    finally:
        done.set()
        service.client.post(f"/jobs/{job['id']}/cancel")
        service.finish(job["id"])
    return statistics.quantiles(samples, n=100)[98]


def _trains(job: dict[str, Any]) -> bool:
    return job["status"] == "running" and bool((job.get("progress") or {}).get("step"))


def _answer_until(bench: Bench, ours: OurSide, done: Event) -> None:
    """Keep 8 streams going until `done` is set."""

    async def client(adapter: int) -> None:
        while not done.is_set():
            await ours.ask(Ask(bench.prompts.make(45), adapter, NEW_TOKENS))

    async def all_clients() -> None:
        await asyncio.gather(*(client(adapter) for adapter in range(_ROWS)))

    asyncio.run(all_clients())


async def _disturb(bench: Bench, ours: OurSide) -> tuple[float, float, float]:
    """Return in milliseconds a usual step, the longest gap, and the long prompt's first token."""
    prompts = bench.prompts.short(_ROWS)
    rows = [
        asyncio.ensure_future(ours.ask(Ask(prompt, adapter, _LONG_ANSWER_TOKENS)))
        for adapter, prompt in enumerate(prompts)
    ]
    await asyncio.sleep(_USUAL_SECONDS)
    long = await ours.ask(Ask(bench.prompts.make(_LONG_PROMPT_TOKENS), 0, 2))
    answers = await asyncio.gather(*rows)
    arrived, read = long.sent, long.times[0]
    if any(answer.times[-1] < read for answer in answers):
        raise RuntimeError("an answer ended before the long prompt was read")
    begun = max(answer.times[0] for answer in answers)
    pairs = [pair for answer in answers for pair in pairwise(answer.times)]
    usual = statistics.median(b - a for a, b in pairs if a >= begun and b <= arrived)
    longest = max(b - a for a, b in pairs if b > arrived and a < read)
    return 1000 * usual, 1000 * longest, 1000 * (read - arrived)
