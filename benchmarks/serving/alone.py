"""How much is left over HTTP of the engine's own speed, and of its decoder's.

The engine alone chooses tokens and makes text of them, for whoever is in its process; see
`benchmarks.engine_run`. The decoder alone computes logits and takes the best; see
`benchmarks.decoder_run`.
"""

from __future__ import annotations

from typing import Final

from benchmarks.decoder_process import decoder_process
from benchmarks.engine_process import engine_process
from benchmarks.report import Measurement
from benchmarks.serving.bench import Bench
from benchmarks.serving.client import decode_rate
from benchmarks.serving.works import NEW_TOKENS, Samples, make_asks

_WORKS: Final[dict[str, list[int | None]]] = {
    "1 row, an adapter": [0],
    "8 rows, base": [None] * 8,
    "8 rows, 8 adapters": list(range(8)),
}


def measure(bench: Bench) -> list[Measurement]:
    """Measure all three by turns."""
    samples = Samples()
    adapter_dirs = bench.adapters(8)
    with (
        bench.ours(8) as ours,
        engine_process(bench.model_dir, adapter_dirs) as engine,
        decoder_process(bench.model_dir, adapter_dirs) as decoder,
    ):
        # The first round is for warming up.
        for number in range(bench.rounds + 1):
            for work, adapters in _WORKS.items():
                title = f"{work}, decoding over HTTP"
                rates: dict[str, float | None] = {
                    side.name: decode_rate(
                        side.run(
                            make_asks(bench.prompts.short(len(adapters)), adapters, NEW_TOKENS)
                        )
                    )
                    for side in (ours, engine)
                }
                step_ms = decoder.step_ms(adapters, steps=NEW_TOKENS)
                rates["our decoder alone"] = 1000 * len(adapters) / step_ms
                for side, rate in rates.items() if number else ():
                    samples.add(title, "tokens/s", side, rate)
    return samples.measurements()
