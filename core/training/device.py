"""Choose the device, the precision and the threads of a job."""

from __future__ import annotations

import os

import torch

from core import causal_lm

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


def select_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the precision of the base weights; `auto` is bf16 on CUDA, float32 elsewhere."""
    if wanted == "bf16" or (wanted == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return torch.float32


def set_threads(threads: int) -> int:
    """Set and return the number of torch threads; 0 is all cores this process may use."""
    count = threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads
    count = count or os.cpu_count() or 1
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
    return count
