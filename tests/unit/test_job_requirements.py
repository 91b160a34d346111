from __future__ import annotations

from typing import Any

import pytest

from core.jobs.requirements import estimate
from core.specs import JobSpec

DESCRIPTION: dict[str, Any] = {
    "parameters": 1_000_000,
    "vocab_size": 100,
    "context_length": 512,
    "linear_modules": {"layers.0.q_proj": [10, 20], "layers.0.up_proj": [30, 10]},
}


def spec(**fields: Any) -> JobSpec:
    return JobSpec.model_validate({"base_model": "tiny", "dataset": "file-1", **fields})


def test_weights_trained_parameters_and_one_row_are_counted() -> None:
    trained = 4 * (10 + 20) + 4 * (30 + 10)
    row = 256 * (40 * 4 + 100 * 4)
    needed = estimate(spec(lora={"r": 4}, training={"max_length": 256}), DESCRIPTION)
    assert needed.memory_bytes == 4_000_000 + 16 * trained + row
    assert needed.device == "any"


def test_half_precision_halves_the_weights_where_it_is_used() -> None:
    auto = estimate(spec(), DESCRIPTION)
    bf16 = estimate(spec(training={"dtype": "bf16"}), DESCRIPTION)
    fp32 = estimate(spec(training={"dtype": "fp32"}), DESCRIPTION)
    assert auto.cuda_memory_bytes == bf16.cuda_memory_bytes == bf16.memory_bytes
    assert auto.memory_bytes == fp32.memory_bytes == fp32.cuda_memory_bytes
    assert fp32.memory_bytes - bf16.memory_bytes > 2_000_000


@pytest.mark.parametrize("training", [{"batch_size": 512}, {"max_length": 131_072}])
def test_what_only_may_be_large_counts_no_more(training: dict[str, int]) -> None:
    assert estimate(spec(training=training), DESCRIPTION) == estimate(spec(), DESCRIPTION)


def test_only_the_adapted_modules_are_trained() -> None:
    one = estimate(spec(lora={"r": 4, "target_modules": ["q_proj"]}), DESCRIPTION)
    both = estimate(spec(lora={"r": 4}), DESCRIPTION)
    assert both.memory_bytes - one.memory_bytes == 16 * 4 * (30 + 10)


def test_the_device_is_the_specs_and_gaps_in_a_description_count_nothing() -> None:
    needed = estimate(spec(resources={"device": "cuda"}), {"linear_modules": {}})
    assert (needed.device, needed.memory_bytes) == ("cuda", 0)
