"""How often the kernel has killed a process for memory, so that a SIGKILL can be told from one."""

from __future__ import annotations

from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")


def count_memory_kills() -> int:
    """Return the kernel's count for this control group, or for the machine; 0 where unknown."""
    for path in (*_group_counters(), Path("/proc/vmstat")):
        try:
            for line in path.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
        except (OSError, ValueError):
            continue
    return 0


def _group_counters() -> list[Path]:
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
    except OSError:
        return []
    # In a container the group's own path may be hidden, and the root is then the group itself.
    return [
        _CGROUP_ROOT / group.lstrip("/") / "memory.events",
        _CGROUP_ROOT / "memory.events",
    ]
