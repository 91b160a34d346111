"""Which modules of a base model a LoRA spec means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from core.errors import InvalidInput
from core.specs import LoraSpec


def resolve_targets(
    spec: LoraSpec, linear_modules: Iterable[str], auto: Sequence[str] | None = None
) -> list[str]:
    """Return the full names of the modules that a spec adapts, in the model's order.

    A name in the spec means every module that is called so or whose path ends with it at a dot,
    which is PEFT's rule for a list.

    Args:
        spec: Names its targets.
        linear_modules: Full names of the model's linear modules.
        auto: Full names of those that `auto` means; all where nobody has found that out.

    Raises:
        InvalidInput: Code `unknown_target_module`; a name means no module.
    """
    names = list(linear_modules)
    if isinstance(spec.target_modules, str):
        return list(auto) if spec.target_modules == "auto" and auto else names
    for target in spec.target_modules:
        if not any(_is_meant(target, name) for name in names):
            raise _unknown(target, names)
    return [
        name for name in names if any(_is_meant(target, name) for target in spec.target_modules)
    ]


def _is_meant(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _unknown(target: str, names: list[str]) -> InvalidInput:
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    close = get_close_matches(target, endings, n=1)
    offer = f"Did you mean {close[0]!r}? " if close else ""
    return InvalidInput(
        f"the base model has no linear module {target!r}",
        code="unknown_target_module",
        field="lora.target_modules",
        hint=f"{offer}Its modules: {', '.join(endings)}.",
    )
