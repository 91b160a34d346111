"""`python -m tests.soak`: ask an engine at random for a long time, and judge."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path

import psutil

from core.data.quiet import silence_libraries
from core.inference.budgets import Budgets
from core.inference.engine import Engine
from core.inference.lean.linear import Precision
from core.inference.local_engine import LocalEngine
from core.inference.model_runner import ModelRunner
from tests.soak.drive import Access, Drive, Outcome, curve
from tests.soak.fingerprints import make_subjects
from tests.support.engine_process import EngineProcess
from tests.support.engine_world import World

MOST_GROWTH_MIB = 64
_MIB = 1024**2
_CLIENTS = 48
_MAX_WAITING = 1000
# Widths of the model and ranks of the adapters; the large ones take some megabytes each.
_SMALL: tuple[dict[str, int], tuple[int, ...]] = ({}, (1, 2, 4, 8, 16))
_LARGE: tuple[dict[str, int], tuple[int, ...]] = (
    {"hidden_size": 128, "intermediate_size": 256},
    (64, 128, 256),
)

Drives = Callable[[Callable[[Engine], Awaitable[Outcome]]], Outcome]


@dataclass(frozen=True)
class Plan:
    """One soak.

    Attributes:
        requests: How many.
        adapters: Registered ones.
        bank: Those of them that the engine has room for.
        seed: Of all choices.
        access: How adapters are chosen.
        precision: Of the base weights.
        large: Have adapters of some megabytes each, so that memory tells.
        process: Have the engine in a process of its own, behind its socket.
        seconds: End after this time, however many requests are left.
    """

    requests: int
    adapters: int
    bank: int
    seed: int = 0
    access: Access = "uniform"
    precision: Precision = "float32"
    large: bool = False
    process: bool = False
    seconds: float = inf


def soak(root: Path, plan: Plan, disguise: Callable[[Engine], Engine] = lambda it: it) -> Outcome:
    """Run an engine whose bank holds some of the adapters, and one of two base models.

    Args:
        root: An empty directory.
        plan: What to do.
        disguise: Returns what the clients ask in the place of the engine.
    """
    # First, as it limits torch's threads: products as small as these are quicker with one.
    runner = ModelRunner("cpu", threads=1, precision=plan.precision)
    widths, ranks = _LARGE if plan.large else _SMALL
    world = World(root, **widths)
    subjects = make_subjects(world, plan.adapters, ranks=ranks, precision=plan.precision)
    budgets = Budgets(
        bases=int(1.5 * runner.size(world.base)),
        rows=(32 if plan.large else 8) * _MIB,
        prefixes=_MIB,
    )
    place = _own_process if plan.process else _this_process
    with place(world, plan, budgets, runner) as (run, pid):
        drive = Drive(
            subjects,
            world.data_dir / "adapters",
            lambda: int(psutil.Process(pid).memory_info().rss),
            requests=plan.requests,
            seed=plan.seed,
            clients=_CLIENTS,
            access=plan.access,
            seconds=plan.seconds,
        )
        return run(lambda engine: drive.run(disguise(engine)))


@contextmanager
def _this_process(
    world: World, plan: Plan, budgets: Budgets, runner: ModelRunner
) -> Iterator[tuple[Drives, int]]:
    engine = LocalEngine(
        lambda: runner,
        world.locate_adapter,
        max_adapters=plan.bank,
        max_waiting=_MAX_WAITING,
        budgets=budgets,
    ).start()

    async def drive(scenario: Callable[[Engine], Awaitable[Outcome]]) -> Outcome:
        return await scenario(engine)

    try:
        assert engine.ready.wait(60)
        yield lambda scenario: asyncio.run(drive(scenario)), os.getpid()
    finally:
        engine.stop()


@contextmanager
def _own_process(
    world: World, plan: Plan, budgets: Budgets, runner: ModelRunner
) -> Iterator[tuple[Drives, int]]:
    process = EngineProcess(
        world.data_dir,
        engine_max_adapters=plan.bank,
        engine_max_waiting=_MAX_WAITING,
        engine_precision=plan.precision,
        engine_base_bytes=budgets.bases,
        engine_kv_bytes=budgets.rows,
        engine_prefix_bytes=budgets.prefixes,
        log_level="WARNING",
    )
    try:
        process.wait_until_ready()
        yield process.run, process.process.pid
        assert process.stop() == 0, process.log.read_text()
    finally:
        process.kill()


def report(plan: Plan, outcome: Outcome) -> None:
    """Print what came out."""
    print(f"{outcome.asked:,} requests in {outcome.seconds:.0f} s; {plan}")
    for name, count in sorted(outcome.counts.items()):
        print(f"  {name}: {count:,}")
    print(
        f"  resident size (MiB): {outcome.bare_mib} before the first adapter, then "
        f"{curve(outcome.rss_mib)}, at most {max(outcome.rss_mib)}, growth {outcome.growth_mib}"
    )
    print(f"  adapters in memory took at most {outcome.bank_mib:.1f} MiB")
    print(f"  failed: {outcome.failed}, wrong: {len(outcome.wrong)}")
    for wrong in outcome.wrong[:10]:
        print(f"    {wrong}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a soak; return 1 if an answer was wrong, a request failed or memory grew."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--adapters", type=int, default=64, help="registered adapters")
    parser.add_argument("--bank", type=int, default=16, help="adapters in memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--access", choices=("uniform", "zipf"), default="uniform")
    parser.add_argument("--precision", choices=("float32", "fp16"), default="float32")
    parser.add_argument("--large", action="store_true", help="adapters of some megabytes each")
    parser.add_argument("--process", action="store_true", help="the engine in its own process")
    parser.add_argument("--seconds", type=float, default=inf, help="end after this time")
    plan = Plan(**vars(parser.parse_args(arguments)))
    silence_libraries()
    with tempfile.TemporaryDirectory() as root:
        outcome = soak(Path(root), plan)
    report(plan, outcome)
    return 1 if outcome.wrong or outcome.failed or outcome.growth_mib > MOST_GROWTH_MIB else 0


if __name__ == "__main__":
    sys.exit(main())
