"""The gates that files alone cannot trip; the engine's contract suite has all others."""

from __future__ import annotations

import pytest
import torch

from core.errors import Conflict
from core.inference.gates import check_applied, check_effect


@pytest.mark.parametrize("applied", [[], ["q"], ["q", "k", "v"], ["q", "v"]])
def test_an_adapter_modifies_its_modules_all_of_them_and_no_others(applied: list[str]) -> None:
    with pytest.raises(Conflict) as refused:
        check_applied(applied, ["q", "k"])
    assert refused.value.code == "adapter_not_applied"


def test_a_complete_adapter_passes() -> None:
    check_applied(["k", "q"], ["q", "k"])


def test_the_smallest_change_is_an_effect() -> None:
    base = torch.zeros(1, 4, 8)
    changed = base.clone()
    changed[0, 3, 7] = 1e-30
    check_effect(base, changed)
    with pytest.raises(Conflict) as refused:
        check_effect(base, base.clone())
    assert refused.value.code == "adapter_has_no_effect"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_effect_that_is_no_number_is_refused(bad: float) -> None:
    changed = torch.zeros(1, 4, 8)
    changed[0, 0, 0] = bad
    with pytest.raises(Conflict) as refused:
        check_effect(torch.zeros(1, 4, 8), changed)
    assert refused.value.code == "adapter_not_finite"
