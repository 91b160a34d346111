from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.service import RunningService
from tests.support.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tiny_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    root = tmp_path_factory.mktemp("service")
    models = {}
    for name, seed in (("tiny", 0), ("other", 1)):
        models[name] = root / name
        make_tiny_model(models[name], seed=seed)
    service = RunningService(root / "data", models)
    try:
        yield service
    finally:
        service.kill_everything()


@pytest.fixture(scope="session")
def sample_model_path() -> Path:
    """The real pretrained sample model, converted once by `make`."""
    from tests.support.sample_model import sample_model_directory

    return sample_model_directory()
