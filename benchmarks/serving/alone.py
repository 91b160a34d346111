"""How much of the decoder's own speed is left over HTTP; see `benchmarks.decoder_run`."""

from __future__ import annotations

from typing import Final

from benchmarks.decoder_process import decoder_process
from benchmarks.report import Measurement
from benchmarks.serving.bench import Bench
from benchmarks.serving.client import decode_rate
from benchmarks.serving.works import NEW_TOKENS, make_asks

_WORKS: Final[dict[str, list[int | None]]] = {
    "1 row, an adapter": [0],
    "8 rows, base": [None] * 8,
    "8 rows, 8 adapters": list(range(8)),
}


def measure(bench: Bench) -> list[Measurement]:
    """Measure both by turns."""
    rates: dict[str, tuple[list[float], list[float]]] = {work: ([], []) for work in _WORKS}
    with bench.ours(8) as ours, decoder_process(bench.model_dir, bench.adapters(8)) as decoder:
        for number in range(bench.rounds + 1):
            for work, adapters in _WORKS.items():
                asks = make_asks(bench.prompts.short(len(adapters)), adapters, NEW_TOKENS)
                over_http = decode_rate(ours.run(asks))
                step_ms = decoder.step_ms(adapters, steps=NEW_TOKENS)
                # The first round is for warming up.
                if number:
                    rates[work][0].append(over_http)
                    rates[work][1].append(1000 * len(adapters) / step_ms)
        precision = ours.precision
    return [
        Measurement(
            f"{work}, decoding over HTTP, {precision}", "tokens/s", own, bare, "our decoder alone"
        )
        for work, (own, bare) in rates.items()
    ]
