"""Measurements side by side with what a user would write instead; see docs/benchmarks.md."""
