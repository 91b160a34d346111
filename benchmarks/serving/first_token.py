"""Time to the first token: an adapter in memory, and one that has to come from the local disk."""

from __future__ import annotations

from typing import Final

from benchmarks.report import Measurement
from benchmarks.serving.bench import Bench
from benchmarks.serving.client import Ask
from benchmarks.serving.reference import ReferenceSide, reference_side

_PROMPT_TOKENS: Final = 45
_ADAPTERS: Final = 8
# So few in memory that the others always have to come from disk.
_BANK: Final = 2


def measure(bench: Bench) -> list[Measurement]:
    """Ask each adapter twice, one after the other: the first time it is cold.

    Its files are in the system's page cache both times.
    """
    cold, warm, cost, peer = [], [], [], []
    with (
        bench.ours(_ADAPTERS, engine_max_adapters=_BANK) as ours,
        reference_side(bench.model_dir, bench.adapters(_ADAPTERS)) as reference,
    ):

        def first_token_ms(adapter: int) -> float:
            answer = ours.run([Ask(bench.prompts.make(_PROMPT_TOKENS), adapter, 2)])[0]
            return 1000 * answer.first_token_seconds

        _load_once(reference)
        for adapter in range(_ADAPTERS):
            first_token_ms(adapter)
        for number in range(max(bench.rounds, _ADAPTERS)):
            adapter = number % _ADAPTERS
            cold.append(first_token_ms(adapter))
            warm.append(first_token_ms(adapter))
            cost.append(cold[-1] - warm[-1])
            peer.append(reference.load_ms(adapter))
    return [
        Measurement("time to first token, adapter in memory", "ms", warm, []),
        Measurement("time to first token, adapter on local disk", "ms", cold, []),
        Measurement("adapter on local disk, cost", "ms", cost, peer, "PEFT's load_adapter"),
    ]


def _load_once(reference: ReferenceSide) -> None:
    reference.load_ms(0)
