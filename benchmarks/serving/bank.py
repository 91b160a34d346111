"""More live adapters than the bank holds: throughput with half, all, twice, four times as many."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Final

from benchmarks.report import Measurement
from benchmarks.serving.bench import Bench
from benchmarks.serving.client import Ask, HttpSide
from benchmarks.serving.works import NEW_TOKENS, Samples

BANK: Final = 8
LIVE: Final = (4, 8, 16, 32)
_CLIENTS: Final = 8
_REQUESTS: Final = 40


def measure(bench: Bench) -> list[Measurement]:
    """Measure a bank of 8, and what it holds against half of its size."""
    with bench.ours(max(LIVE), engine_max_adapters=BANK) as ours:
        return compare(bench, [ours], LIVE, _REQUESTS)


def compare(
    bench: Bench, sides: Sequence[HttpSide], lives: Sequence[int], requests: int
) -> list[Measurement]:
    """Let sides, each with a bank of 8, answer for ever more live adapters by turns.

    Args:
        bench: The run.
        sides: Who answers.
        lives: How many adapters are asked for.
        requests: How many in each sample.
    """
    samples = Samples()
    for side in sides:
        throughput(side, _draw(bench, max(lives), requests, seed=-1))
    for number in range(bench.rounds):
        for live in lives:
            asks = _draw(bench, live, requests, seed=number)
            for side in sides:
                work = f"8 clients, {live} live adapters, bank of {BANK}"
                samples.add(work, "tokens/s", side.name, throughput(side, asks))
    return samples.measurements()


def throughput(side: HttpSide, asks: Sequence[Ask]) -> float:
    """Return tokens per second of 8 clients that each ask again as soon as they are answered."""
    waiting = iter(asks)

    async def client() -> None:
        for ask in waiting:
            await side.ask(ask)

    async def all_clients() -> None:
        await asyncio.gather(*(client() for _ in range(_CLIENTS)))

    started = time.monotonic()
    asyncio.run(all_clients())
    return sum(ask.new_tokens for ask in asks) / (time.monotonic() - started)


def _draw(bench: Bench, live: int, requests: int, *, seed: int) -> list[Ask]:
    """Return requests, each for any of `live` adapters, drawn evenly."""
    chance = random.Random(seed)
    return [
        Ask(prompt, chance.randrange(live), NEW_TOKENS) for prompt in bench.prompts.short(requests)
    ]
