"""Housekeeping: removes what nobody needs any more, in the background and on request.

Owns how long what is kept, and the collection of stored objects that nothing refers to. Never
removes what is referenced: every deletion of stored bytes goes through `datasets.discard_blob` or
`registry.discard_artifact`, which check that under a lock. Workers that fell silent are not its
business but the sweep's.
"""

from core.housekeeping.report import KINDS, Kind, Removed, Report
from core.housekeeping.tidying import clean, tidy

__all__ = ["KINDS", "Kind", "Removed", "Report", "clean", "tidy"]
