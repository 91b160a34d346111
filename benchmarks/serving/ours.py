"""The side that is ours: a whole service, asked over HTTP as its users do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.serving.adapters import pack
from benchmarks.serving.client import Ask, HttpSide
from tests.support.service import RunningService

BASE = "sample"
# Names of our sides begin so, and go on with their precision.
OURS = "ours, "
# As many threads as torch takes by itself, where tests take one.
_ALL_CORES = {
    "TUNESMITH_ENGINE_THREADS": "0",
    "TUNESMITH_TRAINER_THREADS": "0",
    "OMP_NUM_THREADS": str(os.cpu_count()),
}


class OurDialect:
    """`POST /generate` with `stream`."""

    def request(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        """Return path and body; see `Dialect`."""
        path = "/generate" if ask.adapter is None else f"/generate?adapter={name_of(ask.adapter)}"
        return path, {
            "base_model": BASE,
            "messages": ask.prompt.messages,
            "max_new_tokens": ask.new_tokens,
            "min_new_tokens": ask.new_tokens,
            "stream": True,
        }

    def read(self, event: str, data: str) -> tuple[bool, tuple[int, int] | None]:
        """Read one event; see `Dialect`."""
        if event == "delta":
            return True, None
        if event == "error":
            raise RuntimeError(data)
        usage = json.loads(data)["usage"]
        return False, (usage["prompt_tokens"], usage["completion_tokens"])


def name_of(adapter: int) -> str:
    """Return the name under which an adapter is registered."""
    return f"adapter-{adapter}"


class OurSide(HttpSide):
    """A running service with adapters.

    Args:
        service: The service.
    """

    def __init__(self, service: RunningService) -> None:
        super().__init__(OURS, str(service.client.base_url), OurDialect())
        self.service = service

    def take_in(self, adapters: Sequence[Path]) -> None:
        """Import adapters under their numbers, which loads the base model."""
        for number, path in enumerate(adapters):
            answer = self.service.client.post(
                "/adapters/import",
                params={"name": name_of(number), "base_model": BASE},
                files={"file": ("adapter.tar.gz", pack(path), "application/gzip")},
            )
            if answer.status_code >= 400:
                raise RuntimeError(answer.text)
        self.name = f"{OURS}{self.precision}"

    @property
    def precision(self) -> str:
        """How the weights of the base model in memory are kept."""
        (precision,) = set(self.engine["precision"].values())
        return str(precision)

    @property
    def engine(self) -> dict[str, Any]:
        """What `GET /engine` says."""
        answer = self.service.client.get("/engine")
        answer.raise_for_status()
        return dict(answer.json())


@contextmanager
def our_side(
    root: Path,
    model_dir: Path,
    adapters: Sequence[Path],
    settings: Mapping[str, str] | None = None,
) -> Iterator[OurSide]:
    """Run a service with these adapters.

    Args:
        root: A new directory of its own.
        model_dir: The base model.
        adapters: Directories, in the order of their numbers.
        settings: Environment variables.
    """
    root.mkdir()
    service = RunningService(root / "data", {BASE: model_dir}, {**_ALL_CORES, **(settings or {})})
    try:
        side = OurSide(service)
        side.take_in(adapters)
        yield side
    except RuntimeError as error:
        error.add_note(service.log.read_text()[-5000:])
        raise
    finally:
        service.stop()
