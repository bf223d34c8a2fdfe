"""`broadcache fanout`: sends one request to every address of a service and shows each response."""

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ..shared.errors import InvalidSettings
from .exit_codes import FAILED, OK
from .options import Json

if TYPE_CHECKING:
    from ..publisher.api.settings import FanoutSettings
    from ..publisher.fanout.broadcaster import Broadcast, CallOutcome, Request

__all__ = ["fanout"]

_REPLICA_PATH: Final = "/cache-invalidation"
_ANSWER_CHARACTERS_SHOWN: Final = 60


def fanout(
    *,
    service: Annotated[str, typer.Argument(help="The service's name in DNS, e.g. of a headless service.")],
    port: Annotated[str, typer.Argument(help="A port number, or a port name of the service's SRV records.")],
    path: Annotated[
        str, typer.Argument(help="Path and query, already percent-encoded.", show_default=True)
    ] = _REPLICA_PATH,
    method: Annotated[
        str | None, typer.Option("--method", "-X", help="The HTTP method.", show_default="GET, or POST with a body")
    ] = None,
    body: Annotated[
        str | None, typer.Option("--data", "-d", help="The body; @FILE reads it from a file, @- from stdin.")
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option("--header", "-H", help="A header, NAME: VALUE. May be repeated.")
    ] = None,
    address: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT to call instead of the DNS addresses. May be repeated.")
    ] = None,
    network: Annotated[
        list[str] | None,
        typer.Option(
            help="CIDR of permitted addresses; loopback and other special ranges need to be listed. May be repeated.",
            show_default="BROADCACHE_FANOUT_NETWORKS",
        ),
    ] = None,
    nameserver: Annotated[
        list[str] | None,
        typer.Option(help="HOST:PORT of a name server. May be repeated.", show_default="BROADCACHE_FANOUT_NAMESERVERS"),
    ] = None,
    timeout_seconds: Annotated[
        float | None,
        typer.Option(help="How long to wait for each address.", show_default="BROADCACHE_FANOUT_TIMEOUT_SECONDS"),
    ] = None,
    json: Json = False,
) -> None:
    """Call every address of a service at once. Exits with 0 when each responded with 200 to 299, otherwise with 1.

    Without PATH it requests each replica's status.
    With -d, or with -X POST and no body, replicas drop entries.
    The replica token is read from BROADCACHE_REPLICA_TOKEN.
    """
    from ..publisher.api.settings import FanoutSettings
    from ..publisher.fanout.policy import allow_of, check_destination
    from ..shared.process.settings import read_settings

    check_destination(service, port)
    settings = read_settings(
        FanoutSettings,
        os.environ,
        fanout_allow=allow_of(service, port),
        fanout_networks=tuple(network) if network else None,
        fanout_nameservers=tuple(nameserver) if nameserver else None,
        fanout_timeout_seconds=timeout_seconds,
    )
    request = _request(settings, service=service, port=port, path=path, method=method, body=body, headers=header or [])
    broadcast = asyncio.run(_broadcast(settings, request, service, address or []))
    print(_as_json(broadcast) if json else _as_table(broadcast), flush=True)
    raise typer.Exit(OK if broadcast.outcomes and broadcast.succeeded == len(broadcast.outcomes) else FAILED)


def _request(
    settings: "FanoutSettings",
    *,
    service: str,
    port: str,
    path: str,
    method: str | None,
    body: str | None,
    headers: list[str],
) -> "Request":
    from ..publisher.fanout.broadcaster import Request
    from ..publisher.fanout.forwarding import is_idempotent

    if not path.startswith("/") or not path.isascii() or not path.isprintable() or " " in path:
        raise InvalidSettings(f"expected a percent-encoded path that begins with /, got {path!r:.100}; correct it")
    content = _content(body)
    method = method or ("POST" if content else "GET")
    given = [_header(header) for header in headers]
    names = {name.lower() for name, _ in given}
    if content and b"content-type" not in names:
        given.append((b"Content-Type", b"application/json"))
    if (authorization := _authorization(path)) and b"authorization" not in names:
        given.append((b"Authorization", authorization))
    is_ours = path.partition("?")[0] == _REPLICA_PATH  # replicas recognise the id of an applied invalidation
    return Request(
        method=method,
        destination=settings.fanout_policy().check(method, service, port),
        target=path.encode(),
        headers=tuple(given),
        body=content,
        is_idempotent=is_ours or is_idempotent(method, given),
    )


def _content(body: str | None) -> bytes:
    if body is None or not body.startswith("@"):
        return (body or "").encode()
    if body == "@-":
        return sys.stdin.buffer.read()
    try:
        return Path(body[1:]).read_bytes()
    except OSError as error:
        raise InvalidSettings(f"--data: expected a file that can be read, got {body[1:]!r}: {error.strerror}") from None


def _header(text: str) -> tuple[bytes, bytes]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip() or not text.isascii() or not text.isprintable():
        raise InvalidSettings(
            "--header: expected NAME: VALUE in printable ASCII, got something else (not shown, since it may be "
            "secret); correct it"
        )
    return name.strip().encode(), value.strip().encode()


def _authorization(path: str) -> bytes:
    """Return the Authorization header for a replica's path; empty for every other path, to keep the token secret."""
    token = os.environ.get("BROADCACHE_REPLICA_TOKEN", "").partition(",")[0].strip()
    return f"Bearer {token}".encode() if token and path.partition("?")[0] == _REPLICA_PATH else b""


async def _broadcast(settings: "FanoutSettings", request: "Request", service: str, addresses: list[str]) -> "Broadcast":
    from ..publisher.fanout.discovery import ListDiscovery

    named = ListDiscovery({service: addresses}) if addresses else None
    async with settings.fanout_broadcaster(settings.fanout_policy(), named) as broadcaster:
        return await broadcaster.broadcast(request)


def _as_json(broadcast: "Broadcast") -> str:
    """Return the fields of the response to `ANY /{service}/{port}/{rest}`, plus the body of each response."""
    import msgspec

    from ..publisher.api.documents.broadcast import answer_of

    answer = msgspec.to_builtins(answer_of(broadcast))
    for response, outcome in zip(answer["responses"], broadcast.outcomes, strict=True):
        response["body"] = outcome.body.decode(errors="replace")
    return msgspec.json.encode(answer).decode()


def _as_table(broadcast: "Broadcast") -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("address", "status", "ms", "attempts", "answer"):
        table.add_column(
            column, no_wrap=column != "answer", justify="right" if column in ("ms", "attempts") else "left"
        )
    for outcome in broadcast.outcomes:
        style = "green" if outcome.is_success else "red"
        table.add_row(
            Text(outcome.url.partition("//")[2].partition("/")[0]),
            Text(str(outcome.status_code or "–"), style),
            f"{outcome.latency_ms:.1f}",
            str(outcome.attempts),
            Text(_shown(outcome)),
        )
    console = Console()
    with console.capture() as capture:
        console.print(table)
        for note in broadcast.notes:
            console.print(Text(note, "dim" if broadcast.is_complete else "yellow"))
    complete = "" if broadcast.is_complete else ", and there may be more addresses"
    return (
        f"{capture.get()}{broadcast.succeeded} of {len(broadcast.outcomes)} succeeded{complete} "
        f"({broadcast.how}, {broadcast.elapsed_ms:.0f} ms)"
    )


def _processes_in(body: bytes) -> str | None:
    """Return what the processes of a replica's address have done; None if the body is another one."""
    import msgspec

    from ..shared.fanout_report import NOT_FOLLOWED, ProcessOutcome
    from ..shared.texts import counted

    class Posted(msgspec.Struct):
        processes: tuple[ProcessOutcome, ...]
        doubt: str | None = None

    try:
        posted = msgspec.json.decode(body, type=Posted)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    applied = [each for each in posted.processes if each.error is None and each.outcome != NOT_FOLLOWED]
    failed = [
        f"process {'?' if each.pid is None else each.pid}: {each.error}" for each in posted.processes if each.error
    ]
    parts = [f"applied by {len(applied)} of {counted(len(posted.processes), 'process', 'processes')}", *failed]
    return "; ".join(parts if posted.doubt is None else [*parts, "there may be others"])


def _shown(outcome: "CallOutcome") -> str:
    """Return the part of a response that fits on a line, or its error, without control characters."""
    text = outcome.error or _processes_in(outcome.body) or outcome.body.decode(errors="replace")
    text = "".join(char if char.isprintable() else " " for char in text)
    return text if len(text) <= _ANSWER_CHARACTERS_SHOWN else f"{text[:_ANSWER_CHARACTERS_SHOWN]}…"
