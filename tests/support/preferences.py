"""Preference pairs for tests of DPO."""

from __future__ import annotations

from typing import Any


def make_pairs(count: int) -> list[dict[str, Any]]:
    """Return rows whose chosen answers tell of a fox and whose rejected ones do not."""
    return [
        {
            "prompt": [
                {"role": "user", "content": f"What is {'the quick ' * (index % 3)}{index}?"}
            ],
            "chosen": [
                {
                    "role": "assistant",
                    "content": f"the fox jumps over {index} dogs" + " and" * (index % 4),
                }
            ],
            "rejected": [{"role": "assistant", "content": "no" + " hello there" * (index % 5)}],
        }
        for index in range(count)
    ]
