"""`broadcache watch`: shows the invalidations of a namespace live, and optionally earlier ones."""

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
            help="Also show logged invalidations since: 15m, 2h, 1d, a number of seconds, or 2025-06-30T12:00:00Z."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show invalidations as they are published, until Ctrl-C. After a lost link, missed ones are read from the log."""
    from ..publisher.history.since import since_ms_of
    from ..shared.transport.redis.address import RedisAddress
    from .watch_printer import JsonPrinter, TextPrinter

    check_namespace(namespace)
    since_ms = None if since is None else since_ms_of(since, now_ms=time.time_ns() // 1_000_000)
    channel = RedisAddress(redis_url).names_of(namespace).channel
    printer: FeedObserver = JsonPrinter(channel) if json else TextPrinter(channel)
    asyncio.run(_watch(namespace, redis_url, since_ms, printer))


async def _watch(namespace: str, redis_url: str, since_ms: int | None, printer: "FeedObserver") -> None:
    """Follow the namespace until the reader of standard output is gone."""
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
    """Return when standard output is a pipe and its reader has closed it; otherwise never return.

    Without this, `broadcache watch | head -1` would run until the next message, which may never arrive.
    """
    closed = asyncio.Event()
    mode = os.fstat(sys.stdout.fileno()).st_mode
    if stat.S_ISFIFO(mode):
        # The writing end of a pipe becomes readable when its reader closes it, and at no other time.
        asyncio.get_running_loop().add_reader(sys.stdout.fileno(), closed.set)
    await closed.wait()


def _discard_unwritten_output() -> None:
    """Keep the interpreter from failing at exit when it flushes output to a closed pipe."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
