from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from core.specs import JobSpec

LEAST = {"base_model": "smollm2-135m-instruct", "dataset": "file-1"}


def errors_of(spec: dict[str, object]) -> set[str]:
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate(spec)
    return {".".join(str(part) for part in error["loc"]) for error in caught.value.errors()}


def test_the_example_of_the_documentation_is_accepted() -> None:
    spec = JobSpec.model_validate(
        {
            **LEAST,
            "adapter": "support-bot",
            "method": {"type": "sft"},
            "lora": {"r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"},
            "training": {
                "epochs": 3,
                "batch_size": 2,
                "gradient_accumulation_steps": 2,
                "learning_rate": 2e-4,
                "seed": 7,
            },
            "data": {"validation_fraction": 0.1},
            "evaluation": {"samples": 3},
            "metadata": {"team": "support"},
        }
    )
    assert spec.training.seed == 7


def test_the_stored_form_has_every_default_resolved_and_reads_back_equal() -> None:
    spec = JobSpec.model_validate({**LEAST, "lora": {"r": 8}})
    stored = json.loads(spec.model_dump_json())
    assert stored["spec_version"] == 1
    assert stored["lora"]["alpha"] == 16.0
    assert stored["training"]["max_length"] == 1024
    assert JobSpec.model_validate(stored) == spec


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"surprise": 1}, "surprise"),
        ({"lora": {"rank": 8}}, "lora.rank"),
        ({"lora": {"r": 0}}, "lora.r"),
        ({"lora": {"r": 257}}, "lora.r"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate"),
        ({"training": {"learning_rate": float("inf")}}, "training.learning_rate"),
        ({"training": {"batch_size": "many"}}, "training.batch_size"),
        ({"training": {"batch_size": "2"}}, "training.batch_size"),
        ({"training": {"batch_size": True}}, "training.batch_size"),
        ({"training": {"epochs": True}}, "training.epochs"),
        ({"adapter": "Not A Name"}, "adapter"),
        ({"adapter": "../../etc"}, "adapter"),
        ({"adapter": "x" * 64}, "adapter"),
        ({"base_model": ""}, "base_model"),
        ({"method": {"type": "ppo"}}, "method.type"),
        ({"spec_version": 2}, "spec_version"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
    ],
)
def test_bad_fields_are_named(change: dict[str, object], field: str) -> None:
    assert field in errors_of({**LEAST, **change})


@pytest.mark.parametrize("targets", [[], ["lm_head"], ["q_proj", ".*"], ["a" * 200], "some-linear"])
def test_target_modules_are_literal_names(targets: object) -> None:
    assert errors_of({**LEAST, "lora": {"target_modules": targets}})


@pytest.mark.parametrize(
    "source",
    [{}, {"dataset": "file-1", "rows": [{"messages": []}]}, {"rows": []}],
)
def test_exactly_one_source_of_rows(source: dict[str, object]) -> None:
    assert errors_of({"base_model": "m", **source})


@pytest.mark.parametrize(
    ("name", "value"),
    [("load_best_model_at_end", True), ("early_stopping_patience", 2), ("eval_steps", 10)],
)
def test_what_looks_at_evaluations_needs_validation_rows(name: str, value: object) -> None:
    spec = {**LEAST, "training": {name: value}}
    assert errors_of(spec) == {f"training.{name}"}
    assert JobSpec.model_validate({**spec, "data": {"validation_fraction": 0.1}})
