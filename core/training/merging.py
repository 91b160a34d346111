"""Whole models out of a base and an adapter: safetensors directories and GGUF files."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open

from core.artifacts import BASE_FILE, CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from core.causal_lm import load_causal_lm, unreadable
from core.errors import InvalidInput, TrainingFailed

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_OUTTYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "q8_0": "q8_0"}
_ADAPTERS_OWN = frozenset({BASE_FILE, CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE})
_FOLDER = "model"
# Loading and saving hold a shard besides the weights.
_MEMORY_FACTOR = 1.2
_ERROR_CHARACTERS = 500


def merge(base: Path, adapter: Path, target: Path, dtype: str) -> None:
    """Write base and adapter as one model directory, with the adapter's tokenizer and template.

    The sum is made in float32 and rounded once.

    Args:
        base: The base model's directory.
        adapter: The artifact's.
        target: Directory to create.
        dtype: `fp32`, `fp16` or `bf16`.

    Raises:
        InvalidInput: Code `model_unreadable` or `weights_incomplete`.
        TrainingFailed: Code `not_enough_memory` or `merge_not_finite`.
    """
    from peft import PeftModel

    _check_memory(base)
    model: Any = load_causal_lm(base, torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
    model = model.merge_and_unload(safe_merge=False).to(_DTYPES[dtype])
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise TrainingFailed(
                f"{name} has values that {dtype} cannot hold",
                code="merge_not_finite",
                hint="Export as fp32 or bf16.",
            )
    target.mkdir(parents=True)
    model.save_pretrained(target)
    for file in sorted(adapter.iterdir()):
        if file.is_file() and file.name not in _ADAPTERS_OWN:
            shutil.copyfile(file, target / file.name)


def pack(directory: Path, target: Path) -> Path:
    """Move a directory's files into a tar below one folder; equal files give an equal archive."""
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as archive:
        for file in sorted(directory.iterdir()):
            # Without times and owners.
            entry = tarfile.TarInfo(f"{_FOLDER}/{file.name}")
            entry.size, entry.mode = file.stat().st_size, 0o644
            with file.open("rb") as stream:
                archive.addfile(entry, stream)
            file.unlink()
    return target


def convert_to_gguf(converter: Path, source: Path, target: Path, dtype: str) -> None:
    """Write a model directory as GGUF with llama.cpp's converter.

    Args:
        converter: Path of its `convert_hf_to_gguf.py`, or of a program that runs it.
        source: The directory; removed afterwards.
        target: The file.
        dtype: `fp32`, `fp16`, `bf16` or `q8_0`.

    Raises:
        InvalidInput: Code `gguf_failed`; the converter does not know the model, as a rule.
    """
    # A script is run in this environment; a program comes with its own.
    command = [
        *([sys.executable] if converter.suffix == ".py" else []),
        str(converter),
        str(source),
        "--outfile",
        str(target),
        "--outtype",
        _OUTTYPES[dtype],
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    shutil.rmtree(source, ignore_errors=True)
    if done.returncode != 0 or not target.is_file():
        raise InvalidInput(
            f"the converter failed: {done.stderr.strip()[-_ERROR_CHARACTERS:]}",
            code="gguf_failed",
            hint="It may not know this architecture or tokenizer; a newer llama.cpp may.",
        )


def _check_memory(base: Path) -> None:
    values = 0
    try:
        for file in base.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    values += math.prod(tensors.get_slice(name).get_shape())
    except (OSError, SafetensorError) as error:
        raise unreadable(base, error) from error
    needed, free = int(4 * values * _MEMORY_FACTOR), psutil.virtual_memory().available
    if needed > free:
        raise TrainingFailed(
            f"merging needs about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free",
            code="not_enough_memory",
            hint="Retry when less is going on, or run a light worker on a larger machine.",
        )
