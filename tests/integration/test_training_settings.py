"""Every setting of a spec does what it says, seen in what is trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trl import SFTConfig

from core.causal_lm import linear_modules, load_causal_lm
from core.errors import InvalidInput
from core.specs import JobSpec
from core.training.arguments import build_arguments
from core.training.device import select_dtype
from core.training.lora import attach_lora, auto_targets, begin_from
from core.training.memory_ladder import plan_batches
from core.training.pipeline import Pipeline
from core.training.task import TrainTask
from tests.support.tiny_model import make_tiny_model
from tests.support.training import RecordingMonitor, make_task

CPU = torch.device("cpu")
RATE = 1e-2


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline()


def weights_of(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(result["artifact_dir"]) / "adapter_model.safetensors")


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def train(
    pipeline: Pipeline, task: TrainTask, monitor: RecordingMonitor | None = None
) -> torch.Tensor:
    return flat(weights_of(pipeline.run(task, monitor or RecordingMonitor())))


def spec_of(**members: Any) -> JobSpec:
    return JobSpec.model_validate({"base_model": "tiny", "dataset": "file-1", **members})


def arguments_of(spec: JobSpec, tmp_path: Path) -> Any:
    return build_arguments(
        SFTConfig,
        spec,
        plan_batches(spec.training, 0),
        tmp_path,
        CPU,
        torch.float32,
        rows=8,
        parameters=1,
        validate=True,
    )


def test_settings_reach_the_trainer_under_their_names(tmp_path: Path) -> None:
    training = {
        "optim": "adamw_torch_fused",
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.02,
        "max_grad_norm": 0.5,
        "lr_scheduler": "cosine",
        "neftune_noise_alpha": 5.0,
        "gradient_checkpointing": True,
        "eval_steps": 3,
    }
    spec = spec_of(training=training, data={"validation_fraction": 0.2})
    arguments = arguments_of(spec, tmp_path)
    renamed = {
        "lr_scheduler": "lr_scheduler_type",
        "gradient_checkpointing": "activation_checkpointing",
    }
    for name, value in training.items():
        assert getattr(arguments, renamed.get(name, name)) == value, name
    assert arguments.eval_strategy == "steps"
    assert not arguments_of(spec_of(), tmp_path).activation_checkpointing


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "sgd"])
def test_each_optimizer_trains_an_adapter_of_its_own(
    tmp_path: Path, model_path: Path, pipeline: Pipeline, optim: str
) -> None:
    def run(name: str) -> torch.Tensor:
        training = {"max_steps": 2, "learning_rate": RATE, "optim": name}
        return train(pipeline, make_task(tmp_path, model_path, training=training))

    plain, other = run("adamw_torch"), run(optim)
    if optim == "adamw_torch_fused":
        torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-6)
    else:
        assert not torch.allclose(plain, other)


def test_betas_and_epsilon_change_what_adam_does(
    tmp_path: Path, model_path: Path, pipeline: Pipeline
) -> None:
    def run(**setting: float) -> torch.Tensor:
        training = {"max_steps": 3, "learning_rate": RATE, **setting}
        return train(pipeline, make_task(tmp_path, model_path, training=training))

    plain = run()
    for setting in ({"adam_beta1": 0.5}, {"adam_beta2": 0.9}, {"adam_epsilon": 1e-2}):
        assert not torch.allclose(plain, run(**setting)), setting


@pytest.mark.parametrize("base_dtype", ["fp32", "bf16"])
def test_a_half_precision_adapter_is_trained_in_half_precision(
    tmp_path: Path, model_path: Path, pipeline: Pipeline, base_dtype: str
) -> None:
    def run(dtype: str) -> torch.Tensor:
        training = {"max_steps": 2, "learning_rate": RATE, "dtype": base_dtype}
        lora = {"r": 4, "dtype": dtype}
        return train(pipeline, make_task(tmp_path, model_path, training=training, lora=lora))

    half, full = run("bf16"), run("auto")
    # The file has float32, and each number in it is one of bfloat16.
    assert half.dtype == full.dtype == torch.float32
    assert torch.equal(half, half.bfloat16().float())
    assert not torch.equal(full, full.bfloat16().float())


def test_epsilon_follows_the_precision_of_what_is_trained() -> None:
    def epsilon(**members: Any) -> float | None:
        return spec_of(**members).training.adam_epsilon

    assert epsilon() == epsilon(training={"dtype": "bf16"}) == 1e-8
    assert epsilon(lora={"dtype": "bf16"}) == 1e-4
    assert epsilon(lora={"dtype": "bf16"}, training={"adam_epsilon": 1e-6}) == 1e-6
    on_cuda = {"resources": {"device": "cuda"}, "lora": {"dtype": "fp16"}}
    assert epsilon(**on_cuda, training={"dtype": "fp16"}) == 1e-4
    assert epsilon(training={"optim": "sgd"}, lora={"dtype": "bf16"}) is None


@pytest.mark.parametrize("part", ["training", "lora"])
def test_a_cpu_refuses_fp16_before_it_loads_a_model(part: str) -> None:
    spec = spec_of(**{part: {"dtype": "fp16"}}, resources={"device": "cuda"})
    with pytest.raises(InvalidInput) as caught:
        select_dtype(spec, CPU)
    assert (caught.value.code, caught.value.field) == ("fp16_needs_accelerator", f"{part}.dtype")
    assert select_dtype(spec_of(training={"dtype": "bf16"}), CPU) == torch.bfloat16


def test_noise_and_checkpointing_do_what_they_are_for(
    tmp_path: Path, model_path: Path, pipeline: Pipeline
) -> None:
    def run(**setting: Any) -> tuple[torch.Tensor, RecordingMonitor]:
        monitor = RecordingMonitor()
        task = make_task(
            tmp_path,
            model_path,
            training={"max_steps": 2, "learning_rate": RATE, **setting},
            data={"validation_fraction": 0.25},
        )
        return train(pipeline, task, monitor), monitor

    plain, plain_seen = run()
    recomputed, _ = run(gradient_checkpointing=True)
    torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)
    noisy, noisy_seen = run(neftune_noise_alpha=10.0)
    assert noisy_seen.metrics("loss")[0] != plain_seen.metrics("loss")[0]
    assert not torch.allclose(noisy, plain)


def test_evaluation_and_checkpoints_by_step_epoch_and_time(
    tmp_path: Path, model_path: Path, pipeline: Pipeline
) -> None:
    def run(**setting: Any) -> tuple[list[int], list[int]]:
        monitor = RecordingMonitor()
        # Six rows for training, three steps an epoch.
        task = make_task(
            tmp_path,
            model_path,
            training={
                "epochs": 2.0,
                "batch_size": 1,
                "gradient_accumulation_steps": 2,
                "learning_rate": RATE,
                **setting,
            },
            data={"validation_fraction": 0.25},
        )
        pipeline.run(task, monitor)
        evaluated = [e["step"] for e in monitor.events if e.get("eval_loss") is not None]
        return evaluated, [e["step"] for e in monitor.events if e["event"] == "checkpoint"]

    assert run() == ([3, 6], [])
    # The end is measured too, so that the last weights may be the best.
    assert run(eval_steps=4) == ([4, 6], [])
    assert run(eval_seconds=1e-9) == ([1, 2, 3, 4, 5, 6], [])
    assert run(eval_seconds=1000.0, save_strategy="epoch") == ([6], [3])
    assert run(save_steps=2)[1] == [2, 4]


def test_auto_targets_are_those_of_peft_or_all(model_path: Path, tmp_path: Path) -> None:
    modules = linear_modules(load_causal_lm(model_path, torch.float32))
    chosen = auto_targets("llama", modules)
    assert {name.rsplit(".", 1)[-1] for name in chosen} == {"q_proj", "v_proj"}
    assert auto_targets("an-architecture-of-tomorrow", modules) == list(modules)
    task = make_task(tmp_path, model_path, lora={"r": 2, "target_modules": "auto"})
    trained = weights_of(Pipeline().run(task, RecordingMonitor()))
    assert {name.split(".")[-3] for name in trained} == {"q_proj", "v_proj"}


def test_a_base_in_four_bits_trains_an_adapter_for_the_ordinary_base(
    tmp_path: Path, model_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    pipeline = Pipeline()
    training = {"max_steps": 3, "learning_rate": RATE, "load_in_4bit": True}
    task = make_task(tmp_path, model_path, training=training)
    monitor = RecordingMonitor()
    result = pipeline.run(task, monitor)
    first = flat(weights_of(result))
    # The adapter keeps the precision of the spec, and the base its four bits for the next job.
    assert not torch.equal(first, first.bfloat16().float())
    assert torch.equal(train(pipeline, task.model_copy(update={"work_dir": tmp_path})), first)
    full = make_task(tmp_path, model_path, training={**training, "load_in_4bit": False})
    full_monitor = RecordingMonitor()
    assert not torch.allclose(train(pipeline, full, full_monitor), first)
    losses = (monitor.metrics("loss")[0], full_monitor.metrics("loss")[0])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)
    base = load_causal_lm(model_path, torch.float32)
    tokens = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        plain = base(input_ids=tokens).logits
        model = attach_lora(base, task.spec.lora, linear_modules(base), "tiny")
        begin_from(model, Path(result["artifact_dir"]))
        adapted = model(input_ids=tokens).logits
    assert torch.isfinite(adapted).all()
    assert not torch.equal(plain, adapted)


def test_four_bits_without_the_package_are_refused_with_a_code(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    task = make_task(tmp_path, model_path, training={"load_in_4bit": True})
    with pytest.raises(InvalidInput) as caught:
        Pipeline().run(task, RecordingMonitor())
    assert caught.value.code == "bitsandbytes_missing"
    assert caught.value.field == "training.load_in_4bit"


def test_training_begins_with_the_weights_of_the_adapter_it_goes_on_from(
    tmp_path: Path, model_path: Path, pipeline: Pipeline
) -> None:
    data = {"validation_fraction": 0.25}
    first = pipeline.run(
        make_task(
            tmp_path, model_path, data=data, training={"max_steps": 4, "learning_rate": RATE}
        ),
        RecordingMonitor(),
    )
    small = {"max_steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0}
    task = make_task(tmp_path, model_path, data=data, training=small)
    task = task.model_copy(update={"continue_dir": Path(first["artifact_dir"])})
    continued = pipeline.run(task, RecordingMonitor())
    assert first["report"]["base_eval_loss"] - first["report"]["eval_loss"] > 0.01
    assert continued["report"]["eval_loss"] == pytest.approx(first["report"]["eval_loss"], abs=1e-6)
    torch.testing.assert_close(
        flat(weights_of(continued)), flat(weights_of(first)), rtol=0, atol=1e-9
    )
    larger = make_task(tmp_path, model_path, lora={"r": 8})
    with pytest.raises(InvalidInput) as caught:
        pipeline.run(
            larger.model_copy(update={"continue_dir": Path(first["artifact_dir"])}),
            RecordingMonitor(),
        )
    assert caught.value.code == "continue_shape_mismatch"
