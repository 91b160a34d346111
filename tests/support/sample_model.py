"""The real pretrained sample model, converted once and shared by all tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def sample_model_directory() -> Path:
    """Return the converted model's directory; converts it on the first call (half a minute).

    `make` keeps it below `var/models`, as the demo does.
    """
    directory = Path(os.environ.get("TUNESMITH_SAMPLE_MODEL", _ROOT / "var/models/sample"))
    if not (directory / "config.json").is_file():
        from service.sample_model import sample_gguf_path

        subprocess.run(
            [sys.executable, "-m", "core.training.convert_gguf", sample_gguf_path(), directory],
            check=True,
            timeout=240,
        )
    return directory
