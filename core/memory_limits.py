"""How much memory this process may have, and how it is told that there is no more."""

from __future__ import annotations

import errno
from pathlib import Path

import psutil

_CGROUP_ROOT = Path("/sys/fs/cgroup")


def usable_memory_bytes() -> int:
    """Return the machine's memory, or what the control groups leave of it."""
    return min(psutil.virtual_memory().total, *_cgroup_limits())


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory has run out, of whatever device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's CPU allocator has no exception class of its own.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _cgroup_limits() -> list[int]:
    """Return the memory limits of the control groups that this process is in; one at least."""
    found = [2**63]
    for path in _limit_files():
        try:
            found.append(int(path.read_text()))
        except (OSError, ValueError):
            continue  # `max` is no limit
    return found


def _limit_files() -> list[Path]:
    files = [_CGROUP_ROOT / "memory/memory.limit_in_bytes", _CGROUP_ROOT / "memory.max"]
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
    except OSError:
        return files
    # A limit of any group above holds, too.
    folders = [Path(group), *Path(group).parents]
    return files + [_CGROUP_ROOT / folder / "memory.max" for folder in folders]
