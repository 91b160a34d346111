from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest

from tests.support.api import ROWS, Api, build_api, jsonl, live_server, running_api
from tests.support.polling import wait_until

FORM = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path, max_upload_bytes=50_000) as running:
        yield running


def test_an_upload_is_stored_checked_and_readable(api: Api) -> None:
    answer = api.client.post("/datasets", files={"file": ("../dir/rows.jsonl", jsonl(ROWS))})
    dataset = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/datasets/{dataset['id']}"
    assert (dataset["filename"], dataset["rows"]) == ("rows.jsonl", 3)
    assert dataset["format"] == "messages"
    assert api.blobs() == {dataset["sha256"]}
    assert api.client.get(f"/datasets/{dataset['id']}").json() == dataset
    assert api.client.get("/datasets").json() == {"data": [dataset], "next_cursor": None}


def test_a_raw_body_is_an_upload_too(api: Api) -> None:
    answer = api.client.post(
        "/datasets?filename=raw.jsonl",
        content=jsonl(ROWS),
        headers={"Content-Type": "application/jsonl"},
    )
    assert (answer.status_code, answer.json()["filename"]) == (201, "raw.jsonl")


def test_an_upload_that_arrives_in_small_pieces_is_the_same(api: Api) -> None:
    boundary = "b0undary"
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    ).encode()
    body += jsonl(ROWS) + f"\r\n--{boundary}--\r\n".encode()
    answer = api.client.post(
        "/datasets",
        content=(body[i : i + 7] for i in range(0, len(body), 7)),
        headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    assert (answer.status_code, answer.json()["rows"]) == (201, 3)


def test_rows_are_previewed_with_their_lines(api: Api) -> None:
    dataset = api.upload()
    answer = api.client.get(f"/datasets/{dataset['id']}/rows", params={"offset": 1, "limit": 1})
    assert answer.json() == {"data": [{"line": 2, "row": ROWS[1]}]}


def test_a_bad_row_refuses_the_file_with_every_line_and_keeps_nothing(api: Api) -> None:
    lines = jsonl(ROWS).splitlines(keepends=True)
    lines[1] = b'{"messages": []}\n'
    lines.append(b"{broken\n")
    answer = api.client.post("/datasets", files={"file": ("rows.jsonl", b"".join(lines))})
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, "invalid_dataset")
    assert problem["line"] == 2
    assert [error["line"] for error in problem["errors"]] == [2, 4]
    assert api.blobs() == set()
    assert api.client.get("/datasets").json()["data"] == []


def test_a_refusal_does_not_remove_the_same_bytes_of_an_accepted_upload(api: Api) -> None:
    dataset = api.upload()
    answer = api.client.post("/datasets", files={"file": ("rows.xlsx", jsonl(ROWS))})
    assert answer.status_code == 422
    assert api.blobs() == {dataset["sha256"]}


def test_deleting_removes_bytes_that_nobody_else_has(api: Api) -> None:
    first, second = api.upload(), api.upload()
    assert api.client.delete(f"/datasets/{first['id']}").status_code == 204
    assert api.blobs() == {second["sha256"]}
    assert api.client.delete(f"/datasets/{second['id']}").status_code == 204
    assert api.blobs() == set()
    answer = api.client.delete(f"/datasets/{second['id']}")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_dataset")


def test_a_data_set_that_a_job_waits_for_stays(api: Api) -> None:
    dataset = api.upload()
    spec = {"base_model": "tiny", "dataset": dataset["id"]}
    job = api.client.post("/jobs", json=spec).json()
    answer = api.client.delete(f"/datasets/{dataset['id']}")
    assert (answer.status_code, answer.json()["code"]) == (409, "dataset_in_use")
    api.client.post(f"/jobs/{job['id']}/cancel")
    assert api.client.delete(f"/datasets/{dataset['id']}").status_code == 204


def test_pages_follow_their_cursor_without_gap_or_repetition(api: Api) -> None:
    ids = [api.upload()["id"] for _ in range(5)]
    seen, cursor = [], None
    while True:
        params = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = api.client.get("/datasets", params=params).json()
        seen += [dataset["id"] for dataset in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == ids[::-1]


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
def test_a_file_above_the_limit_is_refused_and_leaves_nothing(api: Api, announced: bool) -> None:
    line = jsonl(ROWS)
    content = line * (1 + 50_000 // len(line))
    answer = api.client.post(
        "/datasets?filename=a.jsonl", content=content if announced else iter([content])
    )
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert "50,000 bytes" in answer.json()["detail"]
    assert api.blobs() == set()
    assert list((api.settings.root / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"files": {"data": ("a.jsonl", b"{}")}}, "unknown_field"),
        (
            {"files": [("file", ("a.jsonl", jsonl(ROWS))), ("file", ("b.jsonl", jsonl(ROWS)))]},
            "too_many_files",
        ),
        ({"content": b"", "headers": {"Content-Type": "multipart/form-data"}}, "invalid_multipart"),
        (
            {"content": b"junk", "headers": FORM},
            "invalid_multipart",
        ),
        (
            {"content": b"--x--\r\n", "headers": FORM},
            "missing_file",
        ),
        (
            {
                "content": b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n{"mess',
                "headers": FORM,
            },
            "invalid_multipart",
        ),
        ({"content": b""}, "empty_dataset"),
        ({"files": {"file": ("a.jsonl", b"\n\n")}}, "empty_dataset"),
        ({"files": {"file": ("a.parquet", b"PAR1....")}}, "malformed_parquet"),
        ({"files": {"file": ("a.jsonl", b'{"messages": [{"role": \n')}}, "invalid_dataset"),
        ({"files": {"file": ("a.jsonl", b'{"prompt": "a\\u0000", "completion": "b"}\n')}},
         "invalid_dataset"),
        ({"files": {"file": ("a.jsonl", b'{"prompt": "a\\ud800", "completion": "b"}\n')}},
         "invalid_dataset"),
        ({"files": {"file": ("a.jsonl", b'{"prompt": NaN, "completion": "b"}\n')}},
         "invalid_dataset"),
    ],
)  # fmt: skip
def test_unusable_uploads_are_refused_by_code(
    api: Api, options: dict[str, object], code: str
) -> None:
    answer = api.client.post("/datasets", **options)  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    assert api.blobs() == set()


@pytest.mark.parametrize(
    "extra",
    ['"\\ud800"', "1e999", '"\\u0000"', "9" * 4000, '{"\\udc00": [' * 400 + "1" + "]}" * 400],
    ids=["surrogate", "infinite", "nul", "huge", "deep"],
)
def test_what_else_a_row_holds_never_breaks_the_preview(api: Api, extra: str) -> None:
    row = f'{{"prompt": "a", "completion": "b", "more": {extra}}}\n'
    answer = api.client.post("/datasets", files={"file": ("a.jsonl", row.encode())})
    assert answer.status_code in (201, 422), answer.text
    if answer.status_code == 201:
        preview = api.client.get(f"/datasets/{answer.json()['id']}/rows")
        assert preview.status_code == 200, preview.text
        assert preview.json()["data"][0]["line"] == 1


def test_slow_senders_never_take_the_threads_of_other_requests(tmp_path: Path) -> None:
    api = build_api(tmp_path)
    head = b"POST /datasets HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
    with live_server(api) as url, httpx2.Client(base_url=url, timeout=5) as client:
        address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        with ExitStack() as senders:
            for _ in range(60):
                connection = senders.enter_context(socket.create_connection(address))
                connection.sendall(head)
            slots = api.services.upload_slots
            wait_until(lambda: slots.statistics().tasks_waiting == 44, 10, "uploads do not start")
            assert client.get("/datasets").json()["data"] == []
        wait_until(lambda: slots.statistics().borrowed_tokens == 0, 10, "uploads go on")
    assert list((api.settings.root / "tmp").iterdir()) == []


def test_a_file_of_foreign_columns_is_kept_for_a_job_that_names_them(api: Api) -> None:
    rows = b'{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n'
    answer = api.client.post("/datasets", files={"file": ("a.jsonl", rows)})
    assert answer.status_code == 201, answer.text
    dataset = answer.json()
    assert (dataset["format"], dataset["rows"]) == ("unknown", 2)
    assert dataset["report"]["columns"] == ["question", "answer"]
    broken = api.client.post("/datasets", files={"file": ("b.jsonl", rows + b"nope\n")})
    assert (broken.status_code, broken.json()["line"]) == (422, 3)
