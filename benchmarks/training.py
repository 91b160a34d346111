"""A few optimizer steps of ours beside a plain TRL script, on the same rows and settings."""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from benchmarks.report import Measurement
from core.causal_lm import linear_modules
from core.data.ingest import read_rows
from core.data.rendering import TrainingRow, render_row
from core.data.schema import to_example
from core.data.tokenizer import load_tokenizer
from core.specs import JobSpec
from core.training.lora import attach_lora
from core.training.trainer import build_trainer

STEPS = 6
ROWS = Path(__file__).parents[1] / "examples" / "support_desk" / "train.jsonl"


def measure(model_dir: Path, rounds: int) -> list[Measurement]:
    """Run all measurements of training."""
    tokenizer = load_tokenizer(model_dir)
    rows = _rows(tokenizer)
    spec = JobSpec.model_validate(
        {
            "base_model": "sample",
            "dataset": "sample",
            "training": {"max_steps": STEPS, "warmup_ratio": 0.0},
            "data": {"shuffle": False},
        }
    )
    ours: list[float] = []
    plain: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(rounds):
            ours.append(_ours(model_dir, tokenizer, spec, rows, Path(name)))
            for checkpointing, samples in plain.items():
                samples.append(_plain(model_dir, tokenizer, spec, rows, Path(name), checkpointing))
    return [
        Measurement(f"training, {label}", "tokens/s", ours, plain[checkpointing], peer)
        for checkpointing, label, peer in (
            (True, "TRL as it comes", "SFTTrainer with its default activation checkpointing"),
            (False, "TRL without checkpointing", "SFTTrainer, activation_checkpointing=False"),
        )
    ]


def _rows(tokenizer: Any) -> list[TrainingRow]:
    return [render_row(to_example(row, "messages"), tokenizer) for _, row in read_rows(ROWS)]


def _trained_through(rows: list[TrainingRow], spec: JobSpec) -> int:
    per_step = spec.training.batch_size * spec.training.gradient_accumulation_steps
    return sum(len(row.input_ids) for row in rows[: STEPS * per_step])


def _model(model_dir: Path) -> Any:
    set_seed(0)
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def _ours(
    model_dir: Path, tokenizer: Any, spec: JobSpec, rows: list[TrainingRow], work_dir: Path
) -> float:
    model = _model(model_dir)
    model = attach_lora(model, spec.lora, linear_modules(model), "sample")
    trainer = build_trainer(
        model,
        tokenizer,
        spec,
        rows,
        [],
        work_dir=work_dir,
        device=torch.device("cpu"),
        dtype=torch.float32,
        callbacks=[],
    )
    return _rate(trainer, rows, spec)


def _plain(
    model_dir: Path,
    tokenizer: Any,
    spec: JobSpec,
    rows: list[TrainingRow],
    work_dir: Path,
    checkpointing: bool,
) -> float:
    model = _model(model_dir)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.lora.r,
        lora_alpha=spec.lora.alpha,
        target_modules="all-linear",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SFTTrainer(
            model=get_peft_model(model, lora),
            args=SFTConfig(
                output_dir=str(work_dir / "plain"),
                max_steps=STEPS,
                per_device_train_batch_size=spec.training.batch_size,
                gradient_accumulation_steps=spec.training.gradient_accumulation_steps,
                learning_rate=spec.training.learning_rate,
                train_sampling_strategy="sequential",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                activation_checkpointing=checkpointing,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(
                [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
            ),
            processing_class=tokenizer,
        )
    return _rate(trainer, rows, spec)


def _rate(trainer: Any, rows: list[TrainingRow], spec: JobSpec) -> float:
    started = time.monotonic()
    trainer.train()
    return _trained_through(rows, spec) / (time.monotonic() - started)
