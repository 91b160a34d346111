"""The pipeline on a tiny real model: what it publishes, what it reports and when it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from core.artifacts import read_manifest, sha256_file, sha256_text, verify_files
from core.child import Stopped
from core.data.rendering import IGNORED_LABEL, render_row
from core.data.schema import to_example
from core.data.templates import template_of, template_sha256
from core.data.tokenizer import load_tokenizer, tokenizer_sha256
from core.errors import InvalidInput, TrainingFailed
from core.training.inspect_model import inspect_model
from core.training.pipeline import Pipeline
from tests.support.tiny_model import make_tiny_model
from tests.support.training import ROWS, RecordingMonitor, make_broken_model, make_task


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def mean_loss(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Return the plain cross entropy over all trained tokens, row by row without padding."""
    total, count = 0.0, 0
    for row in rows:
        rendered = render_row(to_example(row, "messages"), tokenizer)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([rendered.input_ids])).logits[0, :-1]
        targets = torch.tensor(rendered.labels[1:])
        trained = targets != IGNORED_LABEL
        chosen = logits.log_softmax(-1)[trained].gather(1, targets[trained].unsqueeze(1))
        total -= chosen.sum().item()
        count += int(trained.sum())
    return total / count


# PEFT asks for it under the name that transformers is giving up.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_job_gives_an_adapter_that_peft_loads(tmp_path: Path, model_path: Path) -> None:
    task = make_task(
        tmp_path,
        model_path,
        data={"validation_fraction": 0.25},
        training={"epochs": 2, "learning_rate": 1e-2},
        evaluation={"samples": 2, "max_new_tokens": 4},
    )
    monitor = RecordingMonitor()
    result = Pipeline().run(task, monitor)
    directory = Path(result["artifact_dir"])

    manifest = read_manifest(directory)
    verify_files(directory, manifest)
    description = inspect_model(model_path)
    assert manifest.target_modules == sorted(description["linear_modules"])
    assert manifest.golden_token_ids == description["golden_token_ids"]
    assert manifest.template_sha256 == description["template_sha256"]
    assert manifest.tokenizer_sha256 == description["tokenizer_sha256"]
    assert manifest.base_digest == task.base.digest
    assert str(tmp_path) not in (directory / "adapter_config.json").read_text()

    base = AutoModelForCausalLM.from_pretrained(model_path)
    tokenizer = load_tokenizer(model_path)
    adapted = PeftModel.from_pretrained(base, directory).eval()
    report = result["report"]
    validation = [
        row for row in ROWS if row["messages"][0]["content"] in
        {sample["prompt"] for sample in report["samples"]}
    ]  # fmt: skip
    assert (report["training_rows"], report["validation_rows"], len(validation)) == (6, 2, 2)
    assert report["eval_loss"] == pytest.approx(mean_loss(adapted, tokenizer, validation), rel=1e-5)
    with adapted.disable_adapter():
        base_loss = mean_loss(adapted, tokenizer, validation)
    assert report["base_eval_loss"] == pytest.approx(base_loss, rel=1e-5)
    assert report["eval_loss"] < report["base_eval_loss"]
    assert {"prompt", "messages", "reference", "base", "adapter"} == set(report["samples"][0])
    assert report["trainable_parameters"] == sum(
        4 * (rows + columns) for rows, columns in description["linear_modules"].values()
    )

    assert monitor.stages() == ["render", "load", "train", "evaluate", "package", "gate"]
    steps = [e["step"] for e in monitor.events if e["event"] == "progress" and "step" in e]
    assert steps == [0, 1, 2, 3, 4]
    assert len(monitor.metrics("loss")) == 4
    assert len(monitor.metrics("eval_loss")) == 2
    assert monitor.metrics("eval_loss")[-1] == report["eval_loss"]
    last = [e for e in monitor.events if e["event"] == "progress" and "step" in e][-1]
    assert (last["total_steps"], last["eta_seconds"]) == (4, 0)
    assert last["trained_tokens"] == result["provenance"]["tokens"]
    assert result["provenance"]["dataset_sha256"] == sha256_file(task.sources[0].path)


def test_tokens_seen_are_those_of_the_rows_without_padding(
    tmp_path: Path, model_path: Path
) -> None:
    task = make_task(tmp_path, model_path, training={"epochs": 1})
    tokenizer = load_tokenizer(model_path)
    expected = sum(
        len(render_row(to_example(row, "messages"), tokenizer).input_ids) for row in ROWS
    )
    assert Pipeline().run(task, RecordingMonitor())["provenance"]["tokens"] == expected


def test_text_rows_train_a_model_without_a_template(tmp_path: Path) -> None:
    model_path = make_tiny_model(tmp_path / "plain", chat_template=None)
    rows = [{"prompt": "The fox ", "completion": f"jumps {index}"} for index in range(4)]
    task = make_task(tmp_path, model_path, rows, evaluation={"samples": 1, "max_new_tokens": 3})
    result = Pipeline().run(task, RecordingMonitor())
    manifest = read_manifest(Path(result["artifact_dir"]))
    assert template_sha256(load_tokenizer(model_path)) is None
    assert manifest.tokenizer_sha256 == tokenizer_sha256(model_path)
    assert result["report"]["samples"][0]["prompt"] == "The fox "


def test_a_model_without_a_template_learns_and_keeps_chatml(tmp_path: Path) -> None:
    model_path = make_tiny_model(tmp_path / "plain", chat_template=None, markers=False)
    task = make_task(tmp_path, model_path, training={"max_steps": 1})
    monitor = RecordingMonitor()
    directory = Path(Pipeline().run(task, monitor)["artifact_dir"])
    template = (directory / "chat_template.jinja").read_text("utf-8")
    assert template == template_of(load_tokenizer(model_path))
    assert read_manifest(directory).template_sha256 == sha256_text(template)
    assert tokenizer_sha256(directory) == tokenizer_sha256(model_path)
    assert "<|endoftext|>" in monitor.logged("chatml_fallback")[0]["message"]


def test_bad_rows_are_refused_before_the_weights_are_read(tmp_path: Path, model_path: Path) -> None:
    task = make_task(tmp_path, model_path, training={"max_steps": 1, "max_length": 24})
    monitor = RecordingMonitor()
    with pytest.raises(InvalidInput) as caught:
        Pipeline().run(task, monitor)
    assert caught.value.code == "invalid_dataset"
    assert {error["code"] for error in caught.value.errors} == {"row_too_long"}
    assert caught.value.line == caught.value.errors[0]["line"]
    assert monitor.stages() == ["render"]


def test_a_stop_request_is_honoured_at_the_next_step(tmp_path: Path, model_path: Path) -> None:
    def after_step_two(event: str, fields: dict[str, Any]) -> bool:
        return event == "progress" and fields.get("step") == 2

    monitor = RecordingMonitor(after_step_two)
    with pytest.raises(Stopped):
        Pipeline().run(make_task(tmp_path, model_path, training={"max_steps": 50}), monitor)
    assert max(event.get("step", 0) for event in monitor.events) == 2
    assert monitor.stages() == ["render", "load", "train"]


def test_a_stop_request_ends_the_answering_of_samples(tmp_path: Path, model_path: Path) -> None:
    monitor = RecordingMonitor(lambda event, fields: fields.get("stage") == "evaluate")
    task = make_task(tmp_path, model_path, evaluation={"samples": 3, "max_new_tokens": 400})
    with pytest.raises(Stopped):
        Pipeline().run(task, monitor)
    assert not (task.work_dir / "artifact").exists()


def test_a_loss_that_is_no_number_fails_the_job(tmp_path: Path) -> None:
    model_path = make_broken_model(tmp_path / "broken")
    with pytest.raises(TrainingFailed) as caught:
        Pipeline().run(make_task(tmp_path, model_path), RecordingMonitor())
    assert caught.value.code == "loss_not_finite"


def test_an_adapter_without_effect_fails_the_job(tmp_path: Path, model_path: Path) -> None:
    task = make_task(tmp_path, model_path, training={"max_steps": 1, "learning_rate": 1e-44})
    with pytest.raises(TrainingFailed) as caught:
        Pipeline().run(task, RecordingMonitor())
    assert caught.value.code == "adapter_has_no_effect"


def test_only_the_named_modules_are_adapted(tmp_path: Path, model_path: Path) -> None:
    lora = {"r": 2, "target_modules": ["q_proj", "layers.1.mlp.up_proj"], "use_rslora": True}
    result = Pipeline().run(make_task(tmp_path, model_path, lora=lora), RecordingMonitor())
    manifest = read_manifest(Path(result["artifact_dir"]))
    assert manifest.target_modules == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert (manifest.r, manifest.lora_alpha, manifest.use_rslora) == (2, 4.0, True)

    task = make_task(tmp_path, model_path, lora={"target_modules": ["q_prj"]})
    with pytest.raises(InvalidInput) as caught:
        Pipeline().run(task, RecordingMonitor())
    assert caught.value.code == "unknown_target_module"
    assert "q_proj" in (caught.value.hint or "")
