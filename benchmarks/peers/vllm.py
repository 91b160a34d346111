"""vLLM's build for CPUs, in float32, eager, with LoRA, as an OpenAI-compatible server."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.peers.program import running
from benchmarks.serving.adapters import RANK
from benchmarks.serving.client import Ask, HttpSide
from tests.support.servers import free_port

_BASE = "sample"
_CACHE_GIB = "2"
_CONTEXT_TOKENS = 2048


class VllmDialect:
    """`POST /v1/completions` with token ids as the prompt."""

    def request(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        """Return path and body; see `Dialect`."""
        return "/v1/completions", {
            "model": _BASE if ask.adapter is None else f"adapter-{ask.adapter}",
            "prompt": ask.prompt.token_ids,
            "max_tokens": ask.new_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def read(self, event: str, data: str) -> tuple[bool, tuple[int, int] | None]:
        """Read one event; see `Dialect`."""
        if data == "[DONE]":
            return False, None
        content = json.loads(data)
        if "error" in content:
            raise RuntimeError(data)
        if content["choices"]:
            return True, None
        usage = content["usage"]
        return False, (usage["prompt_tokens"], usage["completion_tokens"])


@contextmanager
def vllm_side(
    python: Path, model_dir: Path, adapters: Sequence[Path], log: Path, *, max_loras: int
) -> Iterator[HttpSide]:
    """Run the server with these adapters registered.

    Args:
        python: Interpreter of the environment that has vLLM.
        model_dir: The base model.
        adapters: Directories, in the order of their numbers.
        log: Where the server writes.
        max_loras: Adapters in one batch, and in its memory.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    named = [f"adapter-{number}={path}" for number, path in enumerate(adapters)]
    argv = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--model", str(model_dir), "--served-model-name", _BASE),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", str(_CONTEXT_TOKENS)),
        *("--no-enable-prefix-caching", "--disable-uvicorn-access-log"),
        *("--enable-lora", "--max-lora-rank", str(RANK)),
        *("--max-loras", str(max_loras), "--max-cpu-loras", str(max_loras)),
        *("--lora-modules", *named),
    ]
    with running(argv, url, log, _environment(python)):
        yield HttpSide("vLLM-CPU, float32, eager", url, VllmDialect())


def _environment(python: Path) -> Mapping[str, str]:
    cores = os.cpu_count() or 1
    return {
        # It compiles a kernel at its start, with programs of its environment.
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "VLLM_CPU_KVCACHE_SPACE": _CACHE_GIB,
        # By itself it would leave a core to its API process.
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
