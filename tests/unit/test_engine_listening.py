from __future__ import annotations

import stat
from contextlib import closing
from pathlib import Path

import pytest

from core.errors import Conflict, InvalidInput
from engine.listening import open_listener


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_tcp_without_a_secret_is_refused(host: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        open_listener(f"http://{host}:8100", secret="")
    assert refused.value.code == "engine_secret_required"


def test_a_socket_left_behind_is_replaced_but_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "run" / "engine.sock"
    with closing(open_listener(f"unix:{path}", secret="")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        with pytest.raises(Conflict) as taken:
            open_listener(f"unix:{path}", secret="")
        assert taken.value.code == "engine_address_taken"
    assert path.exists()
    with closing(open_listener(f"unix:{path}", secret="")):
        pass


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    path.write_text("precious")
    with pytest.raises(Conflict):
        open_listener(f"unix:{path}", secret="")
    assert path.read_text() == "precious"
