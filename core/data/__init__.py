"""Data sets: reading, checking, rendering and masking.

`ingest`, `detect`, `schema` and `check` need no model library, so that the API can refuse a bad
upload at once; `tokenizer`, `rendering`, `dry_run` and `process` are the tokenizer side. Nothing
here knows a database, a queue, HTTP or torch.
"""
