"""One load under way, and the loads that wait for each other."""

import asyncio
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from contextvars import ContextVar
from functools import partial
from typing import Any, Final

from ..token import LoadToken

__all__ = ["ABSENT", "CANCELLED", "Load", "first_result", "stop_waiting", "within", "within_also"]

CANCELLED: Final = object()
"""The result of a load that was cancelled. Its callers start over."""
ABSENT: Final = object()
"""The result of a load of several keys for a key that the loader left out."""


class Load:
    """One running call of a loader. If it loads several keys, each of them has a `Load` too, whose `batch` it is."""

    __slots__ = (
        "batch",
        "is_finished",
        "is_kept",
        "loaded_tags",
        "loop",
        "outcome",
        "owner",
        "parts",
        "tags",
        "task",
        "thread_id",
        "token",
        "ttl_seconds",
        "waiters",
        "waits_for",
    )

    def __init__(
        self, token: LoadToken, tags: tuple[str, ...], ttl_seconds: float | None, batch: "Load | None" = None
    ) -> None:
        self.token: LoadToken = token
        self.tags: tuple[str, ...] = tags
        self.ttl_seconds: float | None = ttl_seconds
        self.thread_id: int = threading.get_ident()
        # The loads that it is one of: another cache may have the key. None if it is read within the load of its key.
        self.owner: object = None
        # An asynchronous load runs as a task of its own, so that no caller's cancellation reaches it.
        self.task: asyncio.Task[Any] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        # Made when the first caller waits from outside the load's event loop.
        self.outcome: Future[Any] | None = None
        self.is_finished: bool = False
        # Whether it goes on when its last caller has left.
        self.is_kept: bool = False
        # The tags that its loader returned with the value. Callers that join it do not know them.
        self.loaded_tags: tuple[str, ...] = ()
        self.waiters: int = 0
        # A list: a loader may wait twice for one load, and end one of the waits.
        self.waits_for: list[Load] = [] if batch is None else [batch]
        self.batch: Load | None = batch
        self.parts: tuple[Load, ...] = ()

    @property
    def root(self) -> "Load":
        """The load whose task runs the loader."""
        return self.batch or self

    @property
    def is_awaited(self) -> bool:
        """Whether a caller waits for it, or for one of its keys."""
        return self.waiters > 0 or any(part.waiters for part in self.parts)

    def leads_to(self, loads: "tuple[Load, ...]") -> bool:
        """Whether this load waits, directly or through other loads, for one of `loads`."""
        seen: set[Load] = set()
        ahead: list[Load] = [self]
        while ahead:
            load = ahead.pop()
            if load in loads:
                return True
            if load not in seen:
                seen.add(load)
                ahead.extend(load.waits_for)
        return False

    def awaited_outcome(self) -> "Future[Any]":
        """Return the future of its result, for callers outside of its event loop. Under the lock."""
        if self.outcome is None:
            self.outcome = Future()
        return self.outcome


# The loads whose loaders this code runs in, the outermost first. A loader that needs a key whose load waits for that
# loader itself would wait for ever; it calls a loader of its own instead.
within: ContextVar[tuple[Load, ...]] = ContextVar("broadcache_loads", default=())


def within_also(*loads: Load) -> tuple[Load, ...]:
    """Return the loads that code runs in when it runs in the loaders of these, too."""
    # Tasks that a loader leaves behind inherit its context; finished loads would pile up there.
    return (*(outer for outer in within.get() if not outer.is_finished), *loads)


def stop_waiting(outer: tuple[Load, ...], load: Load) -> None:
    """Record that the loader in which this wait began, if any, no longer waits for `load`.

    Not the loader in which it ends: a caller whose event loop was closed is collected later, inside unrelated code.
    """
    if outer:
        outer[-1].waits_for.remove(load)


async def first_result(
    loads: Iterable[Load], loop: asyncio.AbstractEventLoop, seconds: float | None
) -> tuple[Load | None, Any]:
    """Wait until one of `loads` has ended; return it and its result, or None after that many seconds.

    Shape:  the result is a value, a Failure, `CANCELLED` or `ABSENT`. An `asyncio.CancelledError` is the caller's own.
    """
    first: asyncio.Future[tuple[Load | None, Any]] = loop.create_future()
    for load in loads:
        ended = load.task if load.task and load.loop is loop else asyncio.wrap_future(load.awaited_outcome())
        ended.add_done_callback(partial(_settle, first, load))
    timer = None if seconds is None else loop.call_later(seconds, _settle, first, None, None)
    try:
        return await first
    finally:
        if timer is not None:
            timer.cancel()


def _settle(
    first: "asyncio.Future[tuple[Load | None, Any]]", load: Load | None, ended: "asyncio.Future[Any] | None"
) -> None:
    if first.done():
        return
    if ended is None:
        first.set_result((load, None))
    elif ended.cancelled():
        first.set_result((load, CANCELLED))
    elif (error := ended.exception()) is not None:
        first.set_exception(error)
    else:
        first.set_result((load, ended.result()))
