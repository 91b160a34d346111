"""From a JobSpec to the arguments of TRL's trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from core.costs import recomputes
from core.data.split import count_steps
from core.specs import JobSpec, TrainingSpec
from core.training.memory_ladder import BatchPlan

_EVALUATES = {"epoch": "epoch", "steps": "steps", "time": "steps"}
_NEVER = 10**9


def build_arguments(
    config: Callable[..., Any],
    spec: JobSpec,
    plan: BatchPlan,
    work_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rows: int,
    parameters: int,
    validate: bool,
    **own: Any,
) -> Any:
    """Return the arguments of the trainer.

    Args:
        config: Class of the arguments, one for each of TRL's trainers.
        spec: The job.
        plan: How the rows of a step are divided.
        work_dir: Where the trainer may write.
        device: Where the model is.
        dtype: Precision of the base weights.
        rows: Training rows.
        parameters: Of the model, adapter included.
        validate: Whether there are validation rows.
        own: What only this class has.
    """
    training: TrainingSpec = spec.training
    on_cpu = device.type == "cpu"
    return config(
        output_dir=str(work_dir / "trainer"),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=plan.batch_size,
        per_device_eval_batch_size=plan.batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        optim=training.optim,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        # Rounded down, unlike Trainer's ratio: the first warm-up step has a rate of zero, so a job
        # of a single step would learn nothing.
        warmup_steps=math.floor(count_steps(rows, training) * training.warmup_ratio),
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        # None where the optimizer is another than Adam, which reads none of these.
        adam_epsilon=training.adam_epsilon or 1e-8,
        max_grad_norm=training.max_grad_norm,
        neftune_noise_alpha=training.neftune_noise_alpha,
        seed=training.seed,
        data_seed=training.seed,
        train_sampling_strategy="random" if spec.data.shuffle else "sequential",
        logging_steps=training.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy=_EVALUATES[training.eval_strategy] if validate else "no",
        # By time `SavingCallback` decides; Trainer then finds no step due.
        eval_steps=training.eval_steps or _NEVER,
        metric_for_best_model="eval_loss",
        # Ours to decide, see `SavingCallback`.
        save_strategy="no",
        # The patience that early stopping has left.
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=on_cpu,
        bf16=dtype == torch.bfloat16 and device.type == "cuda",
        # Loss scaling needs trained weights of float32; half precision throughout has none.
        fp16=dtype == torch.float16
        and device.type == "cuda"
        and spec.lora.dtype in ("auto", "fp32"),
        activation_checkpointing=plan.activation_checkpointing
        or recomputes(training, device.type, parameters),
        dataloader_pin_memory=device.type == "cuda",
        # Rows are checked against the limit before; nothing may cut or drop them here.
        max_length=None,
        remove_unused_columns=False,
        **own,
    )
