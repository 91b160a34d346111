"""Choose the device, the precision and the threads of a job."""

from __future__ import annotations

import os

import torch

from core import causal_lm
from core.errors import InvalidInput
from core.specs import JobSpec

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_gpu_is_pinned = False


def pin_gpu(wanted: str) -> None:
    """Let this process see one GPU only, the wanted one; to be called before CUDA is used.

    Trainer would otherwise spread a job over all of them. Only the first call has an effect.

    Args:
        wanted: A device setting; for anything but `auto`, `cuda` and `cuda:N` nothing happens.
    """
    global _gpu_is_pinned
    if _gpu_is_pinned or not wanted.startswith(("auto", "cuda")):
        return
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    index = wanted.partition(":")[2] or "0"
    if visible and index.isdigit() and int(index) < len(visible):
        index = visible[int(index)]
    os.environ["CUDA_VISIBLE_DEVICES"] = index
    _gpu_is_pinned = True


def select_device(wanted: str) -> torch.device:
    """Return the job's device; the one GPU that `pin_gpu` left is meant by every `cuda:N`.

    Raises:
        InvalidInput: Code `device_missing`; this machine has no such device.
    """
    return causal_lm.select_device("cuda" if _gpu_is_pinned and "cuda" in wanted else wanted)


def select_dtype(spec: JobSpec, device: torch.device) -> torch.dtype:
    """Return the precision of the base weights; `auto` is bf16 on CUDA, float32 elsewhere.

    Raises:
        InvalidInput: Code `fp16_needs_accelerator`; this machine has a CPU for the job.
    """
    wanted = spec.training.dtype
    if device.type == "cpu" and "fp16" in (wanted, spec.lora.dtype):
        raise InvalidInput(
            "fp16 is not trained on CPUs",
            code="fp16_needs_accelerator",
            field="training.dtype" if wanted == "fp16" else "lora.dtype",
            hint="Use bf16, or a worker with an accelerator.",
        )
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[wanted]


def set_threads(threads: int) -> int:
    """Set and return the number of torch threads; 0 is all cores this process may use."""
    count = threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads
    count = count or os.cpu_count() or 1
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
    return count
