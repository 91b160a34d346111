from __future__ import annotations

from pathlib import Path

import pytest

from core.redaction import Redactor
from worker.job_output import JobOutput
from worker.output_file import OutputFile


@pytest.fixture
def output() -> JobOutput:
    return JobOutput(Redactor(["a known secret"]))


def test_lines_are_whole_wherever_the_bytes_were_cut(output: JobOutput) -> None:
    written = "first\ngrüße \U0001f600\n\nlast".encode()
    for position in range(len(written)):
        output.feed(written[position : position + 1])
    assert output.take() == "first\ngrüße \U0001f600\n"
    assert output.take() == ""
    output.finish()
    output.finish()
    assert output.take() == "last\n"


def test_a_secret_is_replaced_even_if_it_came_in_two_pieces(output: JobOutput) -> None:
    output.feed(b"this is a known")
    output.feed(b" secret\n")
    assert output.take() == "this is [redacted]\n"


def test_what_a_terminal_would_obey_is_left_out(output: JobOutput) -> None:
    output.feed(b"\x1b[31mred\x1b[0m\x07 \x1b]0;title\x07and\x00 \xff\tplain\r\n")
    assert output.take() == "red and \ufffd\tplain\n"
    output.feed(b"10%\r50%\r100%\r\n")
    assert output.take() == "100%\n"


def test_a_long_line_is_cut_and_no_part_of_a_secret_is_left(output: JobOutput) -> None:
    output.feed(b"x" * 8185 + b"a known secret" + b"y" * 100_000)
    output.feed(b"z\nnext\n")
    long, after = output.take().splitlines()
    assert after == "next"
    assert long.endswith(" … (cut)")
    assert len(long) < 8300
    assert "known" not in long
    assert "z" not in long


def test_a_flood_keeps_its_end_and_says_so(output: JobOutput) -> None:
    for number in range(100_000):
        output.feed(f"line {number}\n".encode())
    first, *rest = output.take().splitlines()
    assert rest[-1] == "line 99999"
    assert first == f"… {100_000 - len(rest)} lines dropped, which came too fast"
    assert 200_000 < sum(len(line) for line in rest) < 262_144


def test_lines_that_could_not_be_stored_come_again_before_the_next(output: JobOutput) -> None:
    output.feed(b"first\nsecond\n")
    taken = output.take()
    output.feed(b"third\n")
    output.give_back(taken)
    assert output.take() == "first\nsecond\nthird\n"
    output.give_back("".join(f"{number:0>99}\n" for number in range(10_000)))
    kept = output.take()
    assert len(kept) <= 262_144
    assert kept.endswith("9999\n")
    assert {len(line) for line in kept.splitlines()} == {99}


def test_a_full_file_is_kept_once_and_a_new_one_begun(tmp_path: Path) -> None:
    file = OutputFile(tmp_path / "logs" / "child.log", max_bytes=100)
    for number in range(25):
        file.write(f"line {number:0>4}\n".encode())
    file.close()
    kept = [(tmp_path / "logs" / name).read_text() for name in ("child.1.log", "child.log")]
    assert "".join(kept).splitlines() == [f"line {number:0>4}" for number in range(11, 25)]


@pytest.mark.parametrize("path", ["/dev/full", "/proc/nothing/child.log"])
def test_output_that_cannot_be_written_ends_nothing(path: str) -> None:
    file = OutputFile(Path(path))
    for _ in range(3):
        file.write(b"a line\n")
    file.close()
