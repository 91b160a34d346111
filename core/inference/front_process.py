"""Run as `python -m core.inference.front_process` by who speaks to a server that is the engine.

The parent uses the frames of `core.child` and stays free of the model libraries. Several tasks are
worked on at a time: each has an `id` and an `op`, a method of `core.inference.front.Front` whose
arguments are the task's other members. It is answered by the event `answer` with that id and either
`result` or `error`; the frame `finished` only says that the task was taken.
"""

from __future__ import annotations

from core.child import serve
from core.data.quiet import silence_libraries


def main() -> None:
    """Serve tasks until the parent goes away."""
    silence_libraries()
    # After that: the model libraries read their environment when they are imported.
    import torch

    from core.inference.front import Front

    # It multiplies nothing; threads would only take the cores from those who do.
    torch.set_num_threads(1)
    serve(Front())


if __name__ == "__main__":
    main()
