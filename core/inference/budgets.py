"""How much memory the engine spends on what."""

from __future__ import annotations

from dataclasses import dataclass

# What is left is for the process itself, for what is being read, and for other processes.
_BASES_SHARE = 3 / 5
_ROWS_SHARE = 1 / 5
_ADAPTERS_SHARE = 1 / 8
_PREFIXES_SHARE = 1 / 32


@dataclass(frozen=True)
class Budgets:
    """Bytes; 0 is a share of what the device has.

    Attributes:
        bases: Weights of base models.
        rows: Keys and values of the rows that are computed, and the copies of their adapters'
            matrices that stand side by side for them.
        adapters: Matrices of resident adapters.
        prefixes: Keys and values of prompts that others may begin with.
    """

    bases: int = 0
    rows: int = 0
    adapters: int = 0
    prefixes: int = 0

    def within(self, memory_bytes: int) -> Budgets:
        """Return limits for a device with so much memory."""

        def share(stated: int, part: float) -> int:
            return stated or int(memory_bytes * part)

        return Budgets(
            bases=share(self.bases, _BASES_SHARE),
            rows=share(self.rows, _ROWS_SHARE),
            adapters=share(self.adapters, _ADAPTERS_SHARE),
            prefixes=share(self.prefixes, _PREFIXES_SHARE),
        )
