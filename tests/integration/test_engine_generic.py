"""The engine on a model outside the Llama family, which transformers and PEFT compute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.inference.peft_rows import PeftRows
from core.inference.transformers_runner import TransformersRunner
from tests.support.engine_contract import EngineContract
from tests.support.engine_harness import LocalHarness, base_does_not_change
from tests.support.engine_world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("generic"), hidden_act="gelu")


@pytest.fixture(scope="module")
def runners() -> list[TransformersRunner]:
    return []


@pytest.fixture(scope="module")
def harness(world: World, runners: list[TransformersRunner]) -> Iterator[LocalHarness]:
    harness = LocalHarness(world, runners)
    yield harness
    harness.engine.stop()


class TestGenericEngine(EngineContract):
    def test_the_base_model_does_not_change_when_adapters_come_and_go(
        self, harness: LocalHarness, world: World, runners: list[TransformersRunner]
    ) -> None:
        base_does_not_change(harness, world, runners)
        rows = runners[0].bases[world.base.digest].rows
        assert isinstance(rows, PeftRows)
        ids = list(range(3, 60))
        untouched = AutoModelForCausalLM.from_pretrained(world.base.path, dtype=torch.float32)
        with torch.inference_mode():
            expected = untouched.eval()(input_ids=torch.tensor([ids])).logits[0]
        # The engine is idle, so this thread may use its model.
        assert torch.equal(rows.logits_of(None, ids), expected)
