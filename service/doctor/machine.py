"""Checks of the machine: Python, packages, model libraries, memory, disk, ports."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import httpx2
import psutil
from packaging.requirements import Requirement

from service.doctor.finding import Finding

_GIB = 1024**3
_TORCH_TIMEOUT_SECONDS = 120
_CONNECT_TIMEOUT_SECONDS = 3.0
_TORCH_PROBE = """
import json, torch
device = ("cuda" if torch.cuda.is_available() else
          "mps" if torch.backends.mps.is_available() else "cpu")
name = torch.cuda.get_device_name(0) if device == "cuda" else None
import transformers, peft, trl
print(json.dumps({"torch": torch.__version__, "device": device, "name": name,
                  "threads": torch.get_num_threads()}))
"""


def check_python() -> Finding:
    """Tell which interpreter runs."""
    return Finding("python", "ok", f"{sys.version.split()[0]} ({sys.executable})")


def check_packages(distribution: str = "tunesmith") -> Iterator[Finding]:
    """Compare the installed packages with the ranges that the project declares."""
    try:
        declared = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        yield Finding(
            "packages", "fail", f"{distribution} is not installed", "Run `pip install -e .`."
        )
        return
    wrong = 0
    needed = [Requirement(line) for line in declared]
    needed = [item for item in needed if item.marker is None or item.marker.evaluate({"extra": ""})]
    for requirement in needed:
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = ""
        if installed and requirement.specifier.contains(installed, prereleases=True):
            continue
        wrong += 1
        yield Finding(
            f"package {requirement.name}",
            "fail",
            f"{installed or 'missing'}, needed is {requirement.specifier or 'any version'}",
            f"Run `pip install '{requirement}'`.",
        )
    if not wrong:
        yield Finding("packages", "ok", f"{len(needed)} as declared")


def check_model_libraries() -> Finding:
    """Import the model libraries, in another process, and ask which device they see."""
    name = "model libraries"
    hint = f"Run `{sys.executable} -c 'import torch, transformers, peft, trl'` to see why."
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _TORCH_PROBE],
            capture_output=True,
            text=True,
            timeout=_TORCH_TIMEOUT_SECONDS,
            check=True,
        )
        found = json.loads(probe.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding(name, "fail", f"cannot be imported: {last}", hint)
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return Finding(name, "fail", f"gave no answer: {type(error).__name__}", hint)
    device = f"{found['device']} ({found['name']})" if found["name"] else found["device"]
    return Finding(name, "ok", f"torch {found['torch']}, {device}, {found['threads']} threads")


def check_memory() -> Finding:
    """Check that a small base model fits twice: in the engine and in the trainer."""
    memory = psutil.virtual_memory()
    detail = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB available"
    if memory.available < 2 * _GIB:
        return Finding(
            "memory", "warn", detail, "Engine and trainer each hold the base model; close programs."
        )
    return Finding("memory", "ok", detail)


def check_data_directory(root: Path) -> Finding:
    """Check that files can be made in the data directory, or that it can be made itself."""
    nearest = next(path for path in (root, *root.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"0")
    except OSError as error:
        return Finding(
            "data directory",
            "fail",
            f"{root} cannot be written to: {error.strerror}",
            "Give another one with --data-dir or TUNESMITH_DATA_DIR.",
        )
    return Finding("data directory", "ok", f"{root}{'' if root.exists() else ' (not made yet)'}")


def check_disk(root: Path) -> Finding:
    """Check the space that is left for adapters and models."""
    nearest = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    detail = f"{free / _GIB:.1f} GiB free"
    if free < _GIB // 2:
        return Finding("disk", "fail", detail, "Make room, or move the data directory.")
    if free < 5 * _GIB:
        return Finding("disk", "warn", detail, "A base model takes gigabytes.")
    return Finding("disk", "ok", detail)


def check_port(port: int) -> Finding:
    """Check whether the API's port is free, or has our service on it."""
    name = f"port {port}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            reason = error.strerror
        else:
            return Finding(name, "ok", "free")
    try:
        answer = httpx2.get(
            f"http://127.0.0.1:{port}/healthz", timeout=_CONNECT_TIMEOUT_SECONDS, trust_env=False
        ).json()
        return Finding(name, "ok", f"Tunesmith {answer['version']} answers there")
    except (httpx2.HTTPError, ValueError, KeyError, TypeError):
        return Finding(name, "warn", f"taken: {reason}", "Choose another with --port.")
