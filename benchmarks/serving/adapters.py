"""Random adapters of rank 16 on all linear layers, by the dozen."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.artifacts import WEIGHTS_FILE
from tests.support.adapters import make_adapter, reseal

RANK = 16
# Small enough that answers stay text, large enough to pass the gate that asks for an effect.
_SCALE = 0.01


def make_adapters(root: Path, model_dir: Path, numbers: range) -> list[Path]:
    """Write the adapters of these numbers below `root` and return their directories.

    The first is made by PEFT, the others from it: that takes a tenth of the time.
    """
    first = root / "adapter-0"
    if not first.exists():
        make_adapter(first, model_dir, r=RANK, scale=_SCALE, seed=0)
    matrices = load_file(first / WEIGHTS_FILE)
    return [_vary(first, matrices, number) if number else first for number in numbers]


def _vary(first: Path, matrices: dict[str, Tensor], number: int) -> Path:
    path = first.with_name(f"adapter-{number}")
    shutil.copytree(first, path)
    generator = torch.Generator().manual_seed(number)
    others = {
        name: torch.randn(matrix.shape, generator=generator) * _SCALE
        for name, matrix in matrices.items()
    }
    save_file(others, path / WEIGHTS_FILE, metadata={"format": "pt"})
    return reseal(path)


def pack(adapter: Path) -> bytes:
    """Return an adapter as an archive; random numbers are not worth compressing."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz", compresslevel=0) as tar:
        for path in sorted(adapter.iterdir()):
            tar.add(path, path.name)
    return archive.getvalue()
