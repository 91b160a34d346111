"""Inference: one base model in memory, many adapters on it.

Owns computing answers. Knows no database, no queue and no HTTP.

    engine.py               the Protocol and its values, all that the API needs
    local_engine.py         the Engine of this process: a thread and the streams it feeds
    engine_thread.py        that thread: admission, loading, one decode step per request in turn
    adapter_bank.py         which adapters stay in memory
    generation.py           one request's answers: text, stop strings, why each ended
    detokenizer.py stop_strings.py prompts.py
    transformers_runner.py decoding.py sampling.py gates.py    what needs torch
"""
