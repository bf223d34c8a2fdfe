"""`broadcache watch`: show what is published for a namespace, as it comes, and what was before."""

import asyncio
import os
import stat
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from ..shared.invalidation import DEFAULT_NAMESPACE, check_namespace
from .options import REDIS_URL, Json, Namespace, RedisUrl

if TYPE_CHECKING:
    from ..publisher.history.feed import FeedObserver

__all__ = ["watch"]


def watch(
    namespace: Namespace = DEFAULT_NAMESPACE,
    redis_url: RedisUrl = REDIS_URL,
    since: Annotated[
        str | None,
        typer.Option(
            help="Begin with what the log has since then: 15m, 2h, 1d, a number of seconds, or 2025-06-30T12:00:00Z."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Follow what is published, live, until Ctrl-C. What is logged while the link is lost is shown when it is back."""
    from ..publisher.history.since import since_ms_of
    from .watch_printer import JsonPrinter, TextPrinter

    check_namespace(namespace)
    since_ms = None if since is None else since_ms_of(since, now_ms=time.time_ns() // 1_000_000)
    printer: FeedObserver = JsonPrinter(namespace) if json else TextPrinter(namespace)
    asyncio.run(_watch(namespace, redis_url, since_ms, printer))


async def _watch(namespace: str, redis_url: str, since_ms: int | None, printer: "FeedObserver") -> None:
    """Follow the namespace until nobody reads what is printed."""
    from ..publisher.history.feed import Feed

    following = asyncio.create_task(Feed(redis_url, namespace, since_ms=since_ms).follow(printer))
    reader_gone = asyncio.create_task(_stdout_closed())
    try:
        await asyncio.wait([following, reader_gone], return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()
    except BrokenPipeError:
        pass
    finally:
        for task in (following, reader_gone):
            task.cancel()
        await asyncio.gather(following, reader_gone, return_exceptions=True)
        _discard_unwritten_output()


async def _stdout_closed() -> None:
    """Return when the pipe that standard output is has lost its reader; never return for anything else.

    Without it, `broadcache watch | head -1` would stay until the next message, which may never come.
    """
    closed = asyncio.Event()
    mode = os.fstat(sys.stdout.fileno()).st_mode
    if stat.S_ISFIFO(mode):
        # A pipe's writing end becomes readable when its reader has gone, and at no other time.
        asyncio.get_running_loop().add_reader(sys.stdout.fileno(), closed.set)
    await closed.wait()


def _discard_unwritten_output() -> None:
    """Keep the interpreter from failing at exit over output that nobody reads any more."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
