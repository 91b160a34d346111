"""Keep the model libraries off the network, off the terminal and out of each other's way."""

from __future__ import annotations

import os

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Tokenizer threads deadlock after a fork and fight with torch for the cores.
    "TOKENIZERS_PARALLELISM": "false",
}


def silence_libraries() -> None:
    """Set what the model libraries read at import; call before importing transformers."""
    os.environ.update(_ENVIRONMENT)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
