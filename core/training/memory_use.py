"""How much memory a training takes."""

from __future__ import annotations

import psutil
import torch

_process = psutil.Process()


def used_memory(device: torch.device) -> int:
    """Return bytes: the peak of the tensors on a GPU, elsewhere what the process holds now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(_process.memory_info().rss)
