"""Reading a prompt into a row of a model, piece by piece, as the engine does."""

from __future__ import annotations

from typing import Any

from core.inference.rows import Row, RowModel


def read_prompt(rows: RowModel, row: Row, piece: int = 512) -> Any:
    """Return the logits after the prompt's last token, shape (vocabulary,)."""
    logits = None
    while not row.prefilled:
        end = len(row.prompt_ids) if rows.reads_whole_prompts else row.length + piece
        logits = rows.extend([row], [row.prompt_ids[row.length : end]])[0]
    assert logits is not None
    return logits
