"""The short form of `make soak`."""

from __future__ import annotations

from pathlib import Path

from tests.soak.__main__ import MOST_GROWTH_MIB, soak


def test_no_answer_comes_from_other_weights_whatever_happens(tmp_path: Path) -> None:
    outcome = soak(tmp_path, requests=400, adapters=8, bank=4, seed=1)
    assert outcome.wrong == []
    assert outcome.growth_mib <= MOST_GROWTH_MIB
    counts = outcome.counts
    # Otherwise nothing was tried.
    assert counts["complete"] > 300
    assert counts["cancelled"] > 20
    assert counts["evictions"] > 20
    assert counts["reused_prompt_tokens"] > 1000
    assert sum(counts[name] for name in counts if name.startswith("refused")) == 0
