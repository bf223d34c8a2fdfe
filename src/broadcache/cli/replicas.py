"""`broadcache replicas`: lists the replicas, and how stale each can be; forgets one that fell silent."""

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..shared.invalidation import DEFAULT_NAMESPACE
from .exit_codes import FAILED, OK
from .options import REDIS_URL, Json, Namespace, RedisUrl, publisher_at

if TYPE_CHECKING:
    from ..shared.presence import ReplicaPresence

__all__ = ["replicas"]


def replicas(
    *,
    namespace: Namespace = DEFAULT_NAMESPACE,
    forget: Annotated[
        str | None, typer.Option(metavar="ID", help="Forget this replica, which fell silent: it has ended for good.")
    ] = None,
    timeout_seconds: Annotated[float, typer.Option(help="How long to try.")] = 5.0,
    redis_url: RedisUrl = REDIS_URL,
    json: Json = False,
) -> None:
    """List the replicas of a namespace. Exits with 0 when all are coherent, with 1 if not or if none is.

    A replica that was killed, frozen or cut off fell silent: it is listed for a day, or until it is forgotten.
    With --forget, 0 means that it is forgotten.
    """
    if forget is not None:
        raise typer.Exit(_forget(redis_url, namespace, forget, timeout_seconds, json=json))
    found = asyncio.run(_found(redis_url, namespace, timeout_seconds))
    if json:
        _print_json(found)
    else:
        _print_table(found, namespace)
    raise typer.Exit(OK if found and all(each.is_coherent for each in found) else FAILED)


async def _found(redis_url: str, namespace: str, timeout_seconds: float) -> "list[ReplicaPresence]":
    async with publisher_at(redis_url, timeout_seconds) as publisher:
        return await publisher.replicas(namespace)


def _forget(redis_url: str, namespace: str, replica: str, timeout_seconds: float, *, json: bool) -> int:
    """Forget a replica, print the result, and return the exit code."""
    import msgspec

    from .printable import printable

    result = asyncio.run(_forgotten(redis_url, namespace, replica, timeout_seconds))
    texts = {
        "forgotten": "is forgotten; its next echo would list it again",
        "registered": "is registered: its next echo would list it again; stop the process, it then leaves by itself",
        "unknown": "is not listed; expected the id of a replica that fell silent, see broadcache replicas",
    }
    if json:
        print(msgspec.json.encode({"replica": replica, "namespace": namespace, "result": result}).decode())
    else:
        print(f"replica {printable(replica)} of {namespace} {texts[result]}")
    return OK if result == "forgotten" else FAILED


async def _forgotten(
    redis_url: str, namespace: str, replica: str, timeout_seconds: float
) -> Literal["forgotten", "registered", "unknown"]:
    async with publisher_at(redis_url, timeout_seconds) as publisher:
        return await publisher.forget_replica(replica, namespace)


def _print_json(found: "list[ReplicaPresence]") -> None:
    """Print one object a line: the replica's presence, and the values derived from it."""
    import msgspec

    for replica in found:
        position = replica.position and replica.position._asdict()
        derived = {
            "is_coherent": replica.is_coherent,
            "hit_ratio": replica.hit_ratio,
            "clears_total": replica.clears_total,
        }
        print(msgspec.json.encode({**msgspec.structs.asdict(replica), "position": position, **derived}).decode())


def _print_table(found: "list[ReplicaPresence]", namespace: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from .printable import printable

    if not found:
        print(f"the namespace {namespace} has no registered replica")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("replica", "state", "stale", "bound", "sequence", "behind", "entries", "hit ratio", "clears"):
        table.add_column(heading, justify="left" if heading in {"replica", "state"} else "right", no_wrap=True)
    for heading in ("replays", "seen", "where"):
        table.add_column(heading, justify="left" if heading == "where" else "right", no_wrap=True)
    for each in found:
        # The last presence said coherent, but its proof is older than the bound.
        state = each.state if each.is_coherent or each.state != "coherent" else "overdue"
        state = "silent" if each.is_silent else state
        table.add_row(
            Text(printable(each.replica)),
            Text(printable(state), "green" if each.is_coherent else "bold red"),
            _shown(each.staleness_seconds, "{:.1f} s"),
            _shown(each.max_staleness_seconds, "{:g} s"),
            _shown(each.position and each.position.sequence, "{}"),
            _shown(each.behind, "{}"),
            str(each.entries),
            _shown(each.hit_ratio, "{:.0%}"),
            str(each.clears_total),
            str(each.replays),
            _shown(each.seen_ms_ago, "{} ms ago"),
            Text(printable(f"{each.host} {each.pid} v{each.version}" if each.host else "")),
        )
    console = Console(highlight=False)
    console.print(table, soft_wrap=not console.is_terminal)
    now = time.time()
    for each in found:
        if each.is_silent:
            serving = (
                "it may serve old values until it has ended" if each.may_serve else "it serves nothing from its caches"
            )
            print(f"{printable(each.replica)} fell silent: {each.last_word(now)}; {serving}")
        if each.conflict:
            print(f"{printable(each.replica)} is the id of several processes: also of {printable(each.conflict)}")


def _shown(value: object, form: str) -> str:
    return "–" if value is None else form.format(value)
