"""The memory of the decoder's matrices."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.inference.lean.panels import Arena

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_of(address: int) -> set[str]:
    """Return what the system notes of the mapping that an address is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return set(rest)
    raise AssertionError("no mapping has the address")


@pytest.mark.skipif(not LARGE_PAGES.exists(), reason="needs a system with large pages")
def test_matrices_are_where_the_system_may_use_large_pages() -> None:
    taken = Arena(2**23).take(100)
    flags = flags_of(taken.data_ptr())
    # Shared memory has a setting of its own, which is off nearly everywhere.
    assert "hg" in flags
    assert "sh" not in flags


def test_what_does_not_fit_into_a_chunk_has_one_of_its_own() -> None:
    arena = Arena(2**16)
    small, large, after = arena.take(100), arena.take(2**17), arena.take(100)
    for taken, size in ((small, 100), (large, 2**17), (after, 100)):
        assert taken.numel() == size
        taken.fill_(7)
    assert int(small.sum()) == int(after.sum()) == 700
