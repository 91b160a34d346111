"""The front of an engine that is another server: renders prompts and checks adapters' files.

It renders, encodes and refuses with the code of our own engine, so that what a model reads does not
depend on which engine computes. It has no weights: of a base model it reads the tokenizer and the
config. `core.inference.front_process` runs it, and says how to speak to it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from core.artifacts import TOKENIZER_FILE, WEIGHTS_FILE, sha256_file
from core.causal_lm import linear_modules
from core.child import Channel
from core.data.rendering import end_token_ids
from core.data.tokenizer import load_tokenizer
from core.errors import Conflict, InvalidInput, TunesmithError, to_wire
from core.inference.engine import BaseModelRef, GenerateRequest
from core.inference.gates import AdapterWeights, BaseFacts, check_base_files, read_adapter
from core.inference.grammar import GrammarCompiler
from core.inference.neutral_adapter import write_neutral_adapter
from core.inference.prompts import PromptEncoder
from core.logging import get_logger

# Prompts do not wait for adapters that are read, nor for each other.
_THREADS = 4
_MOST_BASES = 8
_MOST_TEMPLATES = 1024
_UNLIMITED_CONTEXT = 131_072

log = get_logger(__name__)

T = TypeVar("T")


class FrontBase:
    """What is known of a base model without its weights; safe from any thread.

    Args:
        ref: Where it lies.

    Raises:
        Conflict: Code `base_model_changed` or `base_model_unreadable`.
    """

    def __init__(self, ref: BaseModelRef) -> None:
        directory = Path(ref.path)
        try:
            check_base_files(ref)
        except OSError as error:
            raise _unreadable(ref, error) from error
        try:
            self.tokenizer = load_tokenizer(directory)
            model, stated_ends = _skeleton(directory)
        except (InvalidInput, OSError, ValueError, KeyError) as error:
            raise _unreadable(ref, error) from error
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        context_length = int(context or _UNLIMITED_CONTEXT)
        ends = end_token_ids(self.tokenizer) | stated_ends
        self.end_ids = frozenset(id_ for id_ in ends if 0 <= id_ < self.vocabulary)
        self.facts = BaseFacts(
            digest=ref.digest,
            tokenizer_sha256=sha256_file(directory / TOKENIZER_FILE),
            linear_modules=linear_modules(model),
            vocabulary=self.vocabulary,
        )
        grammars = GrammarCompiler(self.tokenizer, self.end_ids, self.vocabulary)
        self._encoder = PromptEncoder(self.tokenizer, context_length, self.vocabulary, grammars)

    def encoder(self, template: str | None, *, own: bool, context_length: int) -> PromptEncoder:
        """Return what encodes prompts.

        Args:
            template: Chat template of the adapter.
            own: Whether the base model's own template is used instead.
            context_length: What the server can read at most.
        """
        # The tokenizer is the base's own, byte for byte; only the template is the adapter's.
        encoder = self._encoder if own else self._encoder.with_template(template)
        return encoder.limited_to(context_length)


class Front:
    """Works on tasks; see the module. Calling it takes a task and returns at once."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="front")
        self._loading = threading.Lock()
        self._bases: OrderedDict[str, FrontBase] = OrderedDict()
        self._templates: OrderedDict[tuple[str, str], str | None] = OrderedDict()
        self._operations: dict[str, Callable[..., dict[str, Any]]] = {
            "check_base": self.check_base,
            "admit": self.admit,
            "encode": self.encode,
            "save_tokenizer": self.save_tokenizer,
            "write_neutral": self.write_neutral,
        }

    def __call__(self, task: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Take a task; its answer is an event."""
        self._pool.submit(self._work, task, channel)
        return {}

    def check_base(self, base: dict[str, Any]) -> dict[str, Any]:
        """Return nothing for a base model whose files are what they were.

        Raises:
            Conflict: Code `base_model_changed` or `base_model_unreadable`.
        """
        self._base(base)
        return {}

    def admit(self, base: dict[str, Any], digest: str, directory: str) -> dict[str, Any]:
        """Read an adapter through all gates that need no weights of the base model.

        Returns:
            `bytes` of its matrices as they are stored, `r`, and `golden_token_ids`.

        Raises:
            Conflict: As `core.inference.gates.read_adapter`; and `adapter_has_no_effect` where
                every module has a matrix of zeros.
        """
        weights = self._read(self._base(base), digest, directory)
        return {
            "bytes": (Path(directory) / WEIGHTS_FILE).stat().st_size,
            "r": weights.r,
            "golden_token_ids": weights.golden_token_ids,
        }

    def encode(
        self,
        base: dict[str, Any],
        request: dict[str, Any],
        context_length: int,
        directory: str | None = None,
    ) -> dict[str, Any]:
        """Return `ids` of a prompt, `max_new_tokens` that may follow, and `end_ids`.

        Raises:
            InvalidInput: As `PromptEncoder.encode`.
        """
        found = self._base(base)
        asked = GenerateRequest.model_validate(request)
        template = None
        if asked.adapter is not None:
            template = self._template(found, asked.adapter.digest, str(directory))
        encoder = found.encoder(template, own=asked.adapter is None, context_length=context_length)
        prompt = encoder.encode(asked)
        return {
            "ids": prompt.ids,
            "max_new_tokens": prompt.max_new_tokens,
            "end_ids": sorted(found.end_ids),
        }

    def save_tokenizer(self, base: dict[str, Any], path: str) -> dict[str, Any]:
        """Write what turns tokens into text to a file that the `tokenizers` library reads."""
        self._base(base).tokenizer.backend_tokenizer.save(path)
        return {}

    def write_neutral(self, base: dict[str, Any], directory: str) -> dict[str, Any]:
        """Write an adapter that changes nothing; see `core.inference.neutral_adapter`."""
        write_neutral_adapter(Path(directory), self._base(base).facts.linear_modules)
        return {}

    def _work(self, task: dict[str, Any], channel: Channel) -> None:
        fields = dict(task)
        number = fields.pop("id")
        try:
            result = self._operations[fields.pop("op")](**fields)
        except TunesmithError as error:
            channel.send("answer", id=number, error=to_wire(error))
        except Exception as error:
            log.error("front_failed", exc_info=error)
            told = TunesmithError("the engine failed on this request", code="internal_error")
            channel.send("answer", id=number, error=to_wire(told))
        else:
            channel.send("answer", id=number, result=result)

    def _base(self, members: dict[str, Any]) -> FrontBase:
        ref = BaseModelRef.model_validate(members)
        with self._loading:
            return _recall(self._bases, ref.digest, lambda: FrontBase(ref), _MOST_BASES)

    def _template(self, base: FrontBase, digest: str, directory: str) -> str | None:
        key = (base.facts.digest, digest)
        if key not in self._templates:
            # Another process than this one may have admitted it.
            self._read(base, digest, directory)
        return self._templates[key]

    def _read(self, base: FrontBase, digest: str, directory: str) -> AdapterWeights:
        weights = read_adapter(Path(directory), digest, base.facts, lambda weights: weights)
        if not any(pair.a.any() and pair.b.any() for pair in weights.modules.values()):
            raise Conflict(
                "the adapter changes nothing: one matrix of every module is zero",
                code="adapter_has_no_effect",
                hint="Train for more steps or with a higher learning rate.",
            )
        key = (base.facts.digest, digest)
        _recall(self._templates, key, lambda: weights.template, _MOST_TEMPLATES)
        return weights


def _recall(kept: OrderedDict[Any, T], key: Any, make: Callable[[], T], most: int) -> T:
    """Return what is kept under a key, making it where needed; the longest unused leave."""
    if key not in kept:
        kept[key] = make()
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)
    return kept[key]


def _skeleton(directory: Path) -> tuple[Any, frozenset[int]]:
    """Return a model without memory for its weights, and the end tokens that its files state."""
    options = {"local_files_only": True}
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    stated = getattr(model.generation_config, "eos_token_id", None)
    if (directory / "generation_config.json").is_file():
        stated = GenerationConfig.from_pretrained(directory, **options).eos_token_id
    ids = stated if isinstance(stated, list) else [stated] if stated is not None else []
    return model, frozenset(int(id_) for id_ in ids)


def _unreadable(ref: BaseModelRef, error: Exception) -> Conflict:
    return Conflict(
        f"the base model {ref.name} cannot be read: {error}",
        code="base_model_unreadable",
        hint="The machine of the API needs the model's directory, too.",
    )
