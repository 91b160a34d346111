"""`tunesmith gc`, `backup` and `restore`: straight on this machine's database and store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.local import open_database, reachable
from service.cli.output import (
    Json,
    is_interactive,
    note,
    print_json,
    print_table,
    show_bytes,
)
from service.cli.settings import DataDir, load_settings

if TYPE_CHECKING:
    from core.backup import Manifest

_TITLES = {
    "checkpoints": "checkpoints of ended jobs",
    "jobs": "ended jobs",
    "exports": "exports past their time",
    "deliveries": "webhook deliveries",
    "idempotency_keys": "idempotency keys",
    "blobs": "data without a reference",
    "adapters": "adapters without a reference",
    "temporary": "leftovers of interrupted writes",
}


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command("gc")(collect)
    app.command("backup")(backup)
    app.command("restore")(restore)


def collect(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be removed; remove nothing.")
    ] = False,
    grace: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="Age from which objects without a reference go; TUNESMITH_GC_GRACE_SECONDS.",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Even if the store looks like that of another database."),
    ] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Remove what is past its time and stored objects that nothing refers to.

    The service does this by itself from time to time; it may run meanwhile.
    """
    from core.housekeeping import clean
    from core.storage import open_store

    settings = load_settings(data_dir)
    if grace is not None:
        settings = settings.model_copy(update={"gc_grace_seconds": grace})
    with open_database(settings) as database:
        report = clean(database, open_store(settings), settings, dry_run=dry_run, force=force)
    if as_json:
        print_json({"dry_run": dry_run, **report.as_dict()})
    else:
        print_table(
            ("would be removed" if dry_run else "removed", "count", "bytes"),
            [
                (_TITLES[kind], removed.count, show_bytes(removed.bytes) if removed.bytes else "")
                for kind, removed in report.removed.items()
                if removed.count
            ],
            empty="Nothing to remove.",
        )
    if report.refused:
        note(f"objects without a reference were left alone: {report.refused}")
        note("hint: Are database and store those of one service? If so, use --force.")
        raise typer.Exit(1)


def backup(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Made by the command.")],
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Write database and artifact store into a directory; the service may run meanwhile.

    The backup holds secrets, so only its owner may read it. Files of base models are not in it.
    """
    import migrations
    from core.backup import create_backup
    from core.storage import open_store

    settings = load_settings(data_dir)
    with open_database(settings) as database, _Progress() as progress:
        manifest = create_backup(
            database, open_store(settings), migrations.head(), directory, progress
        )
    if as_json:
        print_json({"directory": str(directory), **_summary(manifest)})
    else:
        typer.echo(f"{directory}: {_describe(manifest)}")
    for name in manifest.deleted:
        note(f"left out, as it was deleted meanwhile: {name}")
    for name in manifest.damaged:
        note(f"left out, as the store has lost or altered it: {name}")
    if manifest.damaged:
        raise typer.Exit(1)


def restore(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="A backup.")],
    check: Annotated[
        bool, typer.Option("--check", help="Only see whether the backup is whole.")
    ] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Restore a backup into an empty database and store, of whatever kind they are.

    Jobs that were at work when it was made wait again.
    """
    from core.backup import restore_backup, verify
    from core.storage import open_store

    if check:
        with _Progress() as progress:
            manifest = verify(directory, progress)
        if as_json:
            print_json({"directory": str(directory), **_summary(manifest)})
        else:
            typer.echo(f"whole: {_describe(manifest)}")
        return
    settings = load_settings(data_dir)
    with reachable(), _Progress() as progress:
        restored = restore_backup(
            directory, settings.resolved_database_url, open_store(settings), progress
        )
    if as_json:
        print_json(
            {
                **_summary(restored.manifest),
                "requeued_jobs": restored.requeued,
                "models_elsewhere": restored.models_elsewhere,
            }
        )
    else:
        typer.echo(f"restored {_describe(restored.manifest)}")
        if restored.requeued:
            typer.echo(f"jobs that were at work and wait again: {restored.requeued}")
    for name, path in restored.models_elsewhere.items():
        note(f"base model {name}: there is nothing at {path}")
    if restored.models_elsewhere:
        note("hint: `tunesmith models move NAME DIRECTORY` says where the same files are now.")


def _summary(manifest: Manifest) -> dict[str, object]:
    return {
        "created_at": manifest.created_at.isoformat(),
        "revision": manifest.revision,
        "rows": {table.name: table.rows for table in manifest.tables},
        "blobs": len(manifest.blobs),
        "adapters": len(manifest.adapters),
        "bytes": manifest.bytes,
        "deleted": manifest.deleted,
        "damaged": manifest.damaged,
    }


def _describe(manifest: Manifest) -> str:
    rows = sum(table.rows for table in manifest.tables)
    return (
        f"{rows} rows, {len(manifest.blobs)} data sets and checkpoints, "
        f"{len(manifest.adapters)} adapters, {show_bytes(manifest.bytes)}, "
        f"as of {manifest.created_at:%Y-%m-%d %H:%M:%S} UTC"
    )


class _Progress:
    """Shows on stderr how far something is: a changing line, or one now and then in a log."""

    _LOG_EVERY_SECONDS = 10.0

    def __init__(self) -> None:
        self._live = is_interactive()
        self._shown_at = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            typer.echo("\r\x1b[K", nl=False, err=True)

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Show it, unless something was shown just before."""
        now = time.monotonic()
        if now - self._shown_at < (0.1 if self._live else self._LOG_EVERY_SECONDS):
            return
        self._shown_at = now
        line = f"{what}: {done}" if total is None else f"{what}: {done} of {total}"
        if self._live:
            typer.echo(f"\r\x1b[K{line}", nl=False, err=True)
        else:
            note(line)
