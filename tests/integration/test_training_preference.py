"""DPO on a tiny real model: the loss by hand, what it learns, how it resumes, what it leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional

from core.artifacts import read_manifest
from core.causal_lm import linear_modules, load_causal_lm
from core.child import Stopped
from core.data.pairs import PreferencePair, render_example
from core.data.schema import to_example
from core.data.sources import DataSource, SourceRole
from core.data.split import split_rows
from core.data.tokenizer import load_tokenizer
from core.errors import InvalidInput
from core.specs import LAST_RUNG
from core.training.lora import attach_lora
from core.training.pipeline import Pipeline
from core.training.preference import PreferenceTrainer
from core.training.task import TrainTask
from tests.support.preferences import make_pairs
from tests.support.tiny_model import make_tiny_model
from tests.support.training import ROWS, RecordingMonitor, make_task

EXAMPLE = Path(__file__).parents[2] / "examples/preferences"
ROLES: dict[SourceRole, str] = {"training": "train", "validation": "validation"}
PAIRS = make_pairs(14)
DPO: dict[str, Any] = {
    "method": {"type": "dpo"},
    "lora": {"r": 4, "dropout": 0.2},
    "data": {"validation_fraction": 0.25},
    "training": {"epochs": 2.5, "learning_rate": 1e-2, "logging_steps": 2, "seed": 3},
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """Return one warm pipeline for all tests, so that a trace left by a stopped job shows."""
    return Pipeline()


def task_of(tmp_path: Path, model_path: Path, **changes: Any) -> TrainTask:
    spec = DPO | {
        name: DPO.get(name, {}) | value if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return make_task(tmp_path, model_path, rows=PAIRS, **spec)


def weights_of(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(result["artifact_dir"]) / "adapter_model.safetensors")


def log_prob(model: Any, pair: PreferencePair, answer: list[int]) -> torch.Tensor:
    """Return the log probability of one answer, without padding."""
    ids = torch.tensor([pair.prompt_ids + answer])
    logits = model(input_ids=ids).logits[0, len(pair.prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1)).sum()


def margin_of(model: Any, pair: PreferencePair, beta: float) -> torch.Tensor:
    """Return the reward margin of a pair by the definition; the base model is the reference."""
    with torch.no_grad(), model.disable_adapter():
        reference = log_prob(model, pair, pair.chosen_ids) - log_prob(
            model, pair, pair.rejected_ids
        )
    policy = log_prob(model, pair, pair.chosen_ids) - log_prob(model, pair, pair.rejected_ids)
    return beta * (policy - reference)


def loss_of(margin: torch.Tensor, loss_type: str, smoothing: float) -> torch.Tensor:
    match loss_type:
        case "hinge":
            return functional.relu(1 - margin)
        case "robust":
            right, wrong = functional.logsigmoid(margin), functional.logsigmoid(-margin)
            return (-(1 - smoothing) * right + smoothing * wrong) / (1 - 2 * smoothing)
        case _:
            return -functional.logsigmoid(margin)


@pytest.mark.parametrize(
    ("loss_type", "smoothing"), [("sigmoid", 0.0), ("hinge", 0.0), ("robust", 0.2)]
)
def test_losses_and_weights_equal_those_computed_by_hand(
    tmp_path: Path, model_path: Path, loss_type: str, smoothing: float
) -> None:
    rate, beta, per_step = 5e-3, 0.3, 8
    task = task_of(
        tmp_path,
        model_path,
        method={"beta": beta, "loss_type": loss_type, "label_smoothing": smoothing},
        lora={"dropout": 0.0},
        data={"validation_fraction": 0.0, "shuffle": False},
        training={
            "epochs": 1,
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": rate,
            "logging_steps": 1,
        },
    )
    monitor = RecordingMonitor()
    result = Pipeline().run(task, monitor)

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(model_path)
    pairs = [render_example(to_example(row, "preference"), tokenizer) for row in PAIRS]
    model = load_causal_lm(model_path, torch.float32)
    torch.manual_seed(task.spec.training.seed)
    model = attach_lora(model, task.spec.lora, linear_modules(model), "tiny").eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses, steps = [], math.ceil(len(pairs) / per_step)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        batch = pairs[step * per_step : (step + 1) * per_step]
        loss = torch.stack(
            [loss_of(margin_of(model, pair, beta), loss_type, smoothing) for pair in batch]
        ).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert len(losses) == 2
    assert monitor.metrics("loss") == pytest.approx(losses, rel=1e-4)
    weights = weights_of(result)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                weights[name.replace(".default", "")], parameter.detach(), rtol=1e-3, atol=2e-5
            )


# PEFT asks for it under the name that transformers is giving up.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_report_gives_accuracy_and_margin_of_held_out_pairs(
    tmp_path: Path, model_path: Path, pipeline: Pipeline
) -> None:
    monitor = RecordingMonitor()
    task = task_of(
        tmp_path,
        model_path,
        data={"shuffle": False},
        training={"epochs": 3},
        evaluation={"samples": 1, "max_new_tokens": 2},
    )
    result = pipeline.run(task, monitor)
    report = result["report"]

    assert (report["training_rows"], report["validation_rows"]) == (10, 4)
    learnt = report["preferences"]
    assert learnt["pairs"] == 4
    assert learnt["accuracy"]["mean"] >= 0.8
    assert 0 < learnt["margin"]["low"] <= learnt["margin"]["mean"] <= learnt["margin"]["high"]
    assert report["base_eval_loss"] == pytest.approx(math.log(2))
    assert report["eval_loss"] < report["base_eval_loss"]
    assert report["verdict"]["better"]
    assert monitor.metrics("eval_loss")[-1] == report["eval_loss"]
    assert monitor.metrics("eval_accuracy")[-1] == learnt["accuracy"]["mean"]
    assert monitor.metrics("accuracy")[-1] > 0.8

    tokenizer = load_tokenizer(model_path)
    _, held_out = split_rows(len(PAIRS), task.spec.data, task.spec.training.seed)
    pairs = [render_example(to_example(PAIRS[i], "preference"), tokenizer) for i in held_out]
    base = load_causal_lm(model_path, torch.float32)
    adapted = PeftModel.from_pretrained(base, result["artifact_dir"]).eval()
    with torch.no_grad():
        margins = [margin_of(adapted, pair, 0.1).item() for pair in pairs]
    assert learnt["margin"]["mean"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)


def test_held_out_preferences_of_the_example_are_learnt(
    tmp_path: Path, model_path: Path, pipeline: Pipeline
) -> None:
    task = make_task(
        tmp_path,
        model_path,
        method={"type": "dpo"},
        lora={"r": 8},
        data={"validation_dataset": "file-2"},
        training={"epochs": 1, "batch_size": 8, "learning_rate": 5e-3, "max_length": 512},
    )
    files = {role: EXAMPLE / f"{name}.jsonl" for role, name in ROLES.items()}
    sources = [DataSource(path=path, role=role) for role, path in files.items()]
    result = pipeline.run(task.model_copy(update={"sources": sources}), RecordingMonitor())
    report = result["report"]
    assert (report["training_rows"], report["validation_rows"]) == (56, 40)
    assert report["preferences"]["accuracy"]["mean"] >= 0.8
    assert report["preferences"]["margin"]["low"] > 0

    questions = {
        role: {json.loads(line)["prompt"][0]["content"] for line in path.read_text().splitlines()}
        for role, path in files.items()
    }
    assert not questions["training"] & questions["validation"]


@pytest.mark.parametrize(
    ("stop_on", "field"), [("progress", "total_steps"), ("metric", "loss")], ids=["step", "metric"]
)
def test_a_job_paused_again_and_again_gives_the_same_adapter(
    tmp_path: Path, model_path: Path, pipeline: Pipeline, stop_on: str, field: str
) -> None:
    undisturbed = RecordingMonitor()
    expected = Pipeline().run(task_of(tmp_path, model_path), undisturbed)

    result, resume_dir, step = None, None, 0
    rows: list[dict[str, Any]] = []
    while result is None:

        def is_enough(event: str, fields: dict[str, Any], start: int = step) -> bool:
            return event == stop_on and field in fields and fields["step"] > start

        torch.manual_seed(99)
        monitor = RecordingMonitor(is_enough, reason="pause", keep_dir=tmp_path / "kept")
        task = task_of(tmp_path, model_path).model_copy(update={"resume_dir": resume_dir})
        try:
            result = pipeline.run(task, monitor)
        except Stopped:
            step, resume_dir = monitor.checkpoints.popitem()
        rows += monitor.rows()

    assert len(result["provenance"]["resumed_from_steps"]) >= 3
    assert [_without_memory(row) for row in rows] == [
        _without_memory(row) for row in undisturbed.rows()
    ]
    assert digest_of(result) == digest_of(expected)
    for member in ("preferences", "eval_loss", "base_eval_loss", "train_loss"):
        assert result["report"][member] == expected["report"][member]


def test_each_rung_of_the_memory_ladder_computes_the_same(
    tmp_path: Path, model_path: Path, pipeline: Pipeline
) -> None:
    changes: dict[str, Any] = {
        "lora": {"dropout": 0.0},
        "training": {"batch_size": 6, "gradient_accumulation_steps": 1, "max_steps": 4},
    }
    expected = RecordingMonitor()
    pipeline.run(task_of(tmp_path, model_path, **changes), expected)
    for rung in (1, LAST_RUNG):
        monitor = RecordingMonitor()
        task = task_of(tmp_path, model_path, **changes)
        pipeline.run(task.model_copy(update={"memory_rung": rung}), monitor)
        assert monitor.metrics("loss") == pytest.approx(expected.metrics("loss"), rel=1e-4)
        assert monitor.metrics("eval_loss") == pytest.approx(
            expected.metrics("eval_loss"), rel=1e-4
        )


def test_the_reference_of_a_continued_adapter_is_that_adapter(
    tmp_path: Path, model_path: Path, pipeline: Pipeline
) -> None:
    lora = {"r": 4}
    sft = pipeline.run(
        make_task(
            tmp_path, model_path, lora=lora, training={"max_steps": 6, "learning_rate": 0.02}
        ),
        RecordingMonitor(),
    )
    changes: dict[str, Any] = {
        "lora": {"dropout": 0.0},
        "training": {"max_steps": 1, "logging_steps": 1},
    }
    monitor = RecordingMonitor()
    task = task_of(tmp_path, model_path, continue_from="first", **changes)
    directory = Path(sft["artifact_dir"])
    result = pipeline.run(task.model_copy(update={"continue_dir": directory}), monitor)

    # Before the first step nothing tells the model from its reference.
    assert monitor.metrics("loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert result["report"]["preferences"]["margin"]["mean"] != 0
    before, after = weights_of(sft), weights_of(result)
    assert before.keys() == after.keys()
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < moved < 0.05


def test_a_job_that_ends_within_an_epoch_measures_the_pairs_it_reaches(
    tmp_path: Path, model_path: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    answer = PreferenceTrainer._answer

    def counting(self: Any, model: Any, inputs: dict[str, torch.Tensor]) -> Any:
        if not self.is_in_train:
            measured.append(len(inputs["input_ids"]) // 2)
        return answer(self, model, inputs)

    monkeypatch.setattr(PreferenceTrainer, "_answer", counting)
    monitor = RecordingMonitor()
    changes = {"data": {"validation_fraction": 0.0}, "training": {"max_steps": 2, "epochs": 1}}
    pipeline.run(task_of(tmp_path, model_path, **changes), monitor)
    assert sum(measured) == 8
    assert all(math.isfinite(loss) for loss in monitor.metrics("loss"))


def test_the_output_head_of_trl_gives_the_same_losses(
    tmp_path: Path, model_path: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = RecordingMonitor(), RecordingMonitor()
    pipeline.run(task_of(tmp_path, model_path), ours)
    # As for an architecture that cannot leave out positions, and as on CUDA.
    never = property(lambda _: False, lambda *_: None)
    monkeypatch.setattr(PreferenceTrainer, "_selects_positions", never, raising=False)
    pipeline.run(task_of(tmp_path, model_path), theirs)
    for name in ("loss", "eval_loss", "margin", "eval_margin"):
        assert theirs.metrics(name) == pytest.approx(ours.metrics(name), rel=1e-3, abs=1e-4)


def test_a_pause_while_the_reference_is_measured_keeps_nothing_and_stops_at_once(
    tmp_path: Path, model_path: Path, pipeline: Pipeline
) -> None:
    class PausesInTraining(RecordingMonitor):
        """Asks to pause once the stage has begun."""

        @property
        def stop_reason(self) -> str | None:
            return "pause" if "train" in self.stages() else None

        def check_stop(self) -> None:
            return

    monitor = PausesInTraining(keep_dir=tmp_path / "kept")
    with pytest.raises(Stopped):
        pipeline.run(task_of(tmp_path, model_path), monitor)
    assert not monitor.checkpoints
    assert not monitor.metrics("loss")


def test_a_dpo_job_leaves_no_trace_in_the_next_job(tmp_path: Path, model_path: Path) -> None:
    def plain() -> TrainTask:
        lora = {"r": 4, "dropout": 0.1}
        return make_task(tmp_path, model_path, lora=lora, training={"max_steps": 3, "seed": 5})

    fresh = digest_of(Pipeline().run(plain(), RecordingMonitor()))
    warm = Pipeline()
    settings = {"neftune_noise_alpha": 5.0, "gradient_checkpointing": True, "max_steps": 4}
    task = task_of(tmp_path, model_path, training=settings)
    first = digest_of(warm.run(task, RecordingMonitor()))
    model = warm._bases.borrow(task.base, torch.float32, torch.device("cpu"))
    untouched = load_causal_lm(model_path, torch.float32)
    assert {name for name, _ in model.named_modules()} == {
        name for name, _ in untouched.named_modules()
    }
    assert model.config.to_dict() == untouched.config.to_dict()
    assert model.generation_config.to_dict() == untouched.generation_config.to_dict()
    for module in model.modules():
        assert "forward" not in vars(module)
        hooks = [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks]
        assert not any(hooks)
        assert not getattr(module, "gradient_checkpointing", False)
    assert not any(parameter.requires_grad for parameter in model.parameters())

    assert digest_of(warm.run(plain(), RecordingMonitor())) == fresh
    with pytest.raises(Stopped):
        warm.run(task_of(tmp_path, model_path), RecordingMonitor(lambda _, f: f.get("step") == 2))
    assert digest_of(warm.run(plain(), RecordingMonitor())) == fresh
    again = task_of(tmp_path, model_path, training=settings)
    assert digest_of(warm.run(again, RecordingMonitor())) == first


def test_only_the_trained_adapter_is_packaged(
    tmp_path: Path, model_path: Path, pipeline: Pipeline
) -> None:
    result = pipeline.run(task_of(tmp_path, model_path), RecordingMonitor())
    directory = Path(result["artifact_dir"])
    assert not [name for name in weights_of(result) if ".ref." in name]
    assert not [path for path in directory.rglob("*") if path.is_dir()]
    trainable = result["report"]["trainable_parameters"]
    assert sum(tensor.numel() for tensor in weights_of(result).values()) == trainable


@pytest.mark.parametrize(
    ("method", "rows"), [("dpo", ROWS), ("sft", PAIRS)], ids=["dpo-answers", "sft-pairs"]
)
def test_a_method_refuses_rows_of_the_other(
    tmp_path: Path, model_path: Path, pipeline: Pipeline, method: str, rows: list[dict[str, Any]]
) -> None:
    monitor = RecordingMonitor()
    with pytest.raises(InvalidInput) as caught:
        pipeline.run(make_task(tmp_path, model_path, rows=rows, method={"type": method}), monitor)
    assert caught.value.code == "method_format_mismatch"
    assert monitor.stages() == ["render"]


def digest_of(result: dict[str, Any]) -> str:
    return read_manifest(Path(result["artifact_dir"])).digest


def _without_memory(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "memory_bytes"}
