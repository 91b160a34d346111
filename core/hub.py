"""Fetches a base model's files from the Hugging Face Hub, in a process of its own.

Run as `python -m core.hub REPOSITORY REVISION TARGET_DIR`; prints one line of JSON on stdout. On a
deliberate error it exits with status 1. Only weights, configuration and tokenizer are fetched.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from core.errors import InvalidInput, Unavailable
from core.training.command import run_command

# *.bin and other pickles are left where they are.
_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model"]
# Exports for other runtimes lie in folders.
_IGNORED = ["*/*"]


def download(repository: str, revision: str, target: Path) -> dict[str, Any]:
    """Download one revision of a repository into `target`.

    Raises:
        InvalidInput: Code `hub_model_not_found`; no such repository or revision, or no access.
        Unavailable: Code `hub_unreachable`.
    """
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
    )

    try:
        snapshot_download(
            repository,
            revision=revision,
            local_dir=target,
            allow_patterns=_PATTERNS,
            ignore_patterns=_IGNORED,
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise InvalidInput(
            f"the hub has no {repository} at {revision}, or access needs a token",
            code="hub_model_not_found",
            hint="Check the name and the revision; set HF_TOKEN for a gated model.",
        ) from error
    except (
        httpx2.HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionResolutionError,
    ) as error:
        raise Unavailable(
            "the Hugging Face Hub cannot be reached",
            code="hub_unreachable",
            hint="Check the network, or add the model from a directory or a GGUF file.",
        ) from error
    return {"path": str(target)}


def _main(arguments: list[str]) -> dict[str, Any]:
    if len(arguments) != 3:
        raise InvalidInput("usage: python -m core.hub REPOSITORY REVISION TARGET_DIR")
    return download(arguments[0], arguments[1], Path(arguments[2]))


if __name__ == "__main__":
    sys.exit(run_command(_main))
