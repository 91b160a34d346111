"""The numbers: the loss and the update by hand, and that a job leaves no trace in the next one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, set_seed

from core.artifacts import read_manifest
from core.causal_lm import linear_modules, load_causal_lm
from core.child import Stopped
from core.data.rendering import IGNORED_LABEL, render_row
from core.data.schema import to_example
from core.data.tokenizer import load_tokenizer
from core.errors import TrainingFailed
from core.training.base_model import share_weights
from core.training.lora import attach_lora
from core.training.pipeline import Pipeline
from core.training.task import TrainTask
from tests.support.tiny_model import make_tiny_model
from tests.support.training import ROWS, RecordingMonitor, make_broken_model, make_task

STEPS = 3
RATE = 5e-3


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def weights_of(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(result["artifact_dir"]) / "adapter_model.safetensors")


def digest_of_run(pipeline: Pipeline, task: TrainTask) -> str:
    return read_manifest(Path(pipeline.run(task, RecordingMonitor())["artifact_dir"])).digest


def train_by_hand(model_path: Path, task: TrainTask) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train with nothing but torch: one row at a time, no padding, AdamW, linear decay."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(model_path)
    rows = [render_row(to_example(row, "messages"), tokenizer) for row in ROWS]
    model = load_causal_lm(model_path, torch.float32)
    set_seed(task.spec.training.seed)
    model = attach_lora(model, task.spec.lora, linear_modules(model), "tiny").train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        batch = [rows[(4 * step + index) % len(rows)] for index in range(4)]
        trained_tokens = sum(row.trained_tokens for row in batch)
        loss_of_step = 0.0
        for row in batch:
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
            targets = torch.tensor(row.labels[1:])
            loss = functional.cross_entropy(
                logits, targets, ignore_index=IGNORED_LABEL, reduction="sum"
            )
            (loss / trained_tokens).backward()
            loss_of_step += loss.item() / trained_tokens
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_of_step)
    state = {
        name.replace(".default", ""): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return losses, state


def test_losses_and_weights_equal_those_computed_by_hand(tmp_path: Path, model_path: Path) -> None:
    task = make_task(
        tmp_path,
        model_path,
        data={"shuffle": False},
        training={"max_steps": STEPS, "learning_rate": RATE, "seed": 11},
    )
    losses, weights = train_by_hand(model_path, task)
    monitor = RecordingMonitor()
    trained = weights_of(Pipeline().run(task, monitor))

    assert monitor.metrics("loss") == pytest.approx(losses, rel=1e-5)
    # Both accumulate the same gradients in another order.
    assert trained.keys() == weights.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-5)


def test_warm_and_fresh_trainers_give_the_same_adapter_after_any_ending(
    tmp_path: Path, model_path: Path
) -> None:
    other_model = make_broken_model(tmp_path / "broken")

    def task(**spec: Any) -> TrainTask:
        training = {"max_steps": 3, "learning_rate": 1e-2, "seed": 5}
        lora = {"r": 4, "dropout": 0.1}
        return make_task(tmp_path, model_path, training=training, lora=lora, **spec)

    fresh = digest_of_run(Pipeline(), task())

    warm = Pipeline()
    assert digest_of_run(warm, task()) == fresh
    # Another shape of job, with validation and samples, then one that stops, then one that fails.
    warm.run(
        make_task(
            tmp_path,
            model_path,
            lora={"r": 8, "target_modules": ["q_proj"]},
            data={"validation_fraction": 0.3},
            evaluation={"samples": 2, "max_new_tokens": 3},
        ),
        RecordingMonitor(),
    )
    assert digest_of_run(warm, task()) == fresh
    with pytest.raises(Stopped):
        warm.run(task(), RecordingMonitor(lambda event, fields: fields.get("step") == 2))
    assert digest_of_run(warm, task()) == fresh
    with pytest.raises(TrainingFailed):
        warm.run(make_task(tmp_path, other_model), RecordingMonitor())
    assert digest_of_run(warm, task()) == fresh

    other_seed = task().model_copy(
        update={"spec": make_task(tmp_path, model_path, training={"seed": 6}).spec}
    )
    assert digest_of_run(warm, other_seed) != fresh


def test_the_warm_base_computes_the_same_bits_after_jobs(tmp_path: Path, model_path: Path) -> None:
    task = make_task(tmp_path, model_path, evaluation={"samples": 1, "max_new_tokens": 2})
    pipeline = Pipeline()
    tokens = torch.arange(3, 40).unsqueeze(0)
    plain = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    torch.set_num_threads(1)

    def logits() -> torch.Tensor:
        model = pipeline._bases.borrow(task.base, torch.float32, torch.device("cpu"))
        with torch.no_grad():
            return model(input_ids=tokens).logits

    with torch.no_grad():
        expected = plain(input_ids=tokens).logits
    assert torch.equal(logits(), expected)
    pipeline.run(task, RecordingMonitor())
    assert torch.equal(logits(), expected)
    model = pipeline._bases.borrow(task.base, torch.float32, torch.device("cpu"))
    assert "forward" not in vars(model)
    assert model.config.to_dict() == plain.config.to_dict()
    assert not any(p.requires_grad for p in model.parameters())


def test_a_lent_model_shares_weights_and_nothing_else(model_path: Path) -> None:
    base = load_causal_lm(model_path, torch.float32)
    lent = share_weights(base)
    shared = {id(p) for p in base.parameters()}
    assert {id(p) for p in lent.parameters()} == shared
    assert lent.get_output_embeddings().weight is lent.get_input_embeddings().weight
    assert not {id(m) for m in base.modules()} & {id(m) for m in lent.modules()}
    assert lent.config is not base.config
    lent.register_forward_hook(lambda *_: None)
    assert not base._forward_hooks
