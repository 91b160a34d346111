from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from core import memory_limits
from worker.capabilities import find_device, find_memory_bytes

MIB = 1024**2
SMI = '#!/bin/sh\n[ "$1" = --query-gpu=memory.total ] && printf "24564\\n81559\\n"\n'


@pytest.fixture
def _smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that answers as the driver's does on a machine with two devices."""
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory_limits, "_CGROUP_ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("configured", "device"),
    [("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda"), ("mps", "mps")],
)
def test_a_device_that_is_set_is_taken(configured: str, device: str) -> None:
    assert find_device(configured) == device


@pytest.mark.usefixtures("_smi")
def test_an_nvidia_driver_is_found_with_the_memory_of_each_device() -> None:
    assert find_device("auto") == "cuda"
    assert find_memory_bytes("auto") == 24564 * MIB
    assert find_memory_bytes("cuda:1") == 81559 * MIB
    assert find_memory_bytes("cuda:2") == 0
    assert find_memory_bytes("cpu") > 0


def test_without_a_driver_the_memory_of_cuda_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_memory_bytes("cuda") == 0


def test_the_memory_is_the_machines_or_what_the_control_group_leaves(cgroup: Path) -> None:
    total = psutil.virtual_memory().total
    assert find_memory_bytes("cpu") == total
    (cgroup / "memory.max").write_text("max\n")
    assert find_memory_bytes("cpu") == total
    (cgroup / "memory.max").write_text(f"{512 * MIB}\n")
    assert find_memory_bytes("cpu") == 512 * MIB
    older = cgroup / "memory"
    older.mkdir()
    (older / "memory.limit_in_bytes").write_text(f"{256 * MIB}\n")
    assert find_memory_bytes("cpu") == 256 * MIB
