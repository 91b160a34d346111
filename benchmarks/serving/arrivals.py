"""Requests that come when they come: Poisson arrivals, adapters by Zipf's law."""

from __future__ import annotations

import asyncio
import random
import statistics
from typing import Final

import uvloop

from benchmarks.report import Measurement
from benchmarks.serving.bench import Bench
from benchmarks.serving.client import Answer, Ask, HttpSide
from benchmarks.serving.works import NEW_TOKENS

_ADAPTERS: Final = 100
_RATES_PER_SECOND: Final = (1.0, 2.0)
_SECONDS: Final = 60.0
_ZIPF_EXPONENT: Final = 1.0
_PERCENTILES: Final = (50, 95, 99)


def measure(bench: Bench) -> list[Measurement]:
    """Measure what clients see at two rates, with the default bank."""
    found = []
    with bench.ours(_ADAPTERS) as ours:
        ours.run([Ask(prompt, None, NEW_TOKENS) for prompt in bench.prompts.short(8)])
        for rate in _RATES_PER_SECOND:
            loads = ours.engine["loads"]
            answers = uvloop.run(_arrive(bench, ours, rate))
            loads = ours.engine["loads"] - loads
            load = f"{rate:g} requests/s over {_ADAPTERS} adapters"
            first = [1000 * answer.first_token_seconds for answer in answers]
            gaps = [1000 * gap for answer in answers for gap in answer.gaps]
            found += [
                Measurement(f"{load}, {what}, p{percent}", "ms", [_percentile(values, percent)], [])
                for what, values in (("first token", first), ("between tokens", gaps))
                for percent in _PERCENTILES
            ]
            share = loads / len(answers)
            found.append(Measurement(f"{load}, loads an adapter", "of all", [share], []))
    return found


async def _arrive(bench: Bench, side: HttpSide, rate: float) -> list[Answer]:
    chance = random.Random(rate)
    weights = [1 / rank**_ZIPF_EXPONENT for rank in range(1, _ADAPTERS + 1)]
    asked: list[asyncio.Task[Answer]] = []
    now = asyncio.get_running_loop().time
    due = start = now()
    while due - start < _SECONDS:
        await asyncio.sleep(max(0.0, due - now()))
        (adapter,) = chance.choices(range(_ADAPTERS), weights)
        (prompt,) = bench.prompts.make_each([chance.randint(30, 60)])
        asked.append(asyncio.ensure_future(side.ask(Ask(prompt, adapter, NEW_TOKENS))))
        due += chance.expovariate(rate)
    return await asyncio.gather(*asked)


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]
