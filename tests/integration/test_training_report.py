"""The before/after report and its verdict, on a tiny real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core import registry
from core.data.schema import Example
from core.data.sources import DataSource
from core.data.tokenizer import load_tokenizer
from core.errors import InvalidInput
from core.specs import EvaluationSpec
from core.training.base_model import WarmBase
from core.training.evaluation import answer_samples
from core.training.lora import attach_lora
from core.training.pipeline import Pipeline
from core.training.task import TrainTask
from tests.support.judged_rows import judged_rows
from tests.support.tiny_model import make_tiny_model
from tests.support.training import RecordingMonitor, make_task


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def _task(tmp_path: Path, model_path: Path, rows: list[dict[str, Any]], **spec: Any) -> TrainTask:
    """Return a task with a validation file of sixteen right rows."""
    path = tmp_path / "validation.jsonl"
    path.write_text("\n".join(map(json.dumps, judged_rows(16, first=100))))
    members = {
        "promote": "if_better",
        "data": {"validation_dataset": "file-2"},
        "training": {"max_steps": 40, "learning_rate": 1e-2, "batch_size": 4},
        "evaluation": {"samples": 2, "max_new_tokens": 4},
    }
    task = make_task(tmp_path, model_path, rows, **(members | spec))
    validation = DataSource(path=path, role="validation", name="validation")
    return task.model_copy(update={"sources": [*task.sources, validation]})


def test_right_answers_are_promoted_with_the_evidence(tmp_path: Path, model_path: Path) -> None:
    task = _task(tmp_path, model_path, judged_rows(32))
    report = Pipeline().run(task, RecordingMonitor())["report"]
    evaluation, forgetting = report["evaluation"], report["forgetting"]
    assert evaluation["rows"] == 16
    assert evaluation["loss_change"]["high"] < 0
    assert evaluation["loss_change"]["mean"] == pytest.approx(
        evaluation["adapter"]["loss"] - evaluation["base"]["loss"]
    )
    assert report["eval_loss"] == pytest.approx(evaluation["adapter"]["loss"], rel=1e-5)
    assert forgetting["tokens"] > 1000
    assert forgetting["loss_change"] == pytest.approx(
        forgetting["adapter"]["loss"] - forgetting["base"]["loss"]
    )
    assert report["scores"]["answers"] == 2
    assert report["scores"]["adapter"]["rouge_l"] > report["scores"]["base"]["rouge_l"]
    assert report["verdict"] == {"better": True, "compared_with": "base", "reasons": []}
    assert registry.decide("if_better", report) == registry.Promotion(promoted=True)


def test_shuffled_answers_are_quarantined(tmp_path: Path, model_path: Path) -> None:
    task = _task(tmp_path, model_path, judged_rows(32, shuffled=True))
    report = Pipeline().run(task, RecordingMonitor())["report"]
    assert report["verdict"]["better"] is False
    decision = registry.decide("if_better", report)
    assert not decision.promoted
    assert "not clearly below the base's" in str(decision.quarantine)


def test_what_was_forgotten_can_refuse_the_promotion(tmp_path: Path, model_path: Path) -> None:
    spec = {
        "evaluation": {"samples": 0, "max_forgetting": 0.001},
        "training": {"max_steps": 60, "learning_rate": 5e-2, "batch_size": 4},
    }
    report = Pipeline().run(
        _task(tmp_path, model_path, judged_rows(32), **spec), RecordingMonitor()
    )["report"]
    assert report["evaluation"]["loss_change"]["high"] < 0
    assert report["forgetting"]["loss_change"] > 0.001
    (reason,) = report["verdict"]["reasons"]
    assert "general text rose by" in reason
    assert report["scores"] is None


def test_too_little_evidence_is_refused_before_the_weights_are_read(
    tmp_path: Path, model_path: Path
) -> None:
    task = make_task(
        tmp_path,
        model_path,
        judged_rows(8),
        promote="if_better",
        data={"validation_fraction": 0.25},
        evaluation={"max_forgetting": 1.0},
    )
    monitor = RecordingMonitor()
    with pytest.raises(InvalidInput) as caught:
        Pipeline().run(task, monitor)
    assert caught.value.code == "promotion_needs_evidence"
    assert monitor.stages() == ["render"]


def _answers(model_path: Path, examples: list[Example], **spec: Any) -> list[dict[str, Any]]:
    from core.causal_lm import linear_modules
    from core.inference.engine import BaseModelRef
    from core.specs import LoraSpec

    base = BaseModelRef(name="tiny", digest="d", path=str(model_path))
    model = WarmBase().borrow(base, torch.float32, torch.device("cpu"))
    modules = linear_modules(model)
    model = attach_lora(model, LoraSpec(r=4), modules, "tiny").eval()
    before = torch.get_rng_state()
    answers = answer_samples(
        model,
        load_tokenizer(model_path),
        examples,
        EvaluationSpec(samples=len(examples), max_new_tokens=12, **spec),
        RecordingMonitor(),
        seed=7,
    )
    # What comes after must not depend on whether somebody looked at answers.
    assert torch.equal(torch.get_rng_state(), before)
    return answers


def test_drawn_answers_are_reproducible(model_path: Path) -> None:
    examples = [Example(prompt="the fox ", completion="jumps")]
    first = _answers(model_path, examples, temperature=1.0, top_p=0.9)
    again = _answers(model_path, examples, temperature=1.0, top_p=0.9)
    greedy = _answers(model_path, examples)
    assert first == again
    # An untrained adapter changes nothing, and both get the same draws.
    assert first[0]["base"] == first[0]["adapter"]
    assert first[0]["base"] != greedy[0]["base"]


def test_padding_does_not_count_as_written(model_path: Path) -> None:
    short = Example(prompt="the fox ", completion="jumps")
    long = Example(prompt="the quick brown fox jumps over the lazy dog and then ", completion="x")
    alone = _answers(model_path, [short], repetition_penalty=1.8)
    beside = _answers(model_path, [short, long], repetition_penalty=1.8)
    assert beside[0] == alone[0]


def test_a_text_without_a_prompt_is_continued_from_its_middle(model_path: Path) -> None:
    texts = ["the quick brown fox jumps", "über", "x", "首都是北京"]
    samples = _answers(model_path, [Example(completion=text) for text in texts])
    assert samples[0]["prompt"] == "the quick"
    assert samples[0]["reference"] == "brown fox jumps"
    for sample, text in zip(samples, texts, strict=True):
        assert sample["prompt"]
        assert (sample["prompt"] + sample["reference"]).replace(" ", "") == text.replace(" ", "")
