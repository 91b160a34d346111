"""A vLLM server on this machine's CPU, and an engine that speaks to it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

import httpx2

from core.inference.engine import BaseModelRef, Engine
from service.vllm_engine import VllmEngine
from service.vllm_engine_front import FrontProcess
from tests.support.engine_limits import MAX_ADAPTERS, MAX_WAITING
from tests.support.polling import wait_until

PYTHON = Path(os.environ.get("TUNESMITH_TEST_VLLM_PYTHON", "var/vllm/bin/python")).absolute()
API_KEY = "open-sesame"
MAX_RANK = 16
MAX_ROWS = 16

_ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
}

T = TypeVar("T")


class VllmProcess:
    """`vllm serve` on one port, with its log in a file.

    Args:
        log: Where its log is appended to.
    """

    def __init__(self, log: Path) -> None:
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._log = log
        self.address = f"vllm+http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, base: BaseModelRef) -> VllmProcess:
        """Serve a base model and return once it answers, which takes half a minute."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(PYTHON), "-m", "vllm.entrypoints.openai.api_server",
                    "--model", base.path, "--served-model-name", "model",
                    "--host", "127.0.0.1", "--port", str(self._port), "--api-key", API_KEY,
                    "--dtype", "float32", "--enforce-eager", "--generation-config", "vllm",
                    "--enable-lora", "--max-lora-rank", str(MAX_RANK),
                    "--max-loras", "4", "--max-cpu-loras", "8",
                    "--max-num-seqs", str(MAX_ROWS),
                    "--enable-prompt-tokens-details",
                    "--structured-outputs-config", '{"backend": "guidance"}',
                ],
                env={**os.environ, **_ENVIRONMENT},
                cwd=self._log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        wait_until(self._answers, 240, self._tail)
        return self

    def kill(self) -> None:
        """End it and its own children at once."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def forget(self, name: str) -> None:
        """Unload an adapter behind the engine's back."""
        response = httpx2.post(
            f"{self._url}/v1/unload_lora_adapter",
            json={"lora_name": name},
            headers={"Authorization": f"Bearer {API_KEY}"},
            trust_env=False,
        )
        assert response.is_success, response.text

    def count_running(self) -> int:
        """Return how many answers it computes at present."""
        metrics = httpx2.get(f"{self._url}/metrics", trust_env=False).text
        values = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", metrics, re.M)
        assert values, "it has no such metrics any more"
        return int(sum(map(float, values)))

    @property
    def _url(self) -> str:
        return self.address.removeprefix("vllm+")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._tail()
        with suppress(httpx2.HTTPError):
            return httpx2.get(f"{self._url}/health", trust_env=False).is_success
        return False

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]


class VllmHarness:
    """An engine on a vLLM server, in one event loop for all scenarios.

    Args:
        server: The server, running.
        locate_adapter: Where adapters' files are.
        neutral_root: Where adapters of zeros may be written.
        lacks: Test of the contract suite → why this engine cannot pass it.
        options: Of the engine, in place of what the contract suite wants.
    """

    def __init__(
        self,
        server: VllmProcess,
        locate_adapter: Callable[[str], Path],
        neutral_root: Path | None,
        *,
        lacks: Mapping[str, str] | None = None,
        **options: object,
    ) -> None:
        self.server = server
        self.lacks = dict(lacks or {})
        self._runner = asyncio.Runner()
        settings = {
            "api_key": API_KEY,
            "precision": "float32",
            "max_adapters": MAX_ADAPTERS,
            "max_rows": MAX_ROWS,
            "max_waiting": MAX_WAITING,
            **options,
        }

        self._front = FrontProcess()
        self._engine = VllmEngine(
            server.address,
            locate_adapter=locate_adapter,
            front=self._front,
            neutral_root=neutral_root,
            **settings,  # type: ignore[arg-type]
        )

    def run(self, scenario: Callable[[Engine], Awaitable[T]]) -> T:
        """Run a scenario against the engine."""

        async def main() -> T:
            return await asyncio.wait_for(scenario(self._engine), 240)

        return self._runner.run(main())

    def close(self) -> None:
        """Close the engine's connections and end its front."""

        async def main() -> None:
            await self._engine.aclose()
            await self._front.aclose()

        self._runner.run(main())
        self._runner.close()
