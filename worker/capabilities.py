"""What this worker has: its device, the memory of that, and which base models lie on the machine.

Found without a model library. The trainer chooses its device by itself when the setting is `auto`;
what is found here is the same wherever torch has been built for the machine's device. Set the
device where it has not.
"""

from __future__ import annotations

import platform
import subprocess
import time
from pathlib import Path

from core import base_models
from core.capabilities import Capabilities
from core.config import Settings
from core.db.session import Database
from core.logging import get_logger
from core.memory_limits import usable_memory_bytes
from core.queue import QueueName

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_SMI_TIMEOUT_SECONDS = 10.0
_MIB = 1024**2

log = get_logger(__name__)


class Machine:
    """Tells what a worker offers at the moment.

    Args:
        queue: The worker's; a light worker offers its base models alone.
        settings: Device and memory, where they are not to be found out.
        database: Where base models are registered.
    """

    def __init__(self, queue: QueueName, settings: Settings, database: Database) -> None:
        self._queue = queue
        self._settings = settings
        self._database = database
        self._found: tuple[str, int] | None = None
        self._absent: frozenset[str] = frozenset()
        self._look_at = 0.0

    def capabilities(self, warm_base: str | None) -> Capabilities:
        """Return what the worker has; looks for the base models once per polling interval.

        Args:
            warm_base: Name of the base model that its child has in memory.
        """
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + self._settings.idle_poll_seconds
            with self._database.session() as session:
                self._absent = base_models.list_absent(session)
        if self._queue == "light":
            return Capabilities(absent_base_models=self._absent)
        if self._found is None:
            device = find_device(self._settings.device)
            memory = self._settings.worker_memory_bytes or find_memory_bytes(self._settings.device)
            self._found = device, memory
            log.info("machine_found", device=device, memory_bytes=memory)
        device, memory = self._found
        return Capabilities(device, memory, self._absent, warm_base)


def find_device(configured: str) -> str:
    """Return `cpu`, `cuda` or `mps` for a setting that may be `auto` or name one of several."""
    if configured != "auto":
        return configured.partition(":")[0]
    if _NVIDIA_DRIVER.exists() or _cuda_memory_mib():
        return "cuda"
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "mps"
    return "cpu"


def find_memory_bytes(configured: str) -> int:
    """Return the memory of a device, within what the process may have of it; 0 when unknown."""
    if find_device(configured) != "cuda":
        return usable_memory_bytes()
    sizes = _cuda_memory_mib()
    index = int(configured.partition(":")[2] or 0)
    return sizes[index] * _MIB if index < len(sizes) else 0


def _cuda_memory_mib() -> list[int]:
    """Return the memory of each NVIDIA device; nothing without a driver."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_SMI_TIMEOUT_SECONDS, check=True
        )
        return [int(line) for line in answer.stdout.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
