"""One epoch of training in a process of its own: `python -m benchmarks.training_run MODE MODEL`.

Prints one line of JSON: the seconds that `train()` took, the tokens of the rows, the process's peak
memory, the loss of each step and the loss on rows that were not trained.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from core.data.quiet import silence_libraries

# A plain script has torch's threads wait as they do by themselves.
if not {"checkpointing", "plain"} & set(sys.argv):
    silence_libraries()

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from core.causal_lm import linear_modules, load_causal_lm
from core.data.ingest import read_rows
from core.data.rendering import TrainingRow, render_row
from core.data.schema import to_example
from core.data.tokenizer import load_tokenizer
from core.specs import JobSpec
from core.training.checkpoints import ResumableTrainer
from core.training.device import set_threads
from core.training.lora import attach_lora
from core.training.memory_ladder import plan_batches
from core.training.methods import build_trainer
from core.training.sampling import order_batches

ROWS: Final = 96
_HELD_OUT: Final = 24
_PAIRS = Path(__file__).parents[1] / "examples" / "support_desk" / "train.jsonl"
# Exchanges in a conversation; the rows have 213 tokens on average, half of them answers.
_EXCHANGES = (1, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7)


class _Silent:
    """A monitor that nobody listens to."""

    stop_reason = None

    def send(self, event: str, **fields: Any) -> None:
        """Drop the event."""

    def check_stop(self) -> None:
        """Go on."""


def make_rows(tokenizer: Any) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """Return rows to train and rows to measure on: conversations put together from examples."""
    pairs = [row["messages"] for _, row in read_rows(_PAIRS)]
    chance = random.Random(0)
    rows = []
    for _ in range(ROWS + _HELD_OUT):
        chosen = chance.sample(pairs, chance.choice(_EXCHANGES))
        messages = [turn for pair in chosen for turn in pair]
        rows.append(render_row(to_example({"messages": messages}, "messages"), tokenizer))
    return rows[:ROWS], rows[ROWS:]


def make_spec(*, group_by_length: bool) -> JobSpec:
    """Return the job: rank 16 on all linear layers, batches of 2 x 2, one epoch."""
    return JobSpec.model_validate(
        {
            "base_model": "sample",
            "dataset": "sample",
            "lora": {"r": 16},
            "training": {"epochs": 1, "warmup_ratio": 0.0, "batch_size": 2},
            "data": {"group_by_length": group_by_length},
        }
    )


def ours(
    model_dir: Path,
    tokenizer: Any,
    spec: JobSpec,
    rows: Sequence[TrainingRow],
    held_out: Sequence[TrainingRow],
    work_dir: Path,
) -> ResumableTrainer:
    """Return our trainer, as the pipeline makes it."""
    model = load_causal_lm(model_dir, torch.float32)
    set_seed(0)
    return build_trainer(
        attach_lora(model, spec.lora, linear_modules(model), "sample"),
        tokenizer,
        spec,
        rows,
        held_out,
        plan=plan_batches(spec.training, 0),
        work_dir=work_dir,
        device=torch.device("cpu"),
        dtype=torch.float32,
        monitor=_Silent(),
        callbacks=[],
        started=time.monotonic(),
    )


def plain(
    model_dir: Path,
    tokenizer: Any,
    spec: JobSpec,
    rows: Sequence[TrainingRow],
    work_dir: Path,
    *,
    checkpointing: bool,
    sequential: bool = False,
) -> SFTTrainer:
    """Return TRL's trainer as a script makes it, with the same settings."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    set_seed(0)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.lora.r,
        lora_alpha=spec.lora.alpha,
        target_modules="all-linear",
    )
    training = spec.training
    return SFTTrainer(
        model=get_peft_model(model, lora),
        args=SFTConfig(
            output_dir=str(work_dir / "plain"),
            num_train_epochs=training.epochs,
            per_device_train_batch_size=training.batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            optim=training.optim,
            learning_rate=training.learning_rate,
            max_grad_norm=training.max_grad_norm,
            train_sampling_strategy="sequential" if sequential else "random",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            # On a CPU TRL would otherwise train in bfloat16.
            bf16=False,
            activation_checkpointing=checkpointing,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(
            [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
        ),
        processing_class=tokenizer,
    )


def run(mode: str, model_dir: Path, work_dir: Path) -> dict[str, Any]:
    """Train an epoch and return what was measured."""
    set_threads(0)
    tokenizer = load_tokenizer(model_dir)
    rows, held_out = make_rows(tokenizer)
    spec = make_spec(group_by_length=mode != "random-order")
    if mode == "losses":
        # TRL gets the rows in the order in which ours come.
        order = order_batches(spec, plan_batches(spec.training, 0))
        batches = order.batches([len(row.input_ids) for row in rows], epoch=0)
        rows = [rows[index] for batch in batches for index in batch]
    trainer: Any
    if mode in ("ours", "random-order"):
        trainer = ours(model_dir, tokenizer, spec, rows, held_out, work_dir)
    else:
        trainer = plain(
            model_dir,
            tokenizer,
            spec,
            rows,
            work_dir,
            checkpointing=mode == "checkpointing",
            sequential=mode == "losses",
        )
    evaluate = getattr(trainer, "mean_loss", None)
    trainer.args.eval_strategy = "no"
    started, processor_started = time.monotonic(), time.process_time()
    trainer.train()
    return {
        "seconds": time.monotonic() - started,
        "processor_seconds": time.process_time() - processor_started,
        "tokens": sum(len(row.input_ids) for row in rows),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "held_out_loss": evaluate(trainer.eval_dataset) if evaluate else None,
    }


def main() -> None:
    """Run the mode that is named."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "mode", choices=("ours", "random-order", "checkpointing", "plain", "losses")
    )
    parser.add_argument("model", type=Path)
    given = parser.parse_args()
    # Trainer prints its logs.
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        measured = run(given.mode, given.model, Path(name))
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
