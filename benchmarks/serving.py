"""Generation over HTTP beside transformers + PEFT in this process: same model, same prompts."""

from __future__ import annotations

import io
import statistics
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Measurement
from core.data.rendering import render_prompt
from core.data.tokenizer import load_tokenizer
from tests.support.adapters import make_adapter
from tests.support.service import RunningService, chat_rows

NEW_TOKENS = 48
_ADAPTERS = 8
_STATUS = "job status, p99, while 8 answers are computed"
QUESTIONS = [
    f"Please explain in plain words how {thing} works and what it is used for in daily life."
    for thing in ("a kettle", "a lock", "a sail", "a clock", "a pump", "a kite", "a bell", "a jar")
]


def measure(model_dir: Path, rounds: int) -> list[Measurement]:
    """Run all measurements of serving."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        adapters = {
            f"adapter-{number}": make_adapter(
                root / f"adapter-{number}", model_dir, r=16, scale=0.01, seed=number
            )
            for number in range(_ADAPTERS)
        }
        threads = {"TUNESMITH_ENGINE_THREADS": "0", "OMP_NUM_THREADS": str(torch.get_num_threads())}
        service = RunningService(root / "data", {"sample": model_dir}, threads)
        try:
            return _measure(service, model_dir, adapters, rounds)
        finally:
            service.stop()


def _measure(
    service: RunningService, model_dir: Path, adapters: dict[str, Path], rounds: int
) -> list[Measurement]:
    for name, path in adapters.items():
        _import(service, path, name)
    reference = _Reference(model_dir, adapters)
    names = list(adapters)
    ours: dict[str, list[float]] = {}
    peer: dict[str, list[float]] = {}

    def take(work: str, our: float, its: float | None) -> None:
        ours.setdefault(work, []).append(our)
        if its is not None:
            peer.setdefault(work, []).append(its)

    _generate(service, [None])
    for name in names:
        _generate(service, [name])
    works: dict[str, list[str | None]] = {
        "1 at a time, base": [None],
        "1 at a time, an adapter": names[:1],
        "8 at a time, base": [None] * 8,
        "8 at a time, one adapter": names[:1] * 8,
        "8 at a time, 8 adapters": list(names),
        "16 at a time, 8 adapters": names * 2,
    }
    for _ in range(rounds):
        for work, asked in works.items():
            take(work, _generate(service, asked), reference.generate(asked))
        take(_STATUS, _status_p99(service), None)
    return [
        Measurement(
            work,
            "ms" if work == _STATUS else "tokens/s",
            samples,
            peer.get(work, []),
            "transformers + PEFT, float32, static batch" if work in peer else "",
        )
        for work, samples in ours.items()
    ]


def _questions(count: int) -> list[str]:
    return [QUESTIONS[number % len(QUESTIONS)] for number in range(count)]


def _import(service: RunningService, adapter: Path, name: str) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for path in sorted(adapter.iterdir()):
            tar.add(path, path.name)
    answer = service.client.post(
        "/adapters/import",
        params={"name": name, "base_model": "sample"},
        files={"file": ("adapter.tar.gz", archive.getvalue(), "application/gzip")},
    )
    answer.raise_for_status()


def _body(question: str) -> dict[str, Any]:
    return {
        "base_model": "sample",
        "messages": [{"role": "user", "content": question}],
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
    }


def _generate(service: RunningService, adapters: list[str | None]) -> float:
    """Return the tokens per second of all requests together, sent at once."""

    def ask(question: str, adapter: str | None) -> int:
        params = {"adapter": adapter} if adapter else {}
        answer = service.client.post("/generate", params=params, json=_body(question))
        answer.raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])

    with ThreadPoolExecutor(len(adapters)) as pool:
        started = time.monotonic()
        tokens = sum(pool.map(ask, _questions(len(adapters)), adapters))
        return tokens / (time.monotonic() - started)


def _status_p99(service: RunningService) -> float:
    """Return the 99th percentile, in milliseconds, of 200 status calls beside 8 answers."""
    job = service.submit(
        {
            "base_model": "sample",
            "rows": chat_rows(2),
            "training": {"max_steps": 1},
            "evaluation": {"samples": 0},
        }
    )
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(_generate, service, [f"adapter-{i}" for i in range(_ADAPTERS)])
        samples = []
        while len(samples) < 200 and not load.done():
            started = time.monotonic()
            service.job(job["id"])
            samples.append((time.monotonic() - started) * 1000)
            # Paced, so that the calls do not become the load themselves.
            time.sleep(0.02)
        load.result()
    service.finish(job["id"])
    return statistics.quantiles(samples, n=100)[98]


class _Reference:
    """transformers and PEFT as a user would call them, a mixed batch by its `adapter_names`."""

    def __init__(self, model_dir: Path, adapters: dict[str, Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self._tokenizer = load_tokenizer(model_dir)
        self._tokenizer.padding_side = "left"
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        (first, path), *others = adapters.items()
        self._model = PeftModel.from_pretrained(base, path, adapter_name=first)
        for name, path in others:
            self._model.load_adapter(path, name)
        self._model.eval()

    def generate(self, adapters: list[str | None]) -> float:
        prompts = [
            render_prompt([{"role": "user", "content": question}], self._tokenizer).text
            for question in _questions(len(adapters))
        ]
        batch = self._tokenizer(
            prompts, return_tensors="pt", padding=True, add_special_tokens=False
        )
        arguments = {"do_sample": False, "pad_token_id": self._tokenizer.pad_token_id}
        arguments |= {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        started = time.monotonic()
        with torch.inference_mode():
            if adapters[0] is None:
                with self._model.disable_adapter():
                    self._model.generate(**batch, **arguments)
            elif len(set(adapters)) == 1:
                self._model.set_adapter(adapters[0])
                self._model.generate(**batch, **arguments)
            else:
                self._model.generate(**batch, **arguments, adapter_names=adapters)
        return len(adapters) * NEW_TOKENS / (time.monotonic() - started)
