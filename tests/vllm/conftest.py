from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.engine_world import World
from tests.vllm.server import PYTHON, VllmProcess


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    # 32 numbers a head are the least that its kernels for CPUs compute.
    return World(tmp_path_factory.mktemp("world"), num_attention_heads=2)


@pytest.fixture(scope="session")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    assert PYTHON.exists(), f"there is no {PYTHON}: `make test-vllm` makes it"
    process = VllmProcess(tmp_path_factory.mktemp("vllm") / "server.log")
    try:
        yield process.start(world.base)
    finally:
        process.kill()
