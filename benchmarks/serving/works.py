"""Rows side by side: the same works for every side, by turns, whole and decoding alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Final, Protocol

from benchmarks.report import Measurement
from benchmarks.serving.bench import Bench
from benchmarks.serving.client import Answer, Ask, decode_rate, prompt_rate, whole_rate
from benchmarks.serving.ours import OURS
from benchmarks.serving.prompts import Prompt
from benchmarks.serving.reference import reference_side

NEW_TOKENS: Final = 48
ADAPTERS: Final = 16
# Work → adapter of each row.
WORKS: Final[Mapping[str, Sequence[int | None]]] = {
    "1 row, base": [None],
    "1 row, an adapter": [0],
    "8 rows, base": [None] * 8,
    "8 rows, one adapter": [0] * 8,
    "8 rows, 8 adapters": range(8),
    "16 rows, base": [None] * 16,
    "16 rows, one adapter": [0] * 16,
    "16 rows, 16 adapters": range(16),
}
_PROMPT_TOKENS = 512
_PROMPT_WORKS: Final[Mapping[str, Sequence[int | None]]] = {
    "1 prompt, base": [None],
    "1 prompt, an adapter": [0],
    "8 prompts at once, 8 adapters": range(8),
}
_CONTEXTS = (64, 512, 1024)
_CONTEXT_NEW_TOKENS = 64
# With a margin for what a server has to prepare at its first requests.
_WARM_UP_TOKENS = 8


class Side(Protocol):
    """Something that answers requests side by side."""

    name: str

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Answer all of them at once."""
        ...


class Samples:
    """Figures of several sides, collected by work; a side is ours if its name begins so."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], dict[str, list[float]]] = {}

    def add(self, work: str, unit: str, side: str, figure: float | None) -> None:
        """Keep one figure, unless there is none, and show it: a run takes long."""
        kept = self._found.setdefault((work, unit), {}).setdefault(side, [])
        if figure is not None:
            kept.append(figure)
        shown = "nothing" if figure is None else f"{figure:.1f} {unit}"
        print(f"{work}: {shown}, {side}", file=sys.stderr, flush=True)

    def measurements(self) -> list[Measurement]:
        """Return one measurement for each of ours with each peer, or one without any."""
        return [
            Measurement(
                f"{work}, {own.removeprefix(OURS)}", unit, sides[own], sides.get(peer, []), peer
            )
            for (work, unit), sides in self._found.items()
            for own in sides
            if own.startswith(OURS)
            for peer in [side for side in sides if not side.startswith(OURS)] or [""]
        ]


def measure_rows(bench: Bench) -> list[Measurement]:
    """Measure all works, with both precisions of ours, beside transformers + PEFT."""
    with ExitStack() as stack:
        ours = stack.enter_context(bench.ours(ADAPTERS))
        exact = stack.enter_context(bench.ours(ADAPTERS, precision="float32"))
        reference = stack.enter_context(reference_side(bench.model_dir, bench.adapters(ADAPTERS)))
        return compare(bench, [ours, exact, reference], WORKS)


def measure_prompts(bench: Bench) -> list[Measurement]:
    """Measure how fast prompts are read."""
    with ExitStack() as stack:
        ours = stack.enter_context(bench.ours(ADAPTERS))
        reference = stack.enter_context(reference_side(bench.model_dir, bench.adapters(ADAPTERS)))
        return compare_prompts(bench, [ours, reference])


def measure_contexts(bench: Bench) -> list[Measurement]:
    """Measure a step of 8 rows with 8 adapters behind longer and longer prompts.

    Ours has read the prompts before and takes them over; otherwise the first answers would end
    before the last prompt is read.
    """
    work, adapters = "step of 8 rows, 8 adapters", range(8)
    with ExitStack() as stack:
        ours = stack.enter_context(bench.ours(ADAPTERS))
        reference = stack.enter_context(reference_side(bench.model_dir, bench.adapters(8)))
        samples = Samples()
        warm_up(bench, [ours, reference], {work: adapters})
        for _ in range(bench.rounds):
            for length in _CONTEXTS:
                prompts = bench.prompts.make_each([length] * len(adapters))
                asks = make_asks(prompts, adapters, _CONTEXT_NEW_TOKENS)
                ours.run(make_asks(prompts, adapters, 1))
                for side in (ours, reference):
                    rate = decode_rate(side.run(asks))
                    step = 1000 * len(asks) / rate if rate else None
                    samples.add(f"{work}, {length:,} tokens before", "ms", side.name, step)
    return samples.measurements()


def compare(
    bench: Bench, sides: Sequence[Side], works: Mapping[str, Sequence[int | None]]
) -> list[Measurement]:
    """Let sides do the same works by turns.

    Each round has other prompts, and all sides get the same ones.
    """
    figures = {"whole": whole_rate, "decoding": decode_rate}
    samples = Samples()
    warm_up(bench, sides, works)
    for _ in range(bench.rounds):
        for work, adapters in works.items():
            asks = make_asks(bench.prompts.short(len(adapters)), adapters, NEW_TOKENS)
            for side in sides:
                answers = side.run(asks)
                for what, figure in figures.items():
                    samples.add(f"{work}, {what}", "tokens/s", side.name, figure(answers))
    return samples.measurements()


def compare_prompts(bench: Bench, sides: Sequence[Side]) -> list[Measurement]:
    """Let sides read prompts of 512 tokens by turns."""
    samples = Samples()
    warm_up(bench, sides, _PROMPT_WORKS)
    for _ in range(bench.rounds):
        for work, adapters in _PROMPT_WORKS.items():
            prompts = bench.prompts.make_each([_PROMPT_TOKENS] * len(adapters))
            asks = make_asks(prompts, adapters, 1)
            for side in sides:
                what = f"{work}, {_PROMPT_TOKENS} tokens each"
                samples.add(what, "prompt tokens/s", side.name, prompt_rate(side.run(asks)))
    return samples.measurements()


def warm_up(bench: Bench, sides: Sequence[Side], works: Mapping[str, Sequence[int | None]]) -> None:
    """Have every side do every work once, shortly."""
    for adapters in works.values():
        for side in sides:
            side.run(make_asks(bench.prompts.short(len(adapters)), adapters, _WARM_UP_TOKENS))


def make_asks(
    prompts: Sequence[Prompt], adapters: Sequence[int | None], new_tokens: int
) -> list[Ask]:
    """Return a request for each prompt and adapter."""
    return [
        Ask(prompt, adapter, new_tokens) for prompt, adapter in zip(prompts, adapters, strict=True)
    ]
