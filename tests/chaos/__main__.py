"""`python -m tests.chaos`: a long run of faults against a cluster, and a report of it."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from core.config import Settings
from core.logging import configure
from tests.chaos.driver import Driver
from tests.chaos.report import to_markdown
from tests.chaos.schedule import PAIRS, plan

DEFAULT_SEED = 20261124

_PRIVATE_VARIABLE = "TUNESMITH_TEST_PRIVATE_MOUNTS"


def main() -> int:
    """Run; the exit code tells whether all invariants held."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of load and schedule")
    parser.add_argument("--faults", type=int, help="how many; each pair three times by default")
    parser.add_argument("--report", type=Path, help="write the report to this file, too")
    parser.add_argument("--only", default="", help="only pairs whose `FAULT at INSTANT` has this")
    parser.add_argument("--keep", action="store_true", help="keep logs and data")
    options = parser.parse_args()
    _use_private_mounts()
    configure(Settings(log_level="ERROR"), "chaos")

    pairs = [pair for pair in PAIRS if options.only in f"{pair[1]} at {pair[0]}"]
    faults = options.faults or 3 * len(pairs)
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"seed {options.seed}, {faults} faults, logs in {root}", flush=True)
    driver = Driver(
        root,
        plan(options.seed, faults, pairs),
        seed=options.seed,
        mount=True,
        say=lambda line: print(line, flush=True),
    )
    outcome = driver.run()
    report = to_markdown(outcome)
    print(report)
    if options.report is not None:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(report)
    if not options.keep and not outcome.violations:
        shutil.rmtree(root)
    return 1 if outcome.violations or outcome.unreached else 0


def _use_private_mounts() -> None:
    """Start anew where a mount is seen by this run alone and ends with it, if that is possible."""
    command = ["unshare", "--mount"]
    if _PRIVATE_VARIABLE in os.environ or shutil.which(command[0]) is None:
        return
    if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
        os.environ[_PRIVATE_VARIABLE] = "yes"
        os.execvp(command[0], [*command, sys.executable, "-m", "tests.chaos", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
