"""What a trainer writes: by attempt, bounded, fenced, gone with the job, whole after a kill."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from core import jobs
from core.auth import LOCAL
from core.config import Settings
from core.db.models import Job, JobLog
from core.db.session import Database
from core.errors import LeaseLost, NotFound
from core.reads import LogPage
from core.storage import LocalStore
from tests.support.factories import add_base_model, add_project, must_claim, queue_job
from tests.support.worker_jobs import JobBench


def read(database: Database, job_id: str, **wanted: int | None) -> LogPage:
    with database.session() as session:
        return jobs.read_log(session, LOCAL, job_id, **wanted)  # type: ignore[arg-type]


def texts(page: LogPage) -> list[str]:
    return [line.text for line in page.data]


def count_chunks(database: Database) -> int:
    with database.session() as session:
        return session.scalar(select(func.count()).select_from(JobLog)) or 0


class TestStored:
    @pytest.fixture
    def claim(self, database: Database, store: LocalStore, settings: Settings) -> jobs.Claim:
        add_base_model(database)
        queue_job(database, store, settings)
        return must_claim(database, "w")

    @staticmethod
    def write(database: Database, claim: jobs.Claim, output: str, max_bytes: int = 10**6) -> None:
        jobs.record(database, claim, "w", [], output=output, max_log_bytes=max_bytes)

    def test_the_end_is_read_and_what_comes_behind_a_line(
        self, database: Database, claim: jobs.Claim
    ) -> None:
        assert read(database, claim.job_id).model_dump() == {
            "data": [], "next_cursor": None, "dropped_bytes": 0, "complete": False,
        }  # fmt: skip
        for number in range(300):
            self.write(database, claim, f"zeile ä {number}\nand {number}\u2028more\n")
        last = read(database, claim.job_id, limit=3)
        assert texts(last) == ["and 298\u2028more", "zeile ä 299", "and 299\u2028more"]
        assert last.next_cursor is None

        seen: list[str] = []
        after: int | None = 0
        while after is not None:
            page = read(database, claim.job_id, after=after, limit=77)
            assert all(line.id > after for line in page.data)
            seen += texts(page)
            after = int(page.next_cursor) if page.next_cursor else None
        assert seen == [line for n in range(300) for line in (f"zeile ä {n}", f"and {n}\u2028more")]
        assert texts(read(database, claim.job_id, limit=1000)) == seen
        assert texts(read(database, claim.job_id, after=last.data[0].id)) == seen[-2:]
        assert read(database, claim.job_id, after=2**62).data == []

    def test_attempts_are_kept_apart_and_a_lost_one_writes_nothing_more(
        self, database: Database, claim: jobs.Claim
    ) -> None:
        self.write(database, claim, "of the first\n")
        with database.session(write=True) as session:
            session.execute(update(Job).values(lease_expires_epoch=0))
        jobs.sweep(database, "s", 30, max_attempts=3)
        again = must_claim(database, "w")
        with pytest.raises(LeaseLost):
            self.write(database, claim, "of a zombie\n")
        self.write(database, again, "of the second\n")
        assert texts(read(database, claim.job_id)) == ["of the first", "of the second"]
        for attempt, line in ((claim.attempt, "of the first"), (again.attempt, "of the second")):
            (kept,) = read(database, claim.job_id, attempt=attempt).data
            assert (kept.attempt, kept.text) == (attempt, line)

    def test_the_log_is_bounded_and_ids_go_on(self, database: Database, claim: jobs.Claim) -> None:
        for number in range(50):
            self.write(database, claim, f"{number:0>99}\n", max_bytes=1000)
        page = read(database, claim.job_id, after=0)
        assert texts(page) == [f"{number:0>99}" for number in range(40, 50)]
        assert page.dropped_bytes == 4000
        assert [line.id for line in page.data] == list(range(4100, 5001, 100))
        # What is larger by itself is cut into pieces, of which the last is kept.
        self.write(database, claim, "".join(f"{n:0>99}\n" for n in range(2000)), max_bytes=1000)
        assert texts(read(database, claim.job_id, limit=1)) == [f"{1999:0>99}"]
        assert count_chunks(database) == 1

    def test_nothing_is_kept_when_nothing_shall_be(
        self, database: Database, claim: jobs.Claim
    ) -> None:
        self.write(database, claim, "a line\n", max_bytes=0)
        assert count_chunks(database) == 0

    def test_it_is_complete_once_the_job_has_ended_and_goes_with_it(
        self, database: Database, claim: jobs.Claim
    ) -> None:
        self.write(database, claim, "one\ntwo\n")
        jobs.fail(database, claim, "w", {"code": "broken", "message": ""})
        assert read(database, claim.job_id).complete
        assert not read(database, claim.job_id, after=0, limit=1).complete
        with database.session(write=True) as session:
            jobs.delete(session, LOCAL, claim.job_id)
        assert count_chunks(database) == 0

    def test_another_project_finds_no_such_job(self, database: Database, claim: jobs.Claim) -> None:
        stranger = add_project(database, "stranger")
        with database.session() as session, pytest.raises(NotFound, match="no job"):
            jobs.read_log(session, stranger, claim.job_id)


class TestWorker:
    @pytest.fixture
    def bench(self, tmp_path: Path) -> Iterator[JobBench]:
        opened = JobBench(tmp_path / "data")
        yield opened
        opened.close()

    def test_what_a_trainer_prints_is_in_the_log_of_its_job_alone(self, bench: JobBench) -> None:
        first, second = bench.submit(), bench.submit()
        bench.runner("succeed")
        for job_id in (first, second):
            bench.wait_for(job_id, "succeeded")
            page = read(bench.database, job_id)
            assert texts(page) == ["a library's chatter on stdout"]
            assert page.complete

    def test_a_killed_trainer_keeps_its_last_lines(self, bench: JobBench) -> None:
        job_id = bench.submit()
        bench.runner("chatter_and_crash_once")
        attempt = bench.wait_for(job_id, "succeeded").attempt
        assert texts(read(bench.database, job_id, attempt=attempt - 1)) == [
            *(f"line {number}" for number in range(100)),
            "the last words, without an end",
        ]
        assert texts(read(bench.database, job_id, attempt=attempt)) == [
            "a library's chatter on stdout"
        ]

    def test_a_trainer_killed_for_not_stopping_keeps_them_too(self, bench: JobBench) -> None:
        job_id = bench.submit()
        bench.runner("hang", grace_seconds=0.5)
        bench.wait_for_work(job_id)
        bench.cancel(job_id)
        bench.wait_for(job_id, "cancelled", 6)
        assert texts(read(bench.database, job_id)) == ["hanging from now on"]

    def test_secrets_of_the_service_are_not_in_it(
        self, bench: JobBench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SOME_SERVICE_TOKEN", "a secret of the worker")
        job_id = bench.submit()
        bench.runner("break_down")
        bench.wait_for(job_id, "failed")
        lines = texts(read(bench.database, job_id))
        assert lines[0] == "my environment: [redacted]"
        assert lines[-1] == "RuntimeError: a bug"
        local = (bench.settings.root / "logs" / "break_down.log").read_text()
        assert "a secret of the worker" in local

    def test_a_flood_neither_stops_the_training_nor_fills_the_database(
        self, bench: JobBench
    ) -> None:
        job_id = bench.submit()
        bench.runner("flood", job_log_bytes=100_000)
        bench.wait_for(job_id, "succeeded", 60)
        page = read(bench.database, job_id, limit=10_000)
        assert texts(page)[-1] == "the end"
        assert page.dropped_bytes > 100_000
        kept = sum(len(line.text) + 1 for line in page.data)
        assert 50_000 < kept < 200_000
        for name in ("flood.log", "flood.1.log"):
            assert (bench.settings.root / "logs" / name).stat().st_size < 11 * 1024**2
