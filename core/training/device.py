"""Choose the device, the precision and the threads of a job."""

from __future__ import annotations

import os

import torch

from core.errors import InvalidInput

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
    """Return the torch device for a setting such as `auto`, `cpu`, `cuda:1` or `mps`.

    Once `pin_gpu` has been called, the one GPU that is left is meant by every `cuda:N`.

    Raises:
        InvalidInput: Code `device_missing`; this machine has no such device.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        if device.type == "cuda" and _gpu_is_pinned:
            device = torch.device("cuda", 0)
    except RuntimeError as error:
        raise _missing(wanted) from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise _missing(wanted)
    return device


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


def _missing(wanted: str) -> InvalidInput:
    return InvalidInput(
        f"this machine has no device {wanted!r}",
        code="device_missing",
        field="device",
        hint="Set TUNESMITH_DEVICE to auto, cpu, cuda, cuda:N or mps.",
    )
