"""Where the time of a step goes, beside what the machine's memory and arithmetic need for it.

The parts are found from outside, whatever computes them: with one layer and with all, with and
without adapters, behind short and long prompts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from benchmarks.decoder_process import DecoderProcess, Sizes, decoder_process
from benchmarks.report import Measurement
from benchmarks.serving.adapters import make_adapters

_READ_BYTES: Final = 2**30
_WIDTH: Final = 2048
_ADAPTERS: Final = 8
_TRIES: Final = 5
_SHORT, _LONG = 64, 1024
_FLOOR: Final = "what memory or arithmetic need at least"


@dataclass(frozen=True)
class Machine:
    """What all cores can do together.

    Attributes:
        bytes_per_second: Read from memory.
        operations_per_second: In float32 products.
    """

    bytes_per_second: float
    operations_per_second: float

    def floor_ms(self, bytes_: float, operations: float) -> float:
        """Return the milliseconds of what takes longer."""
        return 1000 * max(bytes_ / self.bytes_per_second, operations / self.operations_per_second)


def measure(model_dir: Path, rounds: int) -> list[Measurement]:
    """Measure the machine, and steps of one row and of 8 rows with 8 adapters."""
    reads = _repeat(rounds, _read_rate)
    products = _repeat(rounds, _product_rate)
    machine = Machine(max(reads), max(products))
    with tempfile.TemporaryDirectory() as name:
        adapters = make_adapters(Path(name), model_dir, range(_ADAPTERS))
        with decoder_process(model_dir, adapters) as decoder:
            parts = [
                part for rows in (1, _ADAPTERS) for part in _parts(decoder, rows, rounds, machine)
            ]
    giga = 1e9
    return [
        Measurement("memory, read by all cores", "GB/s", [rate / giga for rate in reads], []),
        Measurement("float32 products", "GFLOP/s", [rate / giga for rate in products], []),
        *parts,
    ]


def _parts(decoder: DecoderProcess, rows: int, rounds: int, machine: Machine) -> list[Measurement]:
    sizes, base, adapters = decoder.sizes, [None] * rows, list(range(rows))
    found: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        whole = decoder.step_ms(base, prompt_tokens=_SHORT)
        one_layer = decoder.step_ms(base, prompt_tokens=_SHORT, one_layer=True)
        with_adapters = decoder.step_ms(adapters, prompt_tokens=_SHORT)
        long = decoder.step_ms(base, prompt_tokens=_LONG)
        layer = (whole - one_layer) / (sizes.layers - 1)
        took = {
            "whole step": with_adapters,
            "layers without adapters": layer * sizes.layers,
            "head and what is around the layers": one_layer - layer,
            "adapters": with_adapters - whole,
            f"further {_LONG - _SHORT} tokens of context": long - whole,
        }
        # The first round is for warming up.
        if number:
            for part, figure in took.items():
                found.setdefault(part, []).append(figure)
    floors = _floors(sizes, rows, machine)
    work = f"{rows} row{'s' * (rows > 1)}, {rows} adapter{'s' * (rows > 1)}, {sizes.precision}"
    return [
        Measurement(
            f"{work}: {part}",
            "ms",
            figures,
            [floors[part]] if part in floors else [],
            _FLOOR if part in floors else "",
        )
        for part, figures in found.items()
    ]


def _floors(sizes: Sizes, rows: int, machine: Machine) -> dict[str, float]:
    def weights(numbers: int) -> float:
        return machine.floor_ms(numbers * sizes.bytes_per_weight, 2.0 * numbers * rows)

    # What an adapter multiplies is far less than what it takes to read it.
    parts = {
        "layers without adapters": weights(sizes.layers * sizes.layer_weights),
        "head and what is around the layers": weights(sizes.head_weights),
        "adapters": machine.floor_ms(rows * sizes.adapter_bytes, 0),
    }
    return {"whole step": sum(parts.values()), **parts}


def _repeat(rounds: int, figure: Callable[[], float]) -> list[float]:
    """Return samples of which each is the best of several: the machine can do at least that."""
    return [max(figure() for _ in range(_TRIES)) for _ in range(rounds)]


def _read_rate() -> float:
    numbers = torch.ones(_READ_BYTES // 4)
    numbers.sum()
    started = time.perf_counter()
    numbers.sum()
    return _READ_BYTES / (time.perf_counter() - started)


def _product_rate() -> float:
    left, right = torch.ones(_WIDTH, _WIDTH), torch.ones(_WIDTH, _WIDTH)
    started = time.perf_counter()
    left @ right
    return 2 * _WIDTH**3 / (time.perf_counter() - started)
