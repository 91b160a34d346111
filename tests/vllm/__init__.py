"""The engine contract against a real vLLM server; `make test-vllm` runs it, `make test` does not.

The server comes from a virtual environment of its own: its libraries are not ours.
"""
