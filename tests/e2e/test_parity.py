"""What `/generate` computes is what transformers + PEFT compute from the downloaded directory."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from core.data.rendering import render_prompt
from core.data.tokenizer import load_tokenizer
from tests.support.service import RunningService, chat_rows

TOLERANCE = 1e-3
QUESTIONS = ["What is the code of item 3?", "Name the capital of France.", "Write one short line."]

pytestmark = [
    pytest.mark.long,
    pytest.mark.sample_model,
    # PEFT asks under a name that transformers is giving up.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, sample_model_path: Path
) -> Iterator[RunningService]:
    root = tmp_path_factory.mktemp("parity")
    threads = {"OMP_NUM_THREADS": "2", "TUNESMITH_ENGINE_THREADS": "0"}
    threads["TUNESMITH_ENGINE_PRECISION"] = "float32"
    threads["TUNESMITH_TRAINER_THREADS"] = "0"
    running = RunningService(root / "data", {"sample": sample_model_path}, threads)
    try:
        yield running
        assert running.stop() == 0
    finally:
        running.kill_everything()


@pytest.fixture(scope="module")
def adapter_directory(service: RunningService, tmp_path_factory: pytest.TempPathFactory) -> Path:
    job = service.submit(
        {
            "base_model": "sample",
            "adapter": "codes",
            "rows": chat_rows(8),
            "lora": {"r": 8},
            "training": {"max_steps": 2, "batch_size": 1, "learning_rate": 1e-3},
            "evaluation": {"samples": 0},
        }
    )
    ended = service.finish(job["id"], 240)
    assert ended["status"] == "succeeded", ended
    archive = service.client.get("/adapters/codes/versions/1/download").content
    target = tmp_path_factory.mktemp("download")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(target, filter="data")
    (directory,) = target.iterdir()
    return directory


@pytest.fixture(scope="module")
def reference(sample_model_path: Path, adapter_directory: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(sample_model_path, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter_directory).eval()


@pytest.mark.parametrize("adapter", [None, "codes"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_log_probabilities_and_greedy_tokens_agree(
    service: RunningService,
    reference: Any,
    adapter_directory: Path,
    adapter: str | None,
    question: str,
) -> None:
    messages = [{"role": "user", "content": question}]
    answer = service.client.post(
        "/generate",
        params={"adapter": adapter} if adapter else {},
        json={"messages": messages, "max_new_tokens": 16, "logprobs": 5},
    ).json()
    entries = answer["choices"][0]["logprobs"]
    generated = [entry["token_id"] for entry in entries]

    tokenizer = load_tokenizer(adapter_directory)
    prompt = render_prompt(messages, tokenizer).ids
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    with torch.inference_mode():
        ids = torch.tensor([prompt + generated])
        if adapter:
            logits = reference(ids).logits[0]
        else:
            with reference.disable_adapter():
                logits = reference(ids).logits[0]
    expected = torch.log_softmax(logits[len(prompt) - 1 : -1].double(), dim=-1)

    assert len(entries) == answer["usage"]["completion_tokens"] > 0
    for position, entry in enumerate(entries):
        row = expected[position]
        assert abs(entry["logprob"] - row[entry["token_id"]].item()) < TOLERANCE
        for token_id, _, logprob in entry["top"]:
            assert abs(logprob - row[token_id].item()) < TOLERANCE
        best, second = torch.topk(row, 2).values.tolist()
        if best - second > TOLERANCE:
            assert entry["token_id"] == int(row.argmax())


def test_the_adapter_moves_the_reference_too(reference: Any) -> None:
    """The comparison above means something only if base and adapter differ."""
    ids = torch.tensor([[1, 20, 300, 4000]])
    with torch.inference_mode():
        tuned = reference(ids).logits
        with reference.disable_adapter():
            base = reference(ids).logits
    assert (tuned - base).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("adapter", [None, "codes"])
def test_a_stream_shows_whole_characters_and_ends_with_the_usage(
    service: RunningService, adapter: str | None
) -> None:
    body = {
        "prompt": "Draw",
        "max_new_tokens": 80,
        "temperature": 1.5,
        "seed": 3,
        "stream": True,
        "response_format": {"type": "regex", "regex": "(🚀|é|漢){5}"},
    }
    params = {"adapter": adapter} if adapter else {}
    with service.client.stream("POST", "/generate", params=params, json=body) as answer:
        assert answer.status_code == 200, answer.read()
        content = b"".join(answer.iter_bytes())
    events = []
    for block in content.decode("utf-8", errors="strict").strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        events.append((fields["event"], json.loads(fields["data"])))
    *deltas, (last, done) = events
    assert {kind for kind, _ in deltas} == {"delta"}
    texts = [data["text"] for _, data in deltas]
    assert len(texts) > 1
    assert not any("\ufffd" in text for text in texts)
    assert re.fullmatch("(🚀|é|漢){5}", "".join(texts))
    assert last == "done"
    # Each of these characters takes several tokens, and the end is one, too.
    assert done["usage"]["completion_tokens"] > len(texts)
    assert done["usage"]["total_tokens"] == (
        done["usage"]["prompt_tokens"] + done["usage"]["completion_tokens"]
    )
