"""The trainer: a long-lived child of the train worker, with the base model kept warm.

Run as `python -m core.training.process` by its parent, which speaks the protocol of `core.child`.
"""

from __future__ import annotations

import gc
import warnings
from typing import Any

from core.child import Channel, serve
from core.data.quiet import silence_libraries


def main() -> None:
    """Load the libraries, report ready and serve tasks until the parent goes away."""
    silence_libraries()
    # The log of the child is for tracebacks.
    warnings.simplefilter("ignore")
    # Imported here, so that the libraries find their environment set.
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
        return pipeline.run(request, channel)

    serve(handle)


if __name__ == "__main__":
    main()
