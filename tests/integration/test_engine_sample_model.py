"""The pretrained sample model with eight adapters in the engine, in every precision on offer.

The reference is transformers with PEFT in float32. `test_engine_parity.py` has tiny random models
of every family.
"""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from core.artifacts import read_manifest
from core.data.rendering import render_prompt
from core.inference.engine import AdapterRef, BaseModelRef, Engine, GenerateRequest, Message
from core.inference.lean.linear import offered_precisions
from core.inference.local_engine import LocalEngine
from core.inference.model_runner import ModelRunner
from core.storage import LocalStore
from tests.support.adapters import ALL_LINEAR, AdapterMaker, base_ref
from tests.support.engine_world import Collected, collect, make_request
from tests.support.sample_model import sample_model_directory

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-3
MOST_DIVERGENCE = 1e-4
NEW_TOKENS = 8
ATTENTION, UNIT = ALL_LINEAR[:4], ALL_LINEAR[4:]
# Rank, modules and whether the scale is divided by the rank's square root.
KINDS: list[tuple[int, Sequence[str], bool]] = [
    (1, ALL_LINEAR, False),
    (2, ("q_proj", "v_proj"), True),
    (4, UNIT, False),
    (8, ATTENTION, True),
    (16, ALL_LINEAR, False),
    (16, ALL_LINEAR, True),
    (32, ("down_proj", "o_proj"), False),
    (64, ALL_LINEAR, False),
]
QUESTIONS = (
    "What port should I open in my firewall?",
    "Name the capital of France, and then say in two long sentences what the city is known for.",
)

pytestmark = [
    pytest.mark.sample_model,
    # PEFT asks under a name that transformers is giving up.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]


@dataclass
class Case:
    """The model with its adapters, and what transformers and PEFT make of them."""

    base: BaseModelRef
    store: LocalStore
    adapters: list[str]
    tuned: Any
    tokenizer: Any
    known: dict[tuple[str | None, tuple[int, ...]], torch.Tensor] = field(default_factory=dict)

    def expected(self, adapter: str | None, ids: Sequence[int]) -> torch.Tensor:
        """Return the reference's logits of every position, (tokens, vocabulary)."""
        key = (adapter, tuple(ids))
        if key not in self.known:
            self.known[key] = self._compute(adapter, torch.tensor([list(ids)]))
        return self.known[key]

    def _compute(self, adapter: str | None, tokens: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            if adapter is None:
                with self.tuned.disable_adapter():
                    logits: torch.Tensor = self.tuned(tokens, use_cache=False).logits[0]
            else:
                self.tuned.set_adapter(adapter)
                logits = self.tuned(tokens, use_cache=False).logits[0]
        return logits

    def example_text(self, tokens: int) -> list[int]:
        """Return so many tokens of the conversations in `examples/`."""
        lines = (ROOT / "examples/support_desk/train.jsonl").read_text("utf-8").splitlines()
        text = "\n".join(turn["content"] for line in lines for turn in json.loads(line)["messages"])
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root, model_dir = tmp_path_factory.mktemp("sample"), sample_model_directory()
    store = LocalStore(root / "data")
    maker = AdapterMaker(model_dir)
    paths = []
    for number, (rank, targets, use_rslora) in enumerate(KINDS):
        path = maker.make(
            root / f"adapter-{number}",
            r=rank,
            targets=targets,
            seed=number,
            # Each of them changes the weights by as much.
            scale=(1e-2 / (rank if use_rslora else rank**0.5)) ** 0.5,
            use_rslora=use_rslora,
        )
        store.publish_adapter(path)
        paths.append(path)
    adapters = [read_manifest(path).digest for path in paths]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        tuned: Any = PeftModel.from_pretrained(maker.model, paths[0], adapter_name=adapters[0])
        for path, digest in zip(paths[1:], adapters[1:], strict=True):
            tuned.load_adapter(path, adapter_name=digest)
    return Case(base_ref(model_dir), store, adapters, tuned.eval(), maker.tokenizer)


@dataclass
class Running:
    """An engine in one precision."""

    precision: str
    engine: LocalEngine
    runner: ModelRunner

    def run(self, requests: Sequence[GenerateRequest], *, together: bool) -> list[Collected]:
        """Return the answers, computed one after the other or at the same time."""

        async def scenario(engine: Engine) -> list[Collected]:
            if together:
                return list(await asyncio.gather(*(collect(engine, one) for one in requests)))
            return [await collect(engine, request) for request in requests]

        return asyncio.run(scenario(self.engine))


@pytest.fixture(scope="module", params=offered_precisions(torch.device("cpu")))
def running(case: Case, request: pytest.FixtureRequest) -> Iterator[Running]:
    runner = ModelRunner("cpu", threads=1, precision=request.param)
    engine = LocalEngine(lambda: runner, case.store.adapter_path, max_adapters=len(KINDS)).start()
    assert engine.ready.wait(60)
    yield Running(request.param, engine, runner)
    engine.stop()


@pytest.fixture(scope="module")
def requests(case: Case) -> list[GenerateRequest]:
    """The base model and each adapter, with a short and a longer prompt in turn."""
    asked = [None, *(AdapterRef(digest=digest) for digest in case.adapters)]
    return [
        make_request(
            case.base,
            adapter,
            messages=[Message(role="user", content=QUESTIONS[number % 2])],
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            logprobs=20,
        )
        for number, adapter in enumerate(asked)
    ]


@pytest.fixture(scope="module")
def alone(running: Running, requests: list[GenerateRequest]) -> list[Collected]:
    return running.run(requests, together=False)


def _prompt(case: Case, request: GenerateRequest) -> list[int]:
    messages = [message.model_dump() for message in request.messages or ()]
    return list(render_prompt(messages, case.tokenizer).ids)


def _check(case: Case, request: GenerateRequest, answer: Collected, tolerance: float) -> None:
    """Compare an answer's reported probabilities and its tokens with the reference."""
    prompt, tokens = _prompt(case, request), answer.token_ids
    adapter = request.adapter.digest if request.adapter else None
    assert answer.started.adapter_digest == adapter
    logits = case.expected(adapter, [*prompt, *tokens])[len(prompt) - 1 : -1]
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    assert len(tokens) == NEW_TOKENS
    ends = torch.tensor([case.tokenizer.eos_token_id])
    for entry, row in zip(answer.logprobs[0], logprobs, strict=True):
        for token_id, _, logprob in [*entry.top, (entry.token_id, "", entry.logprob)]:
            assert abs(logprob - row[token_id].item()) < tolerance
        best, second = torch.topk(row.index_fill(0, ends, float("-inf")), 2).values.tolist()
        if best - second > tolerance:
            assert entry.token_id == int(row.index_fill(0, ends, float("-inf")).argmax())


def _tolerance(running: Running) -> float:
    # What half-precision weights may move a logit by; on average it is the divergence, below.
    return TOLERANCE if running.precision == "float32" else 0.1


def test_every_answer_names_the_precision_that_computed_it(
    running: Running, alone: list[Collected]
) -> None:
    assert {answer.started.precision for answer in alone} == {running.precision}


def test_each_adapter_alone_answers_as_transformers_and_peft_do(
    case: Case, running: Running, requests: list[GenerateRequest], alone: list[Collected]
) -> None:
    assert len({tuple(answer.token_ids) for answer in alone}) == len(alone)
    for request, answer in zip(requests, alone, strict=True):
        _check(case, request, answer, _tolerance(running))


def test_all_adapters_in_one_batch_answer_as_transformers_and_peft_do(
    case: Case, running: Running, requests: list[GenerateRequest], alone: list[Collected]
) -> None:
    answers = running.run(requests, together=True)
    for request, answer in zip(requests, answers, strict=True):
        _check(case, request, answer, _tolerance(running))
    for one, other in zip(alone, answers, strict=True):
        _check_alike(one, other)


def test_a_row_answers_as_before_beside_others_and_after_its_adapter_has_come_back(
    case: Case, running: Running, requests: list[GenerateRequest], alone: list[Collected]
) -> None:
    """One scale of the activations for a whole batch would move these by far more."""

    async def unload(engine: Engine) -> None:
        for digest in case.adapters:
            assert await engine.unload(digest) > 0

    asyncio.run(unload(running.engine))
    company = [*requests, *requests[1:8]]
    for request, answer in zip(company, running.run(company, together=True), strict=True):
        _check_alike(alone[requests.index(request)], answer)


def _check_alike(one: Collected, other: Collected) -> None:
    """Compare two answers to the same request, up to where rounding decides about a token."""
    for mine, yours in zip(one.logprobs[0], other.logprobs[0], strict=True):
        own = {token_id: logprob for token_id, _, logprob in mine.top}
        for token_id, _, logprob in yours.top:
            # The last of the twenty may change places with the next.
            if token_id in own:
                assert abs(own[token_id] - logprob) < TOLERANCE
        if mine.token_id != yours.token_id:
            assert abs(own[mine.token_id] - own[yours.token_id]) < TOLERANCE
            return


def test_what_the_precision_costs_on_the_text_of_the_examples(case: Case, running: Running) -> None:
    # The engine is idle, so this thread may use its model.
    rows = running.runner.bases[case.base.digest].rows
    ids = case.example_text(256)
    for adapter in (None, case.adapters[4]):
        logits = rows.logits_of(adapter, ids)
        exact = case.expected(adapter, ids)
        if running.precision == "float32":
            assert (logits - exact).abs().max() < TOLERANCE
        near = torch.log_softmax(logits.double(), -1)
        true = torch.log_softmax(exact.double(), -1)
        divergence = (true.exp() * (true - near)).sum(-1).mean()
        assert divergence < MOST_DIVERGENCE
