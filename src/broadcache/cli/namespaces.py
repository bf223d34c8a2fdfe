"""`broadcache namespaces`: lists the namespaces that have keys in Redis; forgets one that no replica uses."""

import asyncio
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from .exit_codes import FAILED, OK
from .options import REDIS_URL, Json, RedisUrl, publisher_at

if TYPE_CHECKING:
    from ..publisher import ForgetResult, NamespacesPage

__all__ = ["namespaces"]


def namespaces(
    *,
    forget: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Remove this namespace with its log, if no replica may serve from caches of it."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The most namespaces to list.")] = 1_000,
    after: Annotated[str, typer.Option(metavar="NAME", help="List those whose names come after this one.")] = "",
    timeout_seconds: Annotated[float, typer.Option(help="How long to try, for each namespace.")] = 5.0,
    redis_url: RedisUrl = REDIS_URL,
    json: Json = False,
) -> None:
    """List the namespaces of a database (and prefix), by name.

    The keys of a namespace stay until it is forgotten. With --forget, 0 means that it is, and 1 that replicas are
    registered for it, or silent ones may serve from their caches, or that it has no keys.
    """
    if forget is not None:
        raise typer.Exit(_forget(redis_url, forget, timeout_seconds, json=json))
    page = asyncio.run(_page(redis_url, after, limit, timeout_seconds))
    if json:
        _print_json(page)
    else:
        _print_table(page)
    if page.next_after is not None:
        print(f"there are more: list them with --after {page.next_after}", file=sys.stderr)


async def _page(redis_url: str, after: str, limit: int, timeout_seconds: float) -> "NamespacesPage":
    async with publisher_at(redis_url, timeout_seconds) as publisher:
        return await publisher.namespaces(after=after, count=limit)


async def _forgotten(redis_url: str, namespace: str, timeout_seconds: float) -> "ForgetResult":
    async with publisher_at(redis_url, timeout_seconds) as publisher:
        return await publisher.forget_namespace(namespace)


def _forget(redis_url: str, namespace: str, timeout_seconds: float, *, json: bool) -> int:
    """Forget a namespace, print the result, and return the exit code."""
    result = asyncio.run(_forgotten(redis_url, namespace, timeout_seconds))
    if json:
        import msgspec

        print(msgspec.json.encode({"namespace": namespace, **result._asdict()}).decode())
    else:
        print(f"namespace {namespace} {_text_of(result)}")
    return OK if result.outcome == "forgotten" else FAILED


def _text_of(result: "ForgetResult") -> str:
    from .printable import printable

    if result.outcome == "forgotten":
        return "is forgotten; a replica or publisher that uses it creates it anew"
    if result.outcome == "unknown":
        return "has no keys; see broadcache namespaces"
    parts: list[str] = []
    if result.registered:
        parts.append(f"is followed by {printable(', '.join(result.registered))}: stop each, it then leaves by itself")
    if result.silent:
        parts.append(
            f"may be served from the caches of {printable(', '.join(result.silent))}, which fell silent: end each, "
            "then broadcache replicas --forget ID"
        )
    if result.is_list_cut:
        parts.append("may be served by silent replicas that are no longer listed, because there were too many")
    return "is not forgotten: it " + "; it ".join(parts)


def _print_json(page: "NamespacesPage") -> None:
    """Print one object a line."""
    import msgspec

    for each in page.namespaces:
        head = each.head and each.head._asdict()
        print(msgspec.json.encode({**each._asdict(), "head": head, "replicas": each.replicas._asdict()}).decode())


def _print_table(page: "NamespacesPage") -> None:
    from rich.console import Console
    from rich.table import Table

    if not page.namespaces:
        print("there are no namespaces")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("namespace", "sequence", "log", "replicas", "silent", "last sent", "memory"):
        table.add_column(heading, justify="left" if heading == "namespace" else "right", no_wrap=True)
    for each in page.namespaces:
        silent = each.replicas.silent + each.replicas.silent_serving
        table.add_row(
            each.namespace,
            "–" if each.head is None else str(each.head.sequence),
            str(each.log_length),
            str(each.replicas.registered),
            str(silent),
            _time(each.last_sent_at_ms),
            "–" if each.memory_bytes is None else f"{each.memory_bytes / 1_024:,.1f} KiB",
        )
    console = Console(highlight=False)
    console.print(table, soft_wrap=not console.is_terminal)


def _time(unix_ms: int | None) -> str:
    if unix_ms is None:
        return "–"
    try:
        return datetime.fromtimestamp(unix_ms / 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError, OSError):  # another program may write any number
        return "–"
