"""Random requests, loads, evictions and cancellations; no answer may come from other weights."""
