"""Training: from a job's spec and rows to a complete adapter directory.

`pipeline.run_training` is the list of steps. Nothing here knows a database, a queue or HTTP: values
come in, values go out, and what happens meanwhile is told to a `Monitor`.
"""
