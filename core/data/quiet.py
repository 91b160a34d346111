"""Keep the model libraries off the network, off the terminal and out of each other's way."""

from __future__ import annotations

import os
from logging import ERROR, getLogger

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Tokenizer threads deadlock after a fork and fight with torch for the cores.
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
# Threads that spin while they wait for each other take the cores from the other process that
# computes on this machine: trainer and engine together fall to a tenth of their speed. Sleeping
# costs 4% where one of them is alone.
_WAIT_POLICY = ("OMP_WAIT_POLICY", "PASSIVE")


# The engine's steps are a thousand small products, and falling asleep between two of them costs
# more than the products; this is long enough from one to the next and too short to hurt a trainer.
_BRIEF_SPIN = ("GOMP_SPINCOUNT", "4000")


def spin_briefly() -> None:
    """Let torch's threads stay awake from one small product to the next; before importing torch."""
    os.environ.setdefault(*_BRIEF_SPIN)


def silence_libraries() -> None:
    """Set what the model libraries read at import; call before importing torch."""
    os.environ.update(_ENVIRONMENT)
    os.environ.setdefault(*_WAIT_POLICY)
    from transformers.utils import logging

    # Where it is installed, PEFT imports it, and it asks for a kernel from the network.
    getLogger("bitsandbytes").setLevel(ERROR)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
