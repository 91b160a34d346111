"""Other servers on the same machine, in environments of their own; see docs/benchmarks.md.

None of their code is imported here: they are programs that are started and asked over HTTP.
"""
