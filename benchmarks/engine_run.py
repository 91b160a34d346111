"""The engine without API and HTTP around it, in a process of its own.

`python -m benchmarks.engine_run MODEL ADAPTER…` says in a line of JSON when it is ready; then it
reads a line for every batch of requests and answers with their `Answer`s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.data.quiet import silence_libraries, spin_briefly

# As the engine's process does, before anything imports torch.
if __name__ == "__main__":
    spin_briefly()
    silence_libraries()

import uvloop

from benchmarks.serving.client import Answer
from core.artifacts import read_manifest
from core.inference.engine import (
    AdapterRef,
    BaseModelRef,
    Delta,
    Done,
    GenerateRequest,
    SamplingParams,
    Started,
)
from core.inference.local_engine import LocalEngine
from core.inference.model_runner import ModelRunner
from tests.support.adapters import base_ref


async def _answer(
    engine: LocalEngine,
    base: BaseModelRef,
    adapter: str | None,
    messages: list[dict[str, Any]],
    new_tokens: int,
) -> Answer:
    request = GenerateRequest.model_validate(
        {
            "request_id": "gen-1",
            "project_id": "benchmark",
            "base_model": base,
            "adapter": AdapterRef(digest=adapter) if adapter else None,
            "messages": messages,
            "sampling": SamplingParams(max_new_tokens=new_tokens, min_new_tokens=new_tokens),
        }
    )
    sent, times, prompt_tokens, tokens = time.monotonic(), [], 0, 0
    async for event in await engine.generate(request):
        match event:
            case Started():
                prompt_tokens = event.prompt_tokens
            case Delta():
                times.append(time.monotonic())
            case Done():
                tokens = event.completion_tokens
    if tokens != new_tokens:
        raise RuntimeError(f"{tokens} tokens instead of {new_tokens}")
    return Answer(sent, times, tokens, prompt_tokens)


async def _answer_lines(model_dir: Path, adapters: Sequence[Path]) -> None:
    """Answer line by line until the input ends."""
    digests = [read_manifest(path).digest for path in adapters]
    where = dict(zip(digests, adapters, strict=True))
    base = base_ref(model_dir)
    # What is logged must not come between the answers.
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        engine = LocalEngine(lambda: ModelRunner("cpu"), where.__getitem__).start()
        await asyncio.to_thread(engine.ready.wait)
        print(json.dumps("ready"), file=answers, flush=True)
        # Nothing else runs while there are no requests: reading may hold the loop up.
        for line in sys.stdin:
            asked = [
                _answer(engine, base, None if adapter is None else digests[adapter], *rest)
                for adapter, *rest in json.loads(line)
            ]
            found = [asdict(answer) for answer in await asyncio.gather(*asked)]
            print(json.dumps(found), file=answers, flush=True)
        engine.stop()


if __name__ == "__main__":
    uvloop.run(_answer_lines(Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]]))
