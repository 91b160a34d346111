"""A vLLM server keeps the engine contract, but for what is listed here with its reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.engine_contract import EngineContract
from tests.support.engine_world import World
from tests.vllm.server import VllmHarness, VllmProcess

LACKS = {
    "test_a_model_without_a_template_reads_messages_as_chatml": (
        "a vLLM server has one base model, and this test asks for a second one"
    ),
}


@pytest.fixture(scope="module")
def harness(server: VllmProcess, world: World) -> Iterator[VllmHarness]:
    harness = VllmHarness(server, world.locate_adapter, world.root / "neutral", lacks=LACKS)
    yield harness
    harness.close()


class TestVllmEngine(EngineContract):
    @pytest.fixture(autouse=True)
    def _skip_what_it_lacks(self, request: pytest.FixtureRequest, harness: VllmHarness) -> None:
        reason = harness.lacks.get(request.node.originalname)
        if reason is not None:
            pytest.skip(reason)

    def test_what_it_lacks_is_in_the_contract(self) -> None:
        assert {name for name in LACKS if not hasattr(EngineContract, name)} == set()
