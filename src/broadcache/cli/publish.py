"""`broadcache publish`: publishes one invalidation directly through Redis."""

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from ..shared.confirmation import Confirm, Confirmation
from ..shared.errors import InvalidTarget, LinkLost
from ..shared.invalidation import DEFAULT_NAMESPACE, Everything, Keys, Prefixes, Tags, Target, new_id
from .exit_codes import FAILED, OK
from .options import REDIS_URL, Json, Namespace, RedisUrl, publisher_at

if TYPE_CHECKING:
    from ..publisher import Preview
    from ..shared.confirmation import ReplicaConfirmation
    from ..shared.receipt import Receipt

__all__ = ["publish"]


def publish(
    *,
    namespace: Namespace = DEFAULT_NAMESPACE,
    key: Annotated[list[str] | None, typer.Option(help="Drop the entry with this key. May be repeated.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Drop the entries with this tag. May be repeated.")] = None,
    prefix: Annotated[
        list[str] | None, typer.Option(help="Drop the entries whose key begins with this. May be repeated.")
    ] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Drop every entry of the namespace.")] = False,
    reason: Annotated[str, typer.Option(help="Why; stored in the log.")] = "",
    id: Annotated[
        str | None,
        typer.Option(help="The id of an earlier attempt, to publish it again: it is logged once.", show_default="new"),
    ] = None,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="Wait for the replicas, and list which have applied it.")
    ] = False,
    confirm_seconds: Annotated[
        float | None, typer.Option(help="How long to wait for the replicas; implies --confirm.", show_default="1")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Report how many entries would be dropped, without dropping them.")
    ] = False,
    timeout_seconds: Annotated[float, typer.Option(help="How long to try to reach Redis.")] = 5.0,
    redis_url: RedisUrl = REDIS_URL,
    json: Json = False,
) -> None:
    """Publish an invalidation. Exits with 0 when Redis has logged it, otherwise with 1.

    With --confirm, 0 also means that every registered replica has applied it.
    It exits with 1 if the registry, new or lost, may not list every replica.
    With --dry-run, 0 means that every replica has answered, and at least one.
    """
    targets = _targets(key or [], tag or [], prefix or [], everything=everything)
    if not targets:
        raise InvalidTarget("expected at least one of --key, --tag, --prefix or --everything, got none")
    if dry_run:
        preview = asyncio.run(_previewed(targets, redis_url, namespace, timeout_seconds))
        _print_preview(preview, json=json)
        raise typer.Exit(FAILED if preview.missing or not preview.replicas else OK)
    wait = None
    if confirm or confirm_seconds is not None:
        wait = Confirm() if confirm_seconds is None else Confirm(timeout_seconds=confirm_seconds)
    receipt = asyncio.run(
        _published(
            targets,
            redis_url=redis_url,
            namespace=namespace,
            reason=reason,
            id=new_id() if id is None else id,
            timeout_seconds=timeout_seconds,
            confirm=wait,
        )
    )
    print(_as_json(receipt) if json else _as_text(receipt))
    if receipt.confirmation is not None:
        if not json:
            _print_confirmation(receipt.confirmation)
        raise typer.Exit(OK if receipt.confirmation.is_complete else FAILED)


def _targets(keys: list[str], tags: list[str], prefixes: list[str], *, everything: bool) -> list[Target]:
    targets: list[Target] = [Everything()] if everything else []
    for kind, names in ((Keys, keys), (Tags, tags), (Prefixes, prefixes)):
        if names:
            targets.append(kind(*names))
    return targets


async def _published(
    targets: list[Target],
    *,
    redis_url: str,
    namespace: str,
    reason: str,
    id: str,
    timeout_seconds: float,
    confirm: Confirm | None,
) -> "Receipt":
    async with publisher_at(redis_url, timeout_seconds) as publisher:
        try:
            return await publisher.publish(*targets, namespace=namespace, reason=reason, id=id, confirm=confirm)
        except LinkLost as error:
            # The library names its argument, the command line its option.
            raise type(error)(str(error).replace(f"id={id!r}", f"--id {id}")) from error


async def _previewed(targets: list[Target], redis_url: str, namespace: str, timeout_seconds: float) -> "Preview":
    async with publisher_at(redis_url, timeout_seconds) as publisher:
        return await publisher.preview(*targets, namespace=namespace)


def _print_preview(preview: "Preview", *, json: bool) -> None:
    """Print what would be dropped: as the response of `POST /invalidations/preview`, or a line for each replica."""
    import msgspec

    from ..shared.texts import counted
    from .printable import printable

    if json:
        print(msgspec.json.encode(preview).decode())
        return
    for each in preview.by_replica:
        print(f"  {printable(each.replica)}  {'about ' if each.is_estimate else ''}{each.entries}")
    for replica in preview.missing:
        print(f"  {printable(replica)}  no answer in time, or its version does not support the query")
    about = "about " if preview.is_estimate else ""
    if preview.doubt is not None:
        print(f"  there may be other replicas: {printable(preview.doubt)}")
    replicas, entries = counted(preview.replicas, "replica"), counted(preview.entries, "entry", "entries")
    print(f"nothing was dropped: {replicas}, {about}{entries}")


def _as_text(receipt: "Receipt") -> str:
    assert receipt.position is not None, "without a second path, every publish that returns is logged"
    epoch, sequence = receipt.position
    return (
        f"published {receipt.id} to {receipt.namespace} at {sequence} of epoch {epoch}; "
        f"receivers: {receipt.receivers} (subscribed connections; no proof that they applied it)"
    )


def _as_json(receipt: "Receipt") -> str:
    """Return the fields of the response to `POST /invalidations`."""
    import json

    import msgspec

    from ..publisher.api.documents.models import Accepted

    return json.dumps(msgspec.to_builtins(Accepted.of(receipt)))


def _unconfirmed_text(each: "ReplicaConfirmation") -> str:
    import time

    from ..shared.presence import time_of_day

    if each.outcome == "not followed":
        return "not followed by any subscriber of this process"
    if each.silent_ms is None:
        return "missing: it may serve old values, up to its staleness bound"
    if each.seen_ms_ago is None:
        seen = f"silent since {time_of_day(time.time(), each.silent_ms)}"
    else:
        seen = f"last seen {time_of_day(time.time(), each.seen_ms_ago)}"
    if each.outcome == "silent":
        return f"fell silent, {seen}: it serves nothing from its caches"
    return f"missing: fell silent, {seen}, has not dropped this; it may serve old values until it has ended"


def _print_confirmation(confirmation: Confirmation) -> None:
    """Print a line for each replica, and one for all."""
    from rich.console import Console
    from rich.text import Text

    from ..shared.texts import counted
    from .printable import printable

    console = Console(highlight=False)
    for each in confirmation.replicas:
        is_confirmed, is_missing = each.outcome == "confirmed", each.outcome == "missing"
        style = "bold red" if is_missing else "green" if is_confirmed else "yellow"
        line = Text("  ✓ " if is_confirmed else "  ✗ " if is_missing else "  – ", style)
        line.append(printable(each.replica), "" if is_confirmed else style)
        if is_confirmed:
            dropped = "" if each.dropped is None else f", dropped {each.dropped}"
            unexpected = "" if each.is_expected else ", was not registered"
            line.append(f"  {each.latency_ms:.1f} ms by {each.how}{dropped}{unexpected}", "dim")
        else:
            line.append(f"  {_unconfirmed_text(each)}")
        console.print(line, soft_wrap=True)
    if confirmation.doubt is not None:
        console.print(
            Text(f"  ? there may be other replicas: {printable(confirmation.doubt)}", "yellow"), soft_wrap=True
        )
    missing, expected = len(confirmation.missing), len(confirmation.expected)
    confirmed = f"confirmed by {expected - missing} of {counted(expected, 'replica')}"
    verdict = confirmed if expected else "no replica is registered"
    print(verdict if confirmation.doubt is None else f"{verdict}; there may be others")
