"""`python -m worker --queue train|light`, configured by the environment."""

from __future__ import annotations

import argparse
import sys

from core.config import Settings
from worker.app import run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m worker")
    parser.add_argument("--queue", choices=["train", "light"], required=True)
    sys.exit(run(parser.parse_args().queue, Settings()))
