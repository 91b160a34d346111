"""`python -m benchmarks [serving|training …]`: measure, print, and keep the samples."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import serving, training
from benchmarks.report import publish

_SUITES = {"serving": serving.measure, "training": training.measure}


def main() -> None:
    """Run the named suites, all by default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument("suites", nargs="*", metavar="suite", help=", ".join(_SUITES))
    parser.add_argument("--model", type=Path, default=Path("var/models/sample"))
    parser.add_argument("--rounds", type=int, default=5, help="samples of each figure")
    parser.add_argument("--output", type=Path, default=Path("var/benchmarks.json"))
    arguments = parser.parse_args()
    unknown = set(arguments.suites) - set(_SUITES)
    if unknown:
        parser.error(f"no such suite: {', '.join(sorted(unknown))}")
    measurements = [
        measurement
        for name in arguments.suites or _SUITES
        for measurement in _SUITES[name](arguments.model.resolve(), arguments.rounds)
    ]
    publish(measurements, arguments.output)


if __name__ == "__main__":
    main()
