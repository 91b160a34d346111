"""`python -m benchmarks [serving|training|jobs|idle|estimates]`: measure and keep the samples."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks import estimates, idle, jobs, serving, training
from benchmarks.report import Measurement, publish

Suite = Callable[[argparse.Namespace], list[Measurement]]

_SUITES: dict[str, Suite] = {
    "serving": lambda given: serving.measure(given.model, given.rounds),
    "training": lambda given: training.measure(given.model, given.rounds),
    "jobs": lambda given: jobs.measure(given.jobs, given.rounds),
    "idle": lambda given: idle.measure(given.model, given.rounds),
    "estimates": lambda given: estimates.measure(given.model, given.rounds),
}
# The others take long or want a quiet machine.
_BY_DEFAULT = ("serving", "training")


def main() -> None:
    """Run the named suites: serving and training by default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument("suites", nargs="*", metavar="suite", help=", ".join(_SUITES))
    parser.add_argument(
        "--model",
        type=lambda path: Path(path).resolve(),
        help="a directory",
        default=Path("var/models/sample").resolve(),
    )
    parser.add_argument("--jobs", type=int, default=1_000_000, help="of the large database")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each figure")
    parser.add_argument("--output", type=Path, default=Path("var/benchmarks.json"))
    arguments = parser.parse_args()
    unknown = set(arguments.suites) - set(_SUITES)
    if unknown:
        parser.error(f"no such suite: {', '.join(sorted(unknown))}")
    measurements = [
        measurement
        for name in arguments.suites or _BY_DEFAULT
        for measurement in _SUITES[name](arguments)
    ]
    publish(measurements, arguments.output)


if __name__ == "__main__":
    main()
