"""`tunesmith webhooks`: addresses that are told what happens, and what was sent to them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from service.cli.client import DEFAULT_URL, Key, Limit, Url, connect
from service.cli.output import Json, note, print_json, print_members, print_table, show_time

app = typer.Typer(help="Have your own services told what happens.", no_args_is_help=True)
WebhookId = Annotated[str, typer.Argument(metavar="ID", help="As `webhooks list` shows it.")]
Events = Annotated[
    list[str] | None,
    typer.Option("--event", help="What it is told of; may be given several times."),
]
_ONCE = "This is the only time the secret is shown."


@app.command("create")
def create(
    address: Annotated[str, typer.Argument(metavar="URL", help="Where messages go.")],
    events: Events = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Add a webhook, for all events by default, and show its secret once."""
    body: dict[str, Any] = {"url": address}
    if events:
        body["events"] = events
    with connect(url, key) as service:
        webhook = service.call("POST", "/webhooks", json=body)
    _print_secret(webhook, as_json=as_json)


@app.command("list")
def list_webhooks(url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False) -> None:
    """List webhooks, newest first."""
    with connect(url, key) as service:
        webhooks = service.call("GET", "/webhooks")["data"]
    if as_json:
        print_json(webhooks)
        return
    print_table(
        ("id", "url", "events", "enabled", "created"),
        [
            (
                row["id"],
                row["url"],
                ",".join(row["events"]),
                "yes" if row["enabled"] else "no",
                show_time(row["created_at"]),
            )
            for row in webhooks
        ],
        empty="No webhooks. `tunesmith webhooks create URL` adds one.",
    )


@app.command("set")
def change(
    webhook_id: WebhookId,
    address: Annotated[
        str | None, typer.Option("--to", metavar="URL", help="Where messages go.")
    ] = None,
    events: Events = None,
    enabled: Annotated[
        bool | None,
        typer.Option("--enable/--disable", help="A disabled webhook is sent nothing."),
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Change a webhook's address or events, or switch it on and off."""
    given = {"url": address, "events": events or None, "enabled": enabled}
    changes = {name: value for name, value in given.items() if value is not None}
    with connect(url, key) as service:
        webhook = service.call("PATCH", f"/webhooks/{webhook_id}", json=changes)
    if as_json:
        print_json(webhook)
    else:
        print_members({**webhook, "events": ",".join(webhook["events"])})


@app.command("rotate")
def rotate(
    webhook_id: WebhookId, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False
) -> None:
    """Replace the secret and show the new one once; the old one signs besides for a day."""
    with connect(url, key) as service:
        webhook = service.call("POST", f"/webhooks/{webhook_id}/rotate-secret")
    _print_secret(webhook, as_json=as_json)


@app.command("test")
def send_test(
    webhook_id: WebhookId, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False
) -> None:
    """Send a test message; `webhooks deliveries ID` shows what came of it."""
    with connect(url, key) as service:
        delivery = service.call("POST", f"/webhooks/{webhook_id}/test")
    _print_delivery(delivery, as_json=as_json)


@app.command("deliveries")
def list_deliveries(
    webhook_id: WebhookId,
    limit: Limit = 20,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """List what was or will be sent to a webhook, newest first."""
    with connect(url, key) as service:
        deliveries = service.list(f"/webhooks/{webhook_id}/deliveries", limit)
    if as_json:
        print_json(deliveries)
        return
    print_table(
        ("id", "event", "status", "attempts", "created", "next attempt", "answer", "error"),
        [
            (
                row["id"],
                row["event"],
                row["status"],
                row["attempts"],
                show_time(row["created_at"]),
                show_time(row["next_attempt_at"]),
                row["response_status"],
                row["error"],
            )
            for row in deliveries
        ],
        empty="Nothing was sent yet.",
    )


@app.command("replay")
def replay(
    webhook_id: WebhookId,
    delivery_id: Annotated[
        str, typer.Argument(metavar="DELIVERY", help="As `webhooks deliveries` shows it.")
    ],
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Send a message again, under its old id and with all attempts anew."""
    with connect(url, key) as service:
        delivery = service.call("POST", f"/webhooks/{webhook_id}/deliveries/{delivery_id}/replay")
    _print_delivery(delivery, as_json=as_json)


@app.command("rm")
def remove(
    webhook_id: WebhookId, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False
) -> None:
    """Remove a webhook; what waits for it is never sent."""
    with connect(url, key) as service:
        service.call("DELETE", f"/webhooks/{webhook_id}")
    if as_json:
        print_json({"id": webhook_id, "removed": True})
    else:
        typer.echo(f"removed {webhook_id}")


def _print_secret(webhook: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(webhook)
        return
    typer.echo(webhook["secret"])
    note(f"{webhook['id']}: {webhook['url']}, {', '.join(webhook['events'])}. {_ONCE}")


def _print_delivery(delivery: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(delivery)
    else:
        typer.echo(f"{delivery['id']}  {delivery['event']}  {delivery['status']}")
