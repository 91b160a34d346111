"""Worker processes: they claim jobs and see them through. No HTTP, no model libraries."""
