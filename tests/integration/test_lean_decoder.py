"""The lean decoder against transformers, for each family and any mixture of adapters."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from core.causal_lm import linear_modules
from core.inference.gates import AdapterWeights, LoraMatrices
from core.inference.lean.linear import offered_precisions
from core.inference.lean.model import LeanModel
from core.inference.lean.panels import load_kernel
from core.inference.lean.weights import why_not_lean
from core.inference.rows import Row
from tests.support.rows import read_prompt

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
TOLERANCE = 1e-3
PATHS = ["native", "scripted", "eager"]


def llama(**more: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **more}))


FAMILIES = {
    "llama": llama,
    "llama_tied": lambda: llama(tie_word_embeddings=True),
    "llama_biased": lambda: llama(attention_bias=True, mlp_bias=True),
    # Not a multiple of the widest vectors, and more query heads than are computed together.
    "llama_odd_heads": lambda: llama(head_dim=24, num_attention_heads=8),
    "llama_stretched": lambda: llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}


def make_model(family: str) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        # Fresh norms and biases are ones and zeros, which would hide a mistake in folding them.
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
                assert name
    return model.float().eval()


def make_adapter(model: Any, number: int, rank: int, pattern: str = "") -> AdapterWeights:
    generator = torch.Generator().manual_seed(number)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    return AdapterWeights(
        digest=f"digest-{number}",
        r=rank,
        lora_alpha=2.0 * rank,
        use_rslora=number % 2 == 1,
        modules={
            name: LoraMatrices(matrix(rank, inputs), matrix(outputs, rank))
            for name, (outputs, inputs) in linear_modules(model).items()
            if pattern in name
        },
        template=None,
        golden_token_ids=[],
    )


def reference(model: Any, adapter: AdapterWeights | None, ids: list[int]) -> torch.Tensor:
    """Return the last position's logits by transformers with the adapter added by hooks."""
    hooks = []
    if adapter is not None:
        scale = adapter.lora_alpha / (adapter.r**0.5 if adapter.use_rslora else adapter.r)
        for name, module in model.named_modules():
            pair = adapter.modules.get(name)
            if pair is not None:
                hooks.append(
                    module.register_forward_hook(
                        lambda _, given, result, pair=pair: (
                            result + given[0] @ pair.a.T @ pair.b.T * scale
                        )
                    )
                )
    try:
        with torch.inference_mode():
            logits: torch.Tensor = model(torch.tensor([ids])).logits[0, -1]
        return logits
    finally:
        for hook in hooks:
            hook.remove()


class Texts:
    """Rows with what they should have been computed from, checked at every logit."""

    def __init__(self, model: Any, lean: LeanModel, adapters: list[AdapterWeights]) -> None:
        self.model, self.lean = model, lean
        self.adapters = {adapter.digest: adapter for adapter in adapters}
        self.ids: dict[Row, list[int]] = {}
        for adapter in adapters:
            assert lean.insert(adapter.digest, lean.prepare(adapter)) == set(adapter.modules)

    def open(self, adapter: str | None, prompt: list[int], piece: int = 512) -> Row:
        row = self.lean.open_row(adapter, prompt)
        self.ids[row] = list(prompt)
        self.check(row, read_prompt(self.lean, row, piece))
        return row

    def fork(self, row: Row) -> Row:
        twin = self.lean.fork(row)
        self.ids[twin] = list(self.ids[row])
        return twin

    def step(self, rows: list[Row], token_ids: list[int]) -> None:
        logits = self.lean.extend(rows, [[token_id] for token_id in token_ids])
        for row, token_id, own in zip(rows, token_ids, logits, strict=True):
            self.ids[row].append(token_id)
            self.check(row, own)

    def check(self, row: Row, logits: torch.Tensor) -> None:
        adapter = self.adapters[row.adapter] if row.adapter else None
        expected = reference(self.model, adapter, self.ids[row])
        assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("path", PATHS)
def test_rows_come_and_go_with_adapters_of_every_kind(family: str, path: Any) -> None:
    model = make_model(family)
    assert why_not_lean(model) is None
    adapters = [
        make_adapter(model, 0, 4),
        make_adapter(model, 1, 2, "q_proj"),
        make_adapter(model, 2, 7, "mlp"),
        make_adapter(model, 3, 1, "layers.1"),
        make_adapter(model, 4, 16, "o_proj"),
    ]
    texts = Texts(model, LeanModel(model, "float32", path=path), adapters)
    rng = random.Random(family)
    live: list[Row] = []
    for _ in range(25):
        if len(live) < 6:
            prompt = [rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 5, 40]))]
            digest = rng.choice([None, *texts.adapters])
            row = texts.open(digest, prompt, piece=rng.choice([3, 16, 512]))
            live.append(row)
            if rng.random() < 0.3:
                live.append(texts.fork(row))
        chosen = rng.sample(live, rng.randint(1, len(live)))
        texts.step(chosen, [rng.randrange(VOCABULARY) for _ in chosen])
        while len(live) > 4 and rng.random() < 0.7:
            texts.lean.close_row(live.pop(rng.randrange(len(live))))
    for row in live:
        texts.lean.close_row(row)
    assert texts.lean.cache_bytes == 0


@pytest.mark.parametrize("path", PATHS)
def test_prompts_are_read_beside_answers_that_grow(path: Any) -> None:
    model = make_model("qwen3")
    adapters = [make_adapter(model, 0, 4), make_adapter(model, 1, 9, "mlp")]
    texts = Texts(model, LeanModel(model, "float32", path=path), adapters)
    growing = [texts.open(digest, [1, 2, 3]) for digest in ("digest-0", None, "digest-1")]
    for number, digest in enumerate(["digest-1", None, "digest-0"]):
        prompt = [(5 * number + place) % VOCABULARY for place in range(40)]
        row = texts.lean.open_row(digest, prompt)
        texts.ids[row] = list(prompt)
        while not row.prefilled:
            rows = [*growing[:1], row, *growing[1:]]
            pieces = [[7], prompt[row.length : row.length + 13], *[[7] for _ in growing[1:]]]
            logits = texts.lean.extend(rows, pieces)
            for one, own in zip(rows, logits, strict=True):
                if one is not row:
                    texts.ids[one].append(7)
                if one is not row or row.prefilled:
                    texts.check(one, own)
        texts.lean.close_row(growing.pop(1))
        growing.append(row)


@pytest.mark.parametrize("rank", [1, 3, 8, 64, 256])
def test_ranks_of_every_size_and_the_same_adapter_for_all(rank: int) -> None:
    model = make_model("llama")
    texts = Texts(model, LeanModel(model, "float32"), [make_adapter(model, 0, rank)])
    rows = [texts.open("digest-0", [1, 2, number]) for number in range(4)]
    texts.step(rows, [5, 6, 7, 8])
    texts.step(rows[1:], [6, 7, 8])


def test_an_adapter_that_comes_back_under_its_name_is_not_confused_with_the_old_one() -> None:
    model = make_model("llama")
    first, second = make_adapter(model, 0, 4), make_adapter(model, 1, 4)
    texts = Texts(model, LeanModel(model, "float32"), [first, second])
    rows = [texts.open(digest, [1, 2]) for digest in texts.adapters]
    texts.step(rows, [3, 4])
    for row in rows:
        texts.lean.close_row(row)
    for digest in texts.adapters:
        texts.lean.remove(digest)
    for adapter in (second, first):
        texts.lean.insert(adapter.digest, texts.lean.prepare(adapter))
    again = [texts.open(digest, [1, 2]) for digest in texts.adapters]
    texts.step(again, [3, 4])


@pytest.mark.parametrize("path", PATHS)
def test_rows_never_take_more_than_was_foreseen_nor_keep_the_room_of_who_has_left(
    path: Any,
) -> None:
    model = make_model("llama")
    adapters = [make_adapter(model, 0, 4), make_adapter(model, 1, 16, "q_proj")]
    texts = Texts(model, LeanModel(model, "float32", path=path), adapters)
    lean = texts.lean
    rows = [
        texts.open(digest, [number, 2, 3])
        for number in range(3)
        for digest in (None, *texts.adapters)
    ]
    long = texts.open("digest-1", list(range(90)))
    texts.step([*rows, long], list(range(10)))
    before = lean.cache_bytes
    for row in rows[:8]:
        lean.close_row(row)
    # What is left stands behind, where rows have slots that they must leave for this.
    late = texts.open(None, [4, 5, *range(60)], piece=7)
    for token_id in range(45):
        texts.step([long, rows[8], late], [token_id, 2, 3])
    lengths = [len(texts.ids[row]) for row in (long, rows[8], late)]
    assert max(lengths) > 128
    assert lean.cache_bytes == lean.bytes_for(lengths, ()) < before
    for row in (long, rows[8], late):
        lean.close_row(row)
    assert lean.cache_bytes == 0


@pytest.mark.parametrize("length", [128, 200])
@pytest.mark.parametrize("path", PATHS)
def test_continuations_of_one_text_go_their_own_ways(path: Any, length: int) -> None:
    model = make_model("llama")
    texts = Texts(model, LeanModel(model, "float32", path=path), [make_adapter(model, 0, 4)])
    lean = texts.lean
    row = texts.open("digest-0", [number % VOCABULARY for number in range(length)])
    rows = [row, *(texts.fork(row) for _ in range(3))]
    for step in range(4):
        texts.step(rows, [7 * place + step for place in range(4)])
    if path == "native":
        # The full page of the text that they have in common is there once.
        assert lean.cache_bytes == lean.bytes_for([128] * (1 + 4), ())
    # Who leaves takes nothing away from the others.
    lean.close_row(rows.pop(0))
    late = texts.open(None, [1, 2, 3])
    texts.step([*rows, late], [5, 6, 7, 8])
    for one in (*rows, late):
        lean.close_row(one)
    assert lean.cache_bytes == 0


@pytest.mark.parametrize("path", PATHS)
def test_a_continuation_that_finds_no_memory_leaves_nothing_behind(
    path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*sizes: Any, **options: Any) -> torch.Tensor:
        raise MemoryError("no memory left")

    model = make_model("llama")
    texts = Texts(model, LeanModel(model, "float32", path=path), [make_adapter(model, 0, 4)])
    lean = texts.lean
    # Longer than a page, which the continuation would share.
    rows = [texts.open("digest-0", [number, *range(70), *range(70)]) for number in range(4)]
    before = lean.cache_bytes
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", refuse)
        patch.setattr(torch, "zeros", refuse)
        with pytest.raises(MemoryError):
            lean.fork(rows[0])
    assert lean.cache_bytes == before
    texts.step([*rows, texts.fork(rows[0])], [5, 6, 7, 8, 9])
    for row in texts.ids:
        lean.close_row(row)
    assert lean.cache_bytes == 0


@pytest.mark.parametrize("path", PATHS)
def test_what_one_row_has_computed_serves_another_of_the_same_text(path: Any) -> None:
    model = make_model("qwen3")
    texts = Texts(model, LeanModel(model, "float32", path=path), [make_adapter(model, 0, 4)])
    prompt = [number % VOCABULARY for number in range(300)]
    first = texts.open("digest-0", prompt)
    blocks = [texts.lean.read_cache(first, start, start + 96) for start in (0, 96, 192)]
    row = texts.lean.open_row("digest-0", prompt)
    # A piece of its own, then two blocks of which the first overlaps it, then the rest.
    texts.lean.extend([row], [prompt[:140]])
    texts.lean.write_cache(row, 96, blocks[1:])
    assert row.length == 288
    texts.ids[row] = list(prompt)
    texts.check(row, read_prompt(texts.lean, row))
    texts.step([row, first], [5, 6])


@pytest.mark.parametrize("precision", offered_precisions(torch.device("cpu")))
def test_a_rows_logits_do_not_depend_on_its_neighbours(precision: Any) -> None:
    model = make_model("llama")
    lean = LeanModel(model, precision)
    adapters = [make_adapter(model, number, 4) for number in range(3)]
    for adapter in adapters:
        lean.insert(adapter.digest, lean.prepare(adapter))

    def logits(neighbours: int) -> torch.Tensor:
        digests = ["digest-0", None, "digest-1", "digest-2", "digest-0"][: neighbours + 1]
        rows = [lean.open_row(digest, [9, 8, 7 + i]) for i, digest in enumerate(digests)]
        for row in rows:
            read_prompt(lean, row)
        result = lean.extend(rows, [[3]] * len(rows))[0]
        for row in rows:
            lean.close_row(row)
        return result

    alone = logits(0)
    scale = alone.abs().max()
    for neighbours in (1, 2, 4):
        assert (logits(neighbours) - alone).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("precision", offered_precisions(torch.device("cpu")))
def test_the_kernel_computes_a_row_to_the_same_bit_whatever_is_beside_it(precision: Any) -> None:
    model = make_model("llama")
    lean = LeanModel(model, precision, path="native")
    for adapter in [make_adapter(model, number, 3 * number + 1) for number in range(4)]:
        lean.insert(adapter.digest, lean.prepare(adapter))
    prompt = [number % VOCABULARY for number in range(45)]

    def logits(neighbours: int, piece: int) -> list[torch.Tensor]:
        row = lean.open_row("digest-2", prompt)
        others = [
            lean.open_row(digest, [number, *range(4 * number)])
            for number, digest in enumerate(["digest-2", None, "digest-0", "digest-3"] * 5)
        ][:neighbours]
        seen = []
        while not row.prefilled:
            # The others' prompts are read beside ours, and then their answers grow.
            pieces = [row.prompt_ids[row.length : row.length + piece]]
            pieces += [[3] if other.prefilled else other.prompt_ids for other in others]
            seen = [lean.extend([row, *others], pieces)[0]]
        seen.append(lean.extend([*others, row], [[5]] * (len(others) + 1))[-1])
        for one in (row, *others):
            lean.close_row(one)
        return seen

    alone = logits(0, 45)
    for neighbours, piece in ((0, 7), (1, 45), (5, 16), (20, 9)):
        for own, expected in zip(logits(neighbours, piece), alone, strict=True):
            assert torch.equal(own, expected)


@pytest.fixture
def others_want_the_processors() -> Iterator[None]:
    """Programs that compute for a moment again and again, and one that never stops."""
    burst = "while True:\n sum(range(9_000))\n time.sleep(0.001)"
    endless = "while True: pass"
    programs = [
        subprocess.Popen([sys.executable, "-c", f"import time\n{code}"])
        for code in (burst, burst, endless)
    ]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


@pytest.mark.usefixtures("others_want_the_processors")
@pytest.mark.parametrize("threads", [2, 3, 6])
def test_the_kernel_computes_the_same_bits_when_its_threads_are_held_up(threads: int) -> None:
    model = llama(hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    adapters = [make_adapter(model, number, 8) for number in range(3)]
    digests = [None, *(adapter.digest for adapter in adapters)]

    def logits(threads: int) -> Iterator[torch.Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            lean = LeanModel(model, "float32", path="native")
        finally:
            torch.set_num_threads(before)
        for adapter in adapters:
            lean.insert(adapter.digest, lean.prepare(adapter))
        rows = [lean.open_row(digest, [3, 1, 4]) for digest in digests]
        yield lean.extend(rows, [row.prompt_ids for row in rows])
        for number in range(300):
            yield lean.extend(rows, [[(number + row) % VOCABULARY] for row in range(len(rows))])

    for alone, together in zip(logits(1), logits(threads), strict=True):
        assert torch.equal(alone, together)


@pytest.mark.parametrize("precision", offered_precisions(torch.device("cpu")))
@pytest.mark.parametrize("family", ["llama", "llama_biased", "llama_odd_heads", "qwen3"])
def test_the_kernel_computes_the_same_bits_with_vectors_of_either_width(
    family: str, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = load_kernel()
    if library is None or library.tunesmith_vector_bits() < 512:
        pytest.skip("this processor has vectors of one width")
    model = make_model(family)
    adapters = [make_adapter(model, number, 5 * number + 1) for number in range(3)]

    def logits(bits: int) -> list[torch.Tensor]:
        monkeypatch.setattr(library, "tunesmith_vector_bits", lambda: bits)
        lean = LeanModel(model, precision, path="native")
        for adapter in adapters:
            lean.insert(adapter.digest, lean.prepare(adapter))
        found = []
        for count in range(1, 20):
            digests = [None, *(adapter.digest for adapter in adapters)] * count
            # Of one page of the cache, and of several.
            prompt = [number % VOCABULARY for number in range(count**2)]
            rows = [lean.open_row(digest, prompt) for digest in digests[:count]]
            found.append(lean.extend(rows, [row.prompt_ids for row in rows]))
            found.append(lean.extend(rows, [[number] for number in range(count)]))
            for row in rows:
                lean.close_row(row)
        return found

    for narrow, wide in zip(logits(256), logits(512), strict=True):
        assert torch.equal(narrow, wide)


def test_half_precision_weights_are_nearly_lossless() -> None:
    if "fp16" not in offered_precisions(torch.device("cpu")):
        pytest.skip("this processor has no packed float16 product")
    model = make_model("llama")
    lean = LeanModel(model, "fp16")
    prompt = [random.Random(1).randrange(VOCABULARY) for _ in range(60)]
    exact = torch.log_softmax(model(torch.tensor([prompt])).logits[0], -1)
    near = torch.log_softmax(lean.logits_of(None, prompt), -1)
    assert (exact.exp() * (exact - near)).sum(-1).mean() < 1e-4


def test_what_the_decoder_cannot_compute_is_named() -> None:
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9))
    assert "Llama family" in (why_not_lean(gpt) or "")
    assert "window" in (
        why_not_lean(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=32))) or ""
    )
    assert "activation" in (why_not_lean(llama(hidden_act="gelu")) or "")
