"""`python -m tests.soak`: ask an engine at random for a long time, and judge."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from core.data.quiet import silence_libraries
from core.inference.budgets import Budgets
from core.inference.local_engine import LocalEngine
from core.inference.model_runner import ModelRunner
from tests.soak.drive import Drive, Outcome, curve
from tests.soak.fingerprints import make_subjects
from tests.support.engine_world import World

MOST_GROWTH_MIB = 64


def soak(root: Path, *, requests: int, adapters: int, bank: int, seed: int) -> Outcome:
    """Run an engine whose bank holds some of the adapters, and one of two base models."""
    # First, as it limits torch's threads: products as small as these are quicker with one.
    runner = ModelRunner("cpu", threads=1, precision="float32")
    world = World(root)
    subjects = make_subjects(world, root, adapters)
    engine = LocalEngine(
        lambda: runner,
        world.locate_adapter,
        max_adapters=bank,
        max_waiting=1000,
        budgets=Budgets(
            bases=int(1.5 * runner.size(world.base)), rows=8 * 1024**2, prefixes=1024**2
        ),
    ).start()
    try:
        assert engine.ready.wait(60)
        return asyncio.run(Drive(subjects, requests, seed, clients=48).run(engine))
    finally:
        engine.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a soak; return 1 if any answer was wrong or memory grew."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--bank", type=int, default=16, help="adapters in memory")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    silence_libraries()
    with tempfile.TemporaryDirectory() as root:
        outcome = soak(
            Path(root),
            requests=options.requests,
            adapters=options.adapters,
            bank=options.bank,
            seed=options.seed,
        )
    print(f"{options.requests:,} requests in {outcome.seconds:.0f} s, seed {options.seed}")
    for name, count in sorted(outcome.counts.items()):
        print(f"  {name}: {count:,}")
    print(f"  resident size (MiB): {curve(outcome.rss_mib)}, growth {outcome.growth_mib}")
    print(f"  wrong: {len(outcome.wrong)}")
    for wrong in outcome.wrong[:10]:
        print(f"    {wrong}")
    return 1 if outcome.wrong or outcome.growth_mib > MOST_GROWTH_MIB else 0


if __name__ == "__main__":
    sys.exit(main())
