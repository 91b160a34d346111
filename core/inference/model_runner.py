"""Base models in memory.

Owns loading and verifying base models, which of them are there, and by which path each computes:
the lean decoder where it can, transformers and PEFT for every other causal language model.
"""

from __future__ import annotations

import ctypes
import gc
import math
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.artifacts import TOKENIZER_FILE, sha256_file
from core.causal_lm import linear_modules, load_causal_lm, select_device
from core.data.golden import golden_token_ids
from core.data.rendering import end_token_ids
from core.data.tokenizer import load_tokenizer
from core.errors import Conflict, InvalidInput
from core.inference.adapter_bank import AdapterKey
from core.inference.engine import BaseModelRef
from core.inference.gates import BaseFacts, check_base_files, read_adapter
from core.inference.lean.linear import Precision, offered_precisions
from core.inference.lean.model import LeanModel
from core.inference.lean.weights import why_not_lean
from core.inference.loaded_base import LoadedBase, PreparedAdapter
from core.inference.rows import RowModel
from core.logging import get_logger
from core.memory_limits import usable_memory_bytes

# What half-precision weights may change the distribution of the next token by, in nats; a usual
# model is at a thirtieth of that.
_MOST_DIVERGENCE = 1e-4
# For architectures that state no limit of their own.
_UNLIMITED_CONTEXT = 1_000_000

log = get_logger(__name__)


class ModelRunner:
    """The base models of one device, each on the path that is best for it.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        threads: Torch threads; 0 leaves torch's choice, all cores.
        precision: Of the base weights on the lean path; `auto` is the device's preferred one. A
            model that it would change too much is computed in float32.

    Attributes:
        bases: Loaded ones, by digest.
        memory_bytes: Of the device.
    """

    def __init__(
        self,
        device: str = "auto",
        threads: int = 0,
        precision: Precision | Literal["auto"] = "auto",
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = select_device(device)
        self.memory_bytes = _memory_bytes(self.device)
        self._precision = precision
        self.bases: dict[str, LoadedBase] = {}

    def size(self, ref: BaseModelRef) -> int:
        """Return what loading a base model takes at most, in float32; 0 if it cannot be read."""
        try:
            return 4 * sum(map(_count_numbers, sorted(Path(ref.path).glob("*.safetensors"))))
        except (OSError, SafetensorError):
            return 0

    def give_memory_back(self, *, of_base: bool) -> None:
        """Return to the system what was freed; safe from any thread.

        Args:
            of_base: Whether a base model has left, too.
        """
        if of_base:
            # Models refer to themselves in circles. It stops all threads for a while.
            gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        # glibc keeps what was freed between other blocks, which after large matrices is much.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def load_base(self, ref: BaseModelRef) -> LoadedBase:
        """Read a base model from disk; safe from any thread.

        Raises:
            Conflict: Code `base_model_changed` or `base_model_unreadable`.
        """
        directory = Path(ref.path)
        try:
            check_base_files(ref)
        except OSError as error:
            raise _unreadable(ref, error) from error
        try:
            tokenizer = load_tokenizer(directory)
            model = load_causal_lm(directory, torch.float32)
        except InvalidInput as error:
            raise _unreadable(ref, error) from error
        model.to(self.device)
        facts = BaseFacts(
            digest=ref.digest,
            tokenizer_sha256=sha256_file(directory / TOKENIZER_FILE),
            linear_modules=linear_modules(model),
            vocabulary=_vocabulary(model),
        )
        return LoadedBase(
            self._rows(model, ref.name, golden_token_ids(tokenizer)),
            tokenizer,
            facts,
            _eos_ids(model, tokenizer),
            _context_length(model),
            _vocabulary(model),
        )

    def _rows(self, model: Any, name: str, token_ids: list[int]) -> RowModel:
        obstacle = why_not_lean(model)
        offered = offered_precisions(self.device)
        precision = offered[0] if self._precision == "auto" else self._precision
        if obstacle is None and precision in offered:
            exact = _log_probabilities(_compute(model, token_ids))
            lean = LeanModel(model, precision)
            near = _log_probabilities(lean.logits_of(None, token_ids))
            divergence = float((exact.exp() * (exact - near)).sum(-1).mean())
            if precision != "float32" and not divergence <= _MOST_DIVERGENCE:
                log.warning("precision_is_too_low", model=name, precision=precision)
                lean = LeanModel(model, "float32")
            log.info("base_model_is_lean", model=name, precision=lean.precision)
            return lean
        reason = obstacle or f"{self.device.type} does not compute in {precision}"
        log.info("base_model_is_generic", model=name, reason=reason)
        # PEFT takes seconds to import, and an engine that was killed shall be back soon.
        from core.inference.peft_rows import PeftRows

        return PeftRows(model)

    def read_adapter(self, base_digest: str, digest: str, directory: Path) -> PreparedAdapter:
        """Read an adapter of a loaded base model from disk; safe from any thread.

        Raises:
            NotFound, Conflict: See `core.inference.gates.read_adapter`.
        """
        base = self.bases[base_digest]
        return read_adapter(directory, digest, base.facts, base.prepare)

    def remove_adapter(self, key: AdapterKey) -> None:
        """Take an adapter out of memory."""
        self.bases[key.base_digest].remove(key.digest)


@torch.inference_mode()
def _compute(model: Any, token_ids: list[int]) -> Tensor:
    """Return the logits that transformers computes, (tokens, vocabulary)."""
    logits: Tensor = model(input_ids=torch.tensor([token_ids], device=model.device)).logits[0]
    return logits


def _log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.cpu().double(), dim=-1)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return usable_memory_bytes()


def _count_numbers(path: Path) -> int:
    with safe_open(path, framework="pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    stated = [getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id]
    # What a template ends turns with may not be the tokenizer's end token, and is what was trained.
    ids = set(end_token_ids(tokenizer))
    for value in stated:
        ids.update(value if isinstance(value, list) else [value] if value is not None else [])
    return frozenset(token_id for token_id in ids if 0 <= token_id < _vocabulary(model))


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().num_embeddings)


def _context_length(model: Any) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or _UNLIMITED_CONTEXT)


def _unreadable(ref: BaseModelRef, error: Exception) -> Conflict:
    return Conflict(
        f"the base model {ref.name} cannot be loaded: {error}",
        code="base_model_unreadable",
        hint="Check the model's directory.",
    )
