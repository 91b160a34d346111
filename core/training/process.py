"""The trainer: a long-lived child of the train worker, with the base model kept warm.

Run as `python -m core.training.process` by its parent, which speaks the protocol of `core.child`.
"""

from __future__ import annotations

import gc
import warnings
from typing import Any

from core.child import Channel, serve
from core.config import Settings
from core.data.quiet import silence_libraries
from core.logging import bind, configure


def main() -> None:
    """Load the libraries, report ready and serve tasks until the parent goes away."""
    configure(Settings(), process="trainer")
    silence_libraries()
    # The log is for what concerns a job; most of these concern programmers.
    warnings.simplefilter("ignore")
    # Imported here, so that the libraries find their environment set.
    from core.training import journal
    from core.training.device import pin_gpu
    from core.training.pipeline import Pipeline
    from core.training.task import TrainTask

    # The libraries' hundreds of thousands of objects stay; no collection has to look at them again.
    gc.collect()
    gc.freeze()
    pipeline = Pipeline()

    def handle(task: dict[str, Any], channel: Channel) -> dict[str, Any]:
        request = TrainTask.model_validate(task)
        pin_gpu(request.device)
        with bind(job_id=request.job_id, attempt=request.attempt), journal.outcome(channel):
            return pipeline.run(request, journal.Journal(channel))

    serve(handle)


if __name__ == "__main__":
    main()
