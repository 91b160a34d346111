"""What makes training fast changes nothing: losses and gradients are those of the plain way."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MixtralConfig, set_seed
from trl import SFTConfig, SFTTrainer

from core.causal_lm import linear_modules, load_causal_lm
from core.data.rendering import IGNORED_LABEL, TrainingRow, render_row
from core.data.schema import to_example
from core.data.tokenizer import load_tokenizer
from core.errors import TrainingFailed
from core.specs import JobSpec, LoraSpec
from core.training import token_loss
from core.training.batches import PaddedBatch
from core.training.checkpoints import ResumableTrainer
from core.training.fused_layers import fuse_layers
from core.training.lora import attach_lora, load_weights
from core.training.memory_ladder import plan_batches
from core.training.methods import build_trainer
from core.training.saving import SavingCallback
from core.training.token_loss import TokenLossFunction, head_loss
from tests.support.tiny_model import make_tiny_model
from tests.support.training import ROWS, RecordingMonitor

STEPS = 20
SMALL = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def rows(model_path: Path) -> list[TrainingRow]:
    tokenizer = load_tokenizer(model_path)
    return [render_row(to_example(row, "messages"), tokenizer) for row in ROWS]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_spec(**training: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "base_model": "tiny",
            "dataset": "file-1",
            "lora": {"r": 4},
            "data": {"shuffle": False},
            "training": {"max_steps": STEPS, "learning_rate": 5e-3, "warmup_ratio": 0.0} | training,
        }
    )


def make_trainer(
    model_path: Path,
    rows: list[TrainingRow],
    spec: JobSpec,
    work_dir: Path,
    monitor: RecordingMonitor | None = None,
) -> ResumableTrainer:
    monitor = monitor or RecordingMonitor()
    model = load_causal_lm(model_path, torch.float32)
    set_seed(0)
    saving = SavingCallback(monitor, spec.training)
    trainer = saving.trainer = build_trainer(
        attach_lora(model, spec.lora, linear_modules(model), "tiny"),
        load_tokenizer(model_path),
        spec,
        rows,
        [],
        plan=plan_batches(spec.training, 0),
        work_dir=work_dir,
        device=torch.device("cpu"),
        dtype=torch.float32,
        monitor=monitor,
        callbacks=[saving],
        started=time.monotonic(),
    )
    return trainer


def losses_of(trainer: Any) -> list[float]:
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_loss_of_each_step_is_that_of_trl(
    tmp_path: Path, model_path: Path, rows: list[TrainingRow]
) -> None:
    spec = make_spec()
    ours = make_trainer(model_path, rows, spec, tmp_path / "ours")
    # TRL gets the rows in the order of our batches.
    order = [index for batch in ours.get_train_dataloader().batch_sampler for index in batch]
    assert order != list(range(len(rows)))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    set_seed(0)
    modules = linear_modules(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = SFTTrainer(
            model=attach_lora(model, spec.lora, modules, "tiny"),
            args=SFTConfig(
                output_dir=str(tmp_path / "plain"),
                max_steps=STEPS,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                learning_rate=5e-3,
                optim=spec.training.optim,
                train_sampling_strategy="sequential",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                activation_checkpointing=False,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(
                [
                    {"input_ids": rows[index].input_ids, "labels": rows[index].labels}
                    for index in order
                ]
            ),
            processing_class=load_tokenizer(model_path),
        )
        expected = losses_of(plain)
    measured = losses_of(ours)
    assert len(measured) == STEPS
    assert measured[-1] < 0.8 * measured[0]
    assert measured == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("positions_at_once", [3, 1000])
@pytest.mark.parametrize("bias", [True, False])
def test_the_head_in_parts_is_the_head_at_once(
    monkeypatch: pytest.MonkeyPatch, positions_at_once: int, bias: bool
) -> None:
    monkeypatch.setattr(token_loss, "_FEWEST_POSITIONS", positions_at_once)
    monkeypatch.setattr(token_loss, "_LOGITS_BYTES", 1)
    torch.manual_seed(0)
    hidden = torch.randn(10, 8, requires_grad=True)
    head = nn.Linear(8, 50, bias=bias).requires_grad_(False)
    targets = torch.randint(50, (10,))
    targets[:4] = head(hidden).argmax(-1)[:4]

    sums = head_loss(hidden, head.weight, head.bias, targets)
    (3 * sums.total).backward()
    gradient = hidden.grad
    hidden.grad = None
    logits = head(hidden)
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    (3 * expected).backward()
    torch.testing.assert_close(sums.total, expected)
    torch.testing.assert_close(gradient, hidden.grad)
    assert int(sums.correct) == int((logits.argmax(-1) == targets).sum()) >= 4
    assert head.weight.grad is None


MODELS: dict[str, tuple[Any, bool]] = {
    "causal": (LlamaConfig(**SMALL), False),
    "eager": (LlamaConfig(**SMALL, attn_implementation="eager"), True),
    "sliding window": (MistralConfig(**SMALL, sliding_window=4), True),
    "mixture of experts": (MixtralConfig(**SMALL, num_local_experts=4), True),
}


# PEFT asks for it under the name that transformers is giving up.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_no_loss(name: str) -> None:
    config, masked = MODELS[name]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    modules = {
        module: shape for module, shape in linear_modules(base).items() if "self_attn" in module
    }
    model = attach_lora(base, LoraSpec(r=4), modules, "small").eval()
    compute = TokenLossFunction(model)
    seen: list[dict[str, Any]] = []
    base.model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given), with_kwargs=True
    )

    generator = torch.Generator().manual_seed(1)
    items = []
    for length in (17, 5, 11):
        ids = torch.randint(3, 384, (length,), generator=generator).tolist()
        items.append({"input_ids": ids, "labels": [IGNORED_LABEL] * 2 + ids[2:-1] + [-100]})
    collate = PaddedBatch(0)
    together = compute(model, collate(items))
    assert ("attention_mask" in seen[-1] and seen[-1]["attention_mask"] is not None) == masked
    alone = [compute(model, collate([item])) for item in items]
    expected = [
        functional.cross_entropy(
            model(input_ids=torch.tensor([item["input_ids"]])).logits[0, :-1],
            torch.tensor(item["labels"][1:]),
            reduction="sum",
        )
        for item in items
    ]
    torch.testing.assert_close(together.total, sum(expected))
    torch.testing.assert_close(sum(sums.total for sums in alone), sum(expected))


def test_a_batch_ends_with_the_last_position_that_predicts() -> None:
    batch = PaddedBatch(7)(
        [
            {"input_ids": [1, 2, 3, 7, 5], "labels": [-100, -100, 3, 7, -100]},
            {"input_ids": [4, 5], "labels": [4, 5]},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["targets"].tolist() == [[-100, 3, 7], [5, -100, -100]]
    assert (batch["row_tokens"], batch["trained_tokens"]) == (7, 3)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fused_layers_compute_what_those_of_peft_do(model_path: Path, dropout: float) -> None:
    ids = torch.arange(3, 60).view(3, 19)

    def gradients(fuse: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        base = load_causal_lm(model_path, torch.float32)
        torch.manual_seed(0)
        spec = LoraSpec(r=4, dropout=dropout)
        model = attach_lora(base, spec, linear_modules(base), "tiny").train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        if fuse:
            # Seven products and two normalisations a layer, and the last normalisation.
            assert fuse_layers(model) == 2 * 9 + 1
        torch.manual_seed(1)
        loss = model(input_ids=ids).logits.square().mean()
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert all("lora_" in name for name in found)
        return loss.detach(), found

    loss, found = gradients(fuse=True)
    expected_loss, expected = gradients(fuse=False)
    torch.testing.assert_close(loss, expected_loss)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_fused_layers_are_those_of_peft_outside_of_training(model_path: Path) -> None:
    base = load_causal_lm(model_path, torch.float32)
    model = attach_lora(base, LoraSpec(r=4), linear_modules(base), "tiny").eval()
    ids = torch.arange(3, 30).unsqueeze(0)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        fuse_layers(model)
        assert torch.equal(model(input_ids=ids).logits, expected)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        model.train()
        assert not torch.equal(model(input_ids=ids).logits, expected)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_gradient_that_is_no_number_stops_before_the_weights_change(
    tmp_path: Path, model_path: Path, rows: list[TrainingRow], factor: float
) -> None:
    monitor = RecordingMonitor(keep_dir=tmp_path / "kept")
    trainer = make_trainer(model_path, rows, make_spec(save_steps=1), tmp_path / "work", monitor)
    parameter = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
    parameter.register_hook(
        lambda gradient: gradient * factor if trainer.state.global_step == 3 else gradient
    )
    with pytest.raises(TrainingFailed) as caught:
        trainer.train()
    assert caught.value.code == "gradient_not_finite"
    assert "step 4" in str(caught.value)

    # The checkpoints are whole, and the weights still those of the last one.
    assert list(monitor.checkpoints) == [1, 2, 3]
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    load_weights(trainer.model, monitor.checkpoints[3] / "adapter_model.safetensors")
    for name, weights in trainer.model.named_parameters():
        assert torch.equal(weights, before[name])
        assert torch.isfinite(weights).all()


def test_a_loss_that_is_no_number_stops_before_the_weights_change(
    tmp_path: Path, model_path: Path, rows: list[TrainingRow]
) -> None:
    trainer = make_trainer(model_path, rows, make_spec(), tmp_path / "work")
    norm = trainer.model.get_base_model().model.norm
    norm.register_forward_hook(
        lambda _, given, out: out * math.nan if trainer.state.global_step == 2 else out
    )
    with pytest.raises(TrainingFailed) as caught:
        trainer.train()
    assert caught.value.code == "loss_not_finite"
    assert "step 3" in str(caught.value)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
