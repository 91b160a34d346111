"""What the engine computes is what transformers and PEFT compute, for each family of models.

Tiny random models; `test_engine_sample_model.py` has the pretrained one. Adapters come from PEFT's
own files through all gates, with ranks from 1 to 256, on different modules, in both scalings.
"""

from __future__ import annotations

import asyncio
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel

from core.artifacts import read_manifest
from core.causal_lm import linear_modules
from core.data.rendering import encode_text
from core.data.tokenizer import load_tokenizer
from core.inference.engine import AdapterRef, BaseModelRef, Engine
from core.inference.lean.model import LeanModel
from core.inference.loaded_base import LoadedBase
from core.inference.local_engine import LocalEngine
from core.inference.model_runner import ModelRunner
from core.inference.peft_rows import PeftRows
from core.storage import LocalStore
from tests.support.adapters import AdapterMaker, base_ref
from tests.support.engine_world import collect, make_request
from tests.support.families import GENERIC, LEAN, make_family
from tests.support.rows import read_prompt

TOLERANCE = 1e-3
VOCABULARY = 384

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is falling back to its reference:UserWarning"),
    # PEFT asks under a name that transformers is giving up.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]


class Kind(NamedTuple):
    """An adapter: its rank, the share of the modules that it changes, and its scaling."""

    rank: int
    modules: slice
    use_rslora: bool


KINDS = [
    Kind(1, slice(None), use_rslora=False),
    Kind(2, slice(0, None, 3), use_rslora=True),
    Kind(4, slice(1, None, 2), use_rslora=False),
    Kind(8, slice(0, 1), use_rslora=True),
    Kind(16, slice(None), use_rslora=True),
    Kind(32, slice(3, 6), use_rslora=False),
    Kind(64, slice(None), use_rslora=False),
    Kind(256, slice(2, None, 4), use_rslora=True),
]


@dataclass
class Case:
    """A family: a model with adapters on disk, and what transformers and PEFT make of them."""

    base: BaseModelRef
    store: LocalStore
    adapters: list[str]
    tuned: Any

    def expected(self, adapter: str | None, ids: Sequence[int]) -> torch.Tensor:
        """Return the reference's logits of every position, (tokens, vocabulary)."""
        tokens = torch.tensor([list(ids)])
        with torch.inference_mode():
            if adapter is None:
                with self.tuned.disable_adapter():
                    logits: torch.Tensor = self.tuned(input_ids=tokens, use_cache=False).logits[0]
            else:
                self.tuned.set_adapter(adapter)
                logits = self.tuned(input_ids=tokens, use_cache=False).logits[0]
        return logits

    def load(self, runner: ModelRunner) -> LoadedBase:
        """Return the base model with all adapters, as the engine loads them."""
        base = runner.bases[self.base.digest] = runner.load_base(self.base)
        for digest in self.adapters:
            self.insert(runner, digest)
        return base

    def insert(self, runner: ModelRunner, digest: str) -> None:
        path = self.store.adapter_path(digest)
        runner.bases[self.base.digest].insert(runner.read_adapter(self.base.digest, digest, path))


@pytest.fixture(scope="module", params=[*LEAN, *GENERIC])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def case(family: str, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp(family)
    model_dir = make_family(root / "base", family)
    store = LocalStore(root / "data")
    maker = AdapterMaker(model_dir)
    modules = _adaptable(maker.model)
    paths = []
    for number, kind in enumerate(KINDS if family in LEAN else KINDS[::3]):
        path = maker.make(
            root / f"adapter-{number}",
            r=kind.rank,
            targets=modules[kind.modules],
            seed=100 + number,
            # So that no adapter drowns the base model or is drowned by it.
            scale=0.3 / (2 * kind.rank**0.5 if kind.use_rslora else 2 * kind.rank**-0.25) ** 0.5,
            use_rslora=kind.use_rslora,
        )
        store.publish_adapter(path)
        paths.append(path)
    adapters = [read_manifest(path).digest for path in paths]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        tuned: Any = PeftModel.from_pretrained(maker.model, paths[0], adapter_name=adapters[0])
        for path, digest in zip(paths[1:], adapters[1:], strict=True):
            tuned.load_adapter(path, adapter_name=digest)
    return Case(base_ref(model_dir), store, adapters, tuned.eval())


def _adaptable(model: Any) -> list[str]:
    # Models with a state use these matrices without calling the module, so that an adapter on one
    # has no effect, neither here nor in PEFT, which refuses the first.
    refused = ("mixer.out_proj", "mamba.out_proj", "dt_proj")
    return sorted(name for name in linear_modules(model) if not name.endswith(refused))


@pytest.fixture(scope="module")
def runner(case: Case) -> ModelRunner:
    runner = ModelRunner("cpu", threads=1, precision="float32")
    case.load(runner)
    return runner


def test_a_family_is_computed_the_way_that_it_should_be(
    case: Case, runner: ModelRunner, family: str
) -> None:
    rows = runner.bases[case.base.digest].rows
    assert type(rows) is (LeanModel if family in LEAN else PeftRows)


def test_the_adapters_are_told_apart(case: Case) -> None:
    """The comparisons below mean something only if the references differ."""
    ids = [3 + 7 * number % 300 for number in range(20)]
    found = [case.expected(adapter, ids) for adapter in (None, *case.adapters)]
    for index, one in enumerate(found):
        for other in found[:index]:
            assert (one - other).abs().max() > 10 * TOLERANCE


def test_every_logit_of_a_text_alone(case: Case, runner: ModelRunner) -> None:
    rows = runner.bases[case.base.digest].rows
    ids = [random.Random(1).randrange(VOCABULARY) for _ in range(70)]
    for adapter in (None, *case.adapters):
        logits = rows.logits_of(adapter, ids)
        assert (logits - case.expected(adapter, ids)).abs().max() < TOLERANCE


@pytest.mark.parametrize("piece", [512, 16, 5])
def test_every_logit_of_texts_side_by_side_their_prompts_read_in_pieces(
    case: Case, runner: ModelRunner, piece: int
) -> None:
    rows = runner.bases[case.base.digest].rows
    chance = random.Random(piece)
    # Two of each, so that groups are unequal as soon as some of them wait.
    adapters = [*case.adapters, None, *case.adapters[:3]]
    texts = [
        [chance.randrange(VOCABULARY) for _ in range(chance.choice([1, 9, 33, 60]))]
        for _ in adapters
    ]
    opened = [rows.open_row(*pair) for pair in zip(adapters, texts, strict=True)]
    first = []
    for row in opened:
        first.append(read_prompt(rows, row, piece))
    seen = [[logits] for logits in first]
    starts = [len(text) - 1 for text in texts]
    for step in range(6):
        chosen = [index for index in range(len(opened)) if step % 2 or chance.random() < 0.7]
        tokens = [chance.randrange(VOCABULARY) for _ in chosen]
        logits = rows.extend([opened[index] for index in chosen], [[token] for token in tokens])
        for index, token, own in zip(chosen, tokens, logits, strict=True):
            texts[index] = [*texts[index], token]
            seen[index].append(own)
    for adapter, text, start, own in zip(adapters, texts, starts, seen, strict=True):
        expected = case.expected(adapter, text)[start:]
        assert (torch.stack(own) - expected).abs().max() < TOLERANCE
    for row in opened:
        rows.close_row(row)
    assert rows.cache_bytes == 0


def test_every_logit_after_adapters_have_left_and_come_back(
    case: Case, runner: ModelRunner
) -> None:
    base = runner.bases[case.base.digest]
    ids = [random.Random(2).randrange(VOCABULARY) for _ in range(40)]
    before = {adapter: base.rows.logits_of(adapter, ids) for adapter in case.adapters}
    alone = base.rows.logits_of(None, ids)
    for leaving in (case.adapters[::2], case.adapters[1::2], case.adapters):
        for adapter in leaving:
            base.remove(adapter)
        assert torch.equal(base.rows.logits_of(None, ids), alone)
        for adapter in reversed(leaving):
            case.insert(runner, adapter)
        for adapter, logits in before.items():
            assert torch.equal(base.rows.logits_of(adapter, ids), logits)


@pytest.fixture(scope="module")
def engine(case: Case) -> Iterator[LocalEngine]:
    engine = LocalEngine(
        lambda: ModelRunner("cpu", threads=1, precision="float32"),
        case.store.adapter_path,
        max_adapters=len(KINDS),
    ).start()
    assert engine.ready.wait(60)
    yield engine
    engine.stop()


def test_greedy_answers_alone_side_by_side_and_after_a_reload(
    case: Case, engine: LocalEngine
) -> None:
    prompt = "The quick brown fox jumps over the lazy dog and what is the capital? " * 2
    adapters = [None, *(AdapterRef(digest=digest) for digest in case.adapters)]
    requests = [
        make_request(
            case.base, adapter, prompt=prompt, max_new_tokens=12, min_new_tokens=12, logprobs=0
        )
        for adapter in adapters
    ]

    async def scenario(engine: Engine) -> list[list[list[int]]]:
        alone = [(await collect(engine, request)).token_ids for request in requests]
        together = await asyncio.gather(*(collect(engine, request) for request in requests))
        for digest in case.adapters:
            assert await engine.unload(digest)
        again = await asyncio.gather(*(collect(engine, request) for request in requests))
        return [alone, *([answer.token_ids for answer in answers] for answers in (together, again))]

    tokenizer = load_tokenizer(case.base.path)
    ids = encode_text(prompt, tokenizer).ids
    for answers in asyncio.run(scenario(engine)):
        for adapter, answer in zip(adapters, answers, strict=True):
            assert len(answer) == 12
            logits = case.expected(adapter.digest if adapter else None, [*ids, *answer])
            # At least so many tokens were asked for, which rules the end out.
            ends = torch.tensor([tokenizer.eos_token_id])
            logits = logits.index_fill(1, ends, float("-inf"))
            for token_id, row in zip(answer, logits[len(ids) - 1 : -1], strict=True):
                best, second = torch.topk(row, 2).values.tolist()
                assert token_id == int(row.argmax()) or best - second < TOLERANCE
