"""The one place that loads a tokenizer, so that training and serving use the same one."""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from core.artifacts import TOKENIZER_FILE, sha256_file
from core.data.quiet import silence_libraries
from core.data.templates import set_fallback
from core.errors import InvalidInput


def load_tokenizer(path: Path | str) -> Any:
    """Load a model directory's tokenizer, with what it lacks repaired in memory.

    A tokenizer without a chat template gets ChatML. One without a pad token, or with one that the
    model has no embedding for, pads with its end token; padding is on the right. Neither changes
    what is learnt: padding is masked by length, never by the token's id.

    Raises:
        InvalidInput: Code `tokenizer_unreadable`; missing, damaged or without character offsets.
            Code `no_end_token`; nothing ends a text.
    """
    silence_libraries()
    from transformers import AutoTokenizer

    directory = Path(path)
    if not (directory / TOKENIZER_FILE).is_file():
        raise _unreadable(f"{directory} has no {TOKENIZER_FILE}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        # The tokenizers library raises bare exceptions for damaged files.
        raise _unreadable(f"the tokenizer of {directory} cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise _unreadable(f"the tokenizer of {directory} gives no character offsets")
    if tokenizer.eos_token_id is None:
        raise InvalidInput(
            f"the tokenizer of {directory} has no end token, so that no answer would end",
            code="no_end_token",
            hint='Name one of its tokens as "eos_token" in tokenizer_config.json.',
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= _count_embeddings(directory):
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    set_fallback(tokenizer)
    return tokenizer


def tokenizer_sha256(path: Path | str) -> str:
    """Return the SHA-256 of a model directory's `tokenizer.json`."""
    return sha256_file(Path(path) / TOKENIZER_FILE)


def read_context_length(path: Path | str) -> int | None:
    """Return the most tokens a model can read, by its config; `None` when that does not say."""
    config = json.loads((Path(path) / "config.json").read_bytes())
    value = config.get("max_position_embeddings")
    return value if isinstance(value, int) and value > 0 else None


class TokenizerCache:
    """Keeps the last few tokenizers in memory, by the digest of their base model.

    Args:
        size: How many are kept.
    """

    def __init__(self, size: int = 4) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._tokenizers: OrderedDict[str, Any] = OrderedDict()

    def get(self, digest: str, path: Path | str) -> Any:
        """Return the tokenizer of the base model `digest`, loading it from `path` when needed."""
        with self._lock:
            if digest not in self._tokenizers:
                self._tokenizers[digest] = load_tokenizer(path)
            self._tokenizers.move_to_end(digest)
            while len(self._tokenizers) > self._size:
                self._tokenizers.popitem(last=False)
            return self._tokenizers[digest]


def _count_embeddings(directory: Path) -> float:
    """Return how many tokens the model beside the tokenizer knows, as far as its config says."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
        count = config.get("text_config", config).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        count = None
    return count if isinstance(count, int) else math.inf


def _unreadable(message: str) -> InvalidInput:
    return InvalidInput(
        message,
        code="tokenizer_unreadable",
        hint="Use a model whose directory holds a complete tokenizer.json.",
    )
