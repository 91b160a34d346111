"""`python -m benchmarks [SUITE…]`: measure and keep the samples."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

from benchmarks import estimates, floor, idle, jobs, serving, sharing, training
from benchmarks.report import Measurement, publish

Suite = Callable[[argparse.Namespace], list[Measurement]]


def _serving_part(part: str, given: argparse.Namespace) -> list[Measurement]:
    return serving.measure(part, given.model, given.rounds)


_SUITES: dict[str, Suite] = {
    **{f"serving.{part}": functools.partial(_serving_part, part) for part in serving.PARTS},
    "floor": lambda given: floor.measure(given.model, given.rounds),
    "training": lambda given: training.measure(given.model, given.rounds),
    "sharing": lambda given: sharing.measure(given.model, given.rounds),
    "jobs": lambda given: jobs.measure(given.jobs, given.rounds),
    "idle": lambda given: idle.measure(given.model, given.rounds),
    "estimates": lambda given: estimates.measure(given.model, given.rounds),
}
_SERVING = [name for name in _SUITES if name.startswith("serving.")]
# The others take long or want a quiet machine.
_BY_DEFAULT = ["serving", "floor"]


def main() -> None:
    """Run the named suites: serving and floor by default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument(
        "suites", nargs="*", metavar="suite", help=f"serving (all its parts), {', '.join(_SUITES)}"
    )
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
    wanted = [
        name
        for given in arguments.suites or _BY_DEFAULT
        for name in (_SERVING if given == "serving" else [given])
    ]
    unknown = set(wanted) - set(_SUITES)
    if unknown:
        parser.error(f"no such suite: {', '.join(sorted(unknown))}")
    publish((_SUITES[name](arguments) for name in wanted), arguments.output)


if __name__ == "__main__":
    main()
