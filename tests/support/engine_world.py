"""Models, adapters and requests on which engines are tried, and adapters that gates refuse."""

from __future__ import annotations

import json
import shutil
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from core import artifacts
from core.ids import new_id
from core.inference.engine import (
    AdapterRef,
    BaseModelRef,
    Delta,
    Done,
    Engine,
    EngineEvent,
    EventStream,
    Failed,
    Finished,
    GenerateRequest,
    Message,
    SamplingParams,
    Started,
    TokenLogprob,
)
from core.storage import LocalStore
from tests.support.adapters import base_ref, make_adapter, reseal
from tests.support.tiny_model import make_tiny_model

OTHER_TEMPLATE = "{% for m in messages %}{{ m['content'] }} ### {% endfor %}"


class World:
    """Models and adapters on disk, made when first asked for.

    Args:
        root: An empty directory.
        overrides: Fields of the models' configs.
    """

    def __init__(self, root: Path, **overrides: Any) -> None:
        self.root = root
        self._overrides = overrides

    @cached_property
    def base(self) -> BaseModelRef:
        return base_ref(make_tiny_model(self.root / "base", seed=1, **self._overrides))

    @cached_property
    def twin(self) -> BaseModelRef:
        """Like the base model, but with other weights and without a template."""
        model = make_tiny_model(self.root / "twin", seed=2, chat_template=None, **self._overrides)
        return base_ref(model, "twin")

    @cached_property
    def a(self) -> AdapterRef:
        return self._adapter("a", seed=11)

    @cached_property
    def b(self) -> AdapterRef:
        return self._adapter("b", seed=22, r=8, targets=("q_proj", "down_proj"), scale=0.6)

    @cached_property
    def c(self) -> AdapterRef:
        return self._adapter("c", seed=33, template=OTHER_TEMPLATE)

    @property
    def data_dir(self) -> Path:
        """The data directory of engines that shall find the adapters."""
        return self.root / "data"

    def locate_adapter(self, digest: str) -> Path:
        """Return where an adapter's files are, as a store does."""
        return LocalStore(self.data_dir).adapter_path(digest)

    def keep(self, path: Path) -> AdapterRef:
        """Have engines find an artifact, whatever is wrong with it, by the digest it claims."""
        digest = artifacts.read_manifest(path).digest
        LocalStore(self.data_dir).delete_adapter(digest)
        shutil.copytree(path, self.data_dir / "adapters" / digest)
        return AdapterRef(digest=digest)

    def _adapter(self, name: str, **options: Any) -> AdapterRef:
        return self.keep(make_adapter(self.root / name, Path(self.base.path), **options))


@dataclass
class Collected:
    """All events of one request, put together."""

    started: Started
    texts: dict[int, str] = field(default_factory=dict)
    deltas: dict[int, list[str]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    finished: dict[int, Finished] = field(default_factory=dict)
    done: Done | None = None

    @property
    def text(self) -> str:
        return self.texts.get(0, "")

    @property
    def token_ids(self) -> list[int]:
        return [entry.token_id for entry in self.logprobs[0]]


def make_request(
    base: BaseModelRef,
    adapter: AdapterRef | None = None,
    *,
    prompt: str | None = "The quick brown",
    messages: list[Message] | None = None,
    **sampling: Any,
) -> GenerateRequest:
    return GenerateRequest(
        request_id=new_id("gen"),
        project_id="project-default",
        base_model=base,
        adapter=adapter,
        prompt=None if messages else prompt,
        messages=messages,
        sampling=SamplingParams(**sampling),
    )


async def collect(engine: Engine, request: GenerateRequest) -> Collected:
    stream = await engine.generate(request)
    async with aclosing(stream):
        return await collect_rest(stream)


async def collect_rest(stream: EventStream) -> Collected:
    first = await anext(stream)
    assert isinstance(first, Started)
    collected = Collected(first)
    async for event in stream:
        add(collected, event)
    assert collected.done is not None
    total = sum(finished.completion_tokens for finished in collected.finished.values())
    assert collected.done.completion_tokens == total
    return collected


def add(collected: Collected, event: EngineEvent) -> None:
    assert collected.done is None, "an event came after Done"
    match event:
        case Delta():
            assert event.index not in collected.finished, "text came after Finished"
            collected.texts[event.index] = collected.texts.get(event.index, "") + event.text
            collected.deltas.setdefault(event.index, []).append(event.text)
            collected.logprobs.setdefault(event.index, []).extend(event.logprobs)
        case Finished():
            collected.finished[event.index] = event
        case Done():
            collected.done = event
        case Failed() | Started():
            raise AssertionError(event)


def spoil(world: World, code: str, directory: Path) -> tuple[BaseModelRef, AdapterRef]:
    """Return a base model and an adapter that the gate `code` has to refuse."""
    path = Path(shutil.copytree(world.locate_adapter(world.a.digest), directory / "adapter"))
    weights = path / artifacts.WEIGHTS_FILE
    match code:
        case "base_model_mismatch":
            return world.twin, world.a
        case "adapter_has_no_effect":
            zero = make_adapter(directory / "zero", Path(world.base.path), scale=0.0)
            return world.base, world.keep(zero)
        case "digest_mismatch":
            content = bytearray(weights.read_bytes())
            content[-1] ^= 1
            weights.write_bytes(content)
            # A digest of its own: the failed load is remembered by it.
            manifest = json.loads((path / artifacts.MANIFEST_FILE).read_text())
            manifest["digest"] = "d" * 64
            (path / artifacts.MANIFEST_FILE).write_text(json.dumps(manifest))
            return world.base, world.keep(path)
        case "tokenizer_mismatch":
            tokenizer = path / artifacts.TOKENIZER_FILE
            tokenizer.write_text(tokenizer.read_text() + "\n")
            sha256 = artifacts.sha256_file(tokenizer)
            return world.base, world.keep(reseal(path, tokenizer_sha256=sha256))
        case "template_mismatch":
            (path / artifacts.TEMPLATE_FILE).write_text(OTHER_TEMPLATE)
            return world.base, world.keep(reseal(path))
        case "invalid_manifest":
            (path / artifacts.TOKENIZER_CONFIG_FILE).write_text("{}")
            return world.base, world.keep(reseal(path, lora_alpha=1.0))
        case "invalid_adapter_config":
            config = json.loads((path / artifacts.CONFIG_FILE).read_text())
            config["modules_to_save"] = ["lm_head"]
            (path / artifacts.CONFIG_FILE).write_text(json.dumps(config))
        case "invalid_adapter_weights":
            weights.write_bytes(b"\x80\x04K\x01.")
        case "adapter_shape_mismatch":
            tensors = load_file(weights)
            save_file({name: tensor[:, :2].clone() for name, tensor in tensors.items()}, weights)
        case "adapter_not_finite":
            tensors = load_file(weights)
            next(iter(tensors.values()))[0, 0] = float("nan")
            save_file(tensors, weights)
    return world.base, world.keep(reseal(path))
