"""Inference: base models in memory, many adapters on each.

Owns computing answers. Knows no database, no queue and no HTTP.

    engine.py               the Protocol and its values, all that the API needs
    local_engine.py         the Engine of this process: a thread and the streams it feeds
    engine_thread.py        that thread: schedule, compute, postprocess, again and again
    scheduler.py            who waits and who is next; row_memory.py: what rows will take
    preparation.py          base model, adapter and prompt of a request, read beside the thread
    adapter_bank.py base_shelf.py prefix_store.py budgets.py    what stays in memory
    work.py                 one request on its way
    generation.py           one request's answers: text, stop strings, why each ended
    detokenizer.py stop_strings.py prompts.py
    model_runner.py loaded_base.py rows.py peft_rows.py lean/ sampling.py gates.py
                            what needs torch
"""
