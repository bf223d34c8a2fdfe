"""`broadcache watch`: show what is published on a namespace's channel, as it comes."""

import asyncio
import os
import stat
import sys
from typing import TYPE_CHECKING

from ..shared.invalidation import DEFAULT_NAMESPACE, check_namespace
from .options import REDIS_URL, Json, Namespace, RedisUrl

if TYPE_CHECKING:
    from .channel import Observer

__all__ = ["watch"]


def watch(namespace: Namespace = DEFAULT_NAMESPACE, redis_url: RedisUrl = REDIS_URL, json: Json = False) -> None:
    """Follow what is published, live, until Ctrl-C. What was published while the link was lost is not shown."""
    from .watch_printer import JsonPrinter, TextPrinter

    check_namespace(namespace)
    printer: Observer = JsonPrinter(namespace) if json else TextPrinter(namespace)
    asyncio.run(_watch(namespace, redis_url, printer))


async def _watch(namespace: str, redis_url: str, printer: "Observer") -> None:
    """Follow the channel until nobody reads what is printed."""
    from .channel import Channel

    following = asyncio.create_task(Channel(redis_url, namespace).follow(printer))
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
