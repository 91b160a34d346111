"""llama.cpp's server with Q8_0 weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.peers.program import running
from benchmarks.serving.client import Answer, Ask, HttpSide
from tests.support.servers import free_port

_SLOT_TOKENS = 2048


class LlamaDialect:
    """`POST /completion` with token ids as the prompt.

    Args:
        adapters: How many the server has; one that is not switched off is applied.
    """

    def __init__(self, adapters: int) -> None:
        self._adapters = adapters

    def request(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        """Return path and body; see `Dialect`."""
        return "/completion", {
            "prompt": ask.prompt.token_ids,
            "n_predict": ask.new_tokens,
            "ignore_eos": True,
            # Greedy: at temperature 0 the usual chain of samplers still looks at every token.
            "samplers": ["top_k"],
            "top_k": 1,
            "lora": [
                {"id": number, "scale": float(number == ask.adapter)}
                for number in range(self._adapters)
            ],
            "cache_prompt": False,
            "stream": True,
        }

    def read(self, event: str, data: str) -> tuple[bool, tuple[int, int] | None]:
        """Read one event; see `Dialect`."""
        content = json.loads(data)
        if "error" in content:
            raise RuntimeError(data)
        if content.get("stop"):
            return False, (content["tokens_evaluated"], content["tokens_predicted"])
        return True, None


class LlamaSide:
    """The server without adapters and the one with them: loaded ones cost where none is asked for.

    Args:
        bare: Without adapters.
        tuned: With them.
    """

    name = "llama.cpp, Q8_0"

    def __init__(self, bare: HttpSide, tuned: HttpSide) -> None:
        self._bare = bare
        self._tuned = tuned

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Send all requests at once and return the answers."""
        without = all(ask.adapter is None for ask in asks)
        return (self._bare if without else self._tuned).run(asks)


@contextmanager
def llama_side(
    server: Path, gguf: Path, adapters: Sequence[Path], log: Path, *, rows: int
) -> Iterator[LlamaSide]:
    """Run both servers.

    Args:
        server: The program `llama-server`.
        gguf: The model's file.
        adapters: Files, in the order of their numbers.
        log: Where the servers write, with more to the name.
        rows: Answers side by side.
    """
    cores = str(os.cpu_count() or 1)
    argv = [
        *(str(server), "--host", "127.0.0.1", "--model", str(gguf)),
        *("--threads", cores, "--threads-batch", cores),
        *("--parallel", str(rows), "--ctx-size", str(rows * _SLOT_TOKENS)),
        *("--cache-ram", "0", "--no-webui", "--offline"),
    ]
    with ExitStack() as stack:
        sides = []
        for part in ([], list(adapters)):
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            more = ["--lora", ",".join(map(str, part))] if part else []
            path = log.with_name(f"{log.stem}-{len(part)}.log")
            stack.enter_context(running([*argv, "--port", str(port), *more], url, path))
            sides.append(HttpSide(LlamaSide.name, url, LlamaDialect(len(part))))
        yield LlamaSide(*sides)
