"""The example of preference pairs is what its job description and the docs say."""

from __future__ import annotations

import json
from pathlib import Path

from core.data.schema import check_row
from core.specs import JobSpec

EXAMPLE = Path(__file__).parents[2] / "examples/preferences"


def test_rows_and_job_are_valid() -> None:
    for name, count in (("train", 56), ("validation", 40)):
        rows = [json.loads(line) for line in (EXAMPLE / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == count
        for row in rows:
            assert check_row(row, "preference") == []
    spec = json.loads((EXAMPLE / "job.json").read_text())
    data = {"validation_dataset": "file-2"}
    assert JobSpec.model_validate(spec | {"dataset": "file-1", "data": data}).method.type == "dpo"
