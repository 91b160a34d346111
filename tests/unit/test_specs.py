from __future__ import annotations

import json
from pathlib import Path

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
        ({"method": {"type": "ppo"}}, "method"),
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


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"training": {"eval_strategy": "steps"}}, {"training.eval_steps"}),
        ({"training": {"eval_strategy": "time"}}, {"training.eval_seconds"}),
        ({"training": {"save_strategy": "steps"}}, {"training.save_steps"}),
        ({"training": {"save_strategy": "epoch", "save_steps": 3}}, {"training.save_steps"}),
        ({"training": {"eval_strategy": "epoch", "eval_steps": 3}}, {"training.eval_steps"}),
        ({"training": {"eval_steps": 3, "eval_seconds": 3.0}}, {"training.eval_seconds"}),
        ({"training": {"optim": "sgd", "adam_beta1": 0.5}}, {"training.adam_beta1"}),
        ({"training": {"optim": "adafactor", "adam_epsilon": 1e-3}}, {"training.adam_epsilon"}),
        ({"training": {"dtype": "fp16"}}, {"training.dtype"}),
        ({"lora": {"dtype": "fp16"}, "resources": {"device": "cpu"}}, {"lora.dtype"}),
        ({"training": {"packing": True}, "data": {"group_by_length": False}}, {""}),
        ({"lora": {"use_dora": True}}, {"lora.use_dora"}),
        ({"lora": {"modules_to_save": ["embed_tokens"]}}, {"lora.modules_to_save"}),
    ],
)
def test_settings_that_contradict_each_other_are_named(
    change: dict[str, object], fields: set[str]
) -> None:
    validated = {"data": {"validation_fraction": 0.1}}
    assert errors_of({**LEAST, **validated, **change}) >= fields


def test_the_strategy_follows_from_the_interval_and_is_stored() -> None:
    given = {
        "training": {"eval_seconds": 60.0, "save_steps": 5},
        "data": {"validation_fraction": 0.1},
    }
    training = JobSpec.model_validate({**LEAST, **given}).training
    assert (training.eval_strategy, training.save_strategy) == ("time", "steps")


def test_the_notebooks_configuration_is_a_spec() -> None:
    text = (Path(__file__).parents[2] / "examples" / "notebook.json").read_text()
    spec = JobSpec.model_validate_json(text)
    assert (spec.lora.r, spec.lora.alpha, spec.lora.dtype) == (128, 256.0, "bf16")
    assert (spec.training.epochs, spec.training.adam_epsilon) == (50.0, 1e-4)
