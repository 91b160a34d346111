"""The spec of a DPO job: what it takes, what it fills in and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from core.specs import JobSpec


def spec_of(method: dict[str, Any] | None = None, **members: Any) -> JobSpec:
    method = {"type": "dpo"} | (method or {})
    return JobSpec.model_validate(
        {"base_model": "m", "dataset": "file-1", "method": method, **members}
    )


def test_defaults_are_resolved_for_the_method() -> None:
    spec = spec_of()
    assert spec.method.model_dump() == {
        "type": "dpo",
        "beta": 0.1,
        "loss_type": "sigmoid",
        "label_smoothing": 0.0,
    }
    assert spec.training.learning_rate is not None
    sft = JobSpec.model_validate({"base_model": "m", "dataset": "file-1"})
    assert sft.training.learning_rate is not None
    assert spec.training.learning_rate < sft.training.learning_rate
    assert spec_of(training={"learning_rate": 1e-3}).training.learning_rate == 1e-3


@pytest.mark.parametrize(
    "method",
    [
        {"beta": 0},
        {"loss_type": "kto"},
        {"label_smoothing": 0.5, "loss_type": "robust"},
        # Each would be without effect.
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "loss_type": "ipo"},
        {"loss_type": "robust"},
        {"betta": 0.1},
    ],
)
def test_what_is_wrong_or_has_no_effect_is_refused(method: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        spec_of(method)
    assert caught.value.errors()[0]["loc"][0] == "method"


def test_robust_takes_its_smoothing() -> None:
    method = spec_of({"loss_type": "robust", "label_smoothing": 0.2}).method
    assert method.model_dump()["label_smoothing"] == 0.2


def test_settings_that_pairs_cannot_have_are_named() -> None:
    with pytest.raises(ValidationError) as caught:
        spec_of(training={"packing": True}, data={"train_on": "all"})
    assert {error["loc"] for error in caught.value.errors()} == {
        ("training", "packing"),
        ("data", "train_on"),
    }
    with pytest.raises(ValidationError):
        # No field of another method.
        JobSpec.model_validate(
            {"base_model": "m", "dataset": "f", "method": {"type": "sft", "beta": 0.1}}
        )
