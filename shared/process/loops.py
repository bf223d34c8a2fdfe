"""Event loops: whether this code runs in one, calls from one to another, and the loop that an object belongs to."""

import asyncio
import contextlib
import inspect
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, Future
from concurrent.futures import wait as wait_for
from typing import Any, Final, Generic, TypeVar

__all__ = [
    "Home",
    "LoopBlocked",
    "LoopUnavailable",
    "awaited_on",
    "end_task",
    "in_time",
    "is_cancelled",
    "is_in_event_loop",
    "on_loop",
    "result_from",
]

T = TypeVar("T")

_CHECK_SECONDS: Final = 0.25
"""How often a call to another event loop looks whether that loop still runs: one that ends may drop the call."""


class LoopUnavailable(Exception):
    """The event loop to call has ended, before the call or during it, or does not begin the call in time."""


class LoopBlocked(LoopUnavailable):
    """The event loop runs, and does not begin the call in time."""

    def __init__(self) -> None:
        super().__init__("the event loop does not respond: it is blocked")


def is_cancelled() -> bool:
    """Whether the current task is being cancelled, and not just an operation that it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def is_in_event_loop() -> bool:
    """Whether this code runs in an event loop, which must not be blocked.

    gevent makes every greenlet of a thread see the event loop that one of them runs. Only that one is in the loop.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return False
    runs_in = getattr(loop, "_thread_id", None)  # of asyncio's own loops; with gevent, the id of a greenlet
    return runs_in is None or runs_in == threading.get_ident()


async def awaited_on(
    loop: asyncio.AbstractEventLoop, work: Callable[[], Awaitable[T]], *, begin_seconds: float | None = None
) -> T:
    """Do `work` on another event loop, which runs in another thread, and await the result here.

    A cancellation here is passed on.

    Units:  `begin_seconds` limits how long the other loop may take to begin.
    Raises: LoopUnavailable; what `work` raises.
    """
    call = _Call(loop, work)
    waiting = asyncio.wrap_future(call.future)
    began_at = time.monotonic()
    try:
        while not waiting.done():
            await asyncio.wait([waiting], timeout=_CHECK_SECONDS)
            call.check(None if begin_seconds is None else began_at + begin_seconds)
    except BaseException:
        if not loop.is_closed():
            waiting.cancel()
        raise
    if waiting.cancelled():
        raise LoopUnavailable(_ENDED)
    return waiting.result()


async def on_loop(loop: asyncio.AbstractEventLoop | None, work: Callable[[], Awaitable[T]]) -> T:
    """Do `work` on `loop`; here, if it is this loop or None. Raises: LoopUnavailable; what `work` raises."""
    if loop is None or loop is asyncio.get_running_loop():
        return await work()
    return await awaited_on(loop, work)


async def in_time(timeout_seconds: float | None, waiting: Awaitable[None]) -> bool:
    """Wait at most `timeout_seconds`; return whether `waiting` ended in time, and its event loop did not end before."""
    try:
        async with asyncio.timeout(timeout_seconds):
            await waiting
    except (TimeoutError, LoopUnavailable):
        return False
    return True


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancel a task, and wait until it has ended. May be called on any event loop; raises nothing of the task."""

    async def end() -> None:
        task.cancel()
        await asyncio.wait([task])

    if not task.done():
        with contextlib.suppress(LoopUnavailable):  # its event loop has ended, and the task with it
            await on_loop(task.get_loop(), end)


def result_from(
    loop: asyncio.AbstractEventLoop, work: Callable[[], Awaitable[T]], *, timeout_seconds: float | None = None
) -> T:
    """Do `work` on the event loop of another thread, and block until it is done.

    Raises: LoopUnavailable, also when `timeout_seconds` have passed; what `work` raises.
    """
    call = _Call(loop, work)
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    try:
        while not wait_for([call.future], timeout=_CHECK_SECONDS).done:
            call.check(deadline)
            if deadline is not None and time.monotonic() >= deadline:
                raise LoopBlocked
    except BaseException:
        if not loop.is_closed():
            call.future.cancel()
        raise
    try:
        return call.future.result()
    except CancelledError:
        raise LoopUnavailable(_ENDED) from None


_ENDED: Final = "the event loop has ended"


class _Call(Generic[T]):
    """A call that was handed to another event loop. Raises LoopUnavailable if the loop is closed already."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Callable[[], Awaitable[T]]) -> None:
        self._loop = loop
        self._has_begun = False
        self._coroutine = self._run(work)
        try:
            self.future: Future[T] = asyncio.run_coroutine_threadsafe(self._coroutine, loop)
        except RuntimeError:
            self._coroutine.close()
            raise LoopUnavailable(_ENDED) from None

    async def _run(self, work: Callable[[], Awaitable[T]]) -> T:
        self._has_begun = True
        return await work()

    def check(self, begin_by: float | None) -> None:
        """Raise LoopUnavailable if the loop has ended without an answer, or has not begun in time."""
        if self.future.done():
            return
        if not self._loop.is_running():
            if self._loop.is_closed() and inspect.getcoroutinestate(self._coroutine) == inspect.CORO_CREATED:
                self._coroutine.close()
            raise LoopUnavailable(_ENDED)
        if begin_by is not None and not self._has_begun and time.monotonic() >= begin_by:
            raise LoopBlocked


class Home:
    """The event loop that an object's connections and tasks belong to: the first that uses it, for as long as it runs.

    A call from another event loop is carried over to it. When it has ended, or this process was forked from the one
    that it runs in, the next loop that uses the object takes its place.

    Shape:  `move` is called on the new loop. It drops what belonged to the old one, without waiting for it, and returns
            what else is to be done before the object is used.
    Units:  `begin_seconds` limits how long the object's loop may take to begin a call of another loop.
    """

    def __init__(self, move: Callable[[], Coroutine[Any, Any, None] | None], *, begin_seconds: float) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._move = move
        self._moving: asyncio.Task[None] | None = None
        self._is_ending = False
        self._begin_seconds = begin_seconds

    @property
    def is_here(self) -> bool:
        """Whether the object can be used at once on the running event loop."""
        return self._loop is asyncio.get_running_loop() and self._moving is None

    async def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do `work` on the object's event loop. If that loop ends meanwhile, it is done again here.

        Raises: LoopBlocked; what `work` raises.
        """
        while (home := self._settled()) is not None:
            try:
                return await awaited_on(home, work, begin_seconds=self._begin_seconds)
            except LoopBlocked:
                raise
            except LoopUnavailable:
                self._is_ending = self._loop is home  # it may still run, to end its tasks
        if (moving := self._moving) is not None:
            await asyncio.wait([moving])
            if self._moving is moving:
                self._moving = None
            moving.result()
        return await work()

    def leave(self) -> None:
        """Belong to no event loop: nothing is open. The next loop that uses the object becomes its loop."""
        self._loop = None

    def _settled(self) -> asyncio.AbstractEventLoop | None:
        """Return the object's event loop if it is another one that runs. Otherwise, make this one the object's loop."""
        here = asyncio.get_running_loop()
        with _settling:
            home = self._loop
            if home is here:
                return None
            if home is not None and self._is_usable(home):
                return home
            self._loop, self._pid, self._is_ending = here, os.getpid(), False
            left = None if home is None else self._move()
            self._moving = None if left is None else asyncio.create_task(left, name="broadcache move to event loop")
        return None

    def _is_usable(self, home: asyncio.AbstractEventLoop) -> bool:
        # A loop of the parent process seems to run in its child for ever.
        return not self._is_ending and self._pid == os.getpid() and home.is_running()


_settling = threading.Lock()


def _renew_lock() -> None:
    """In a child of a fork: another thread of the parent may have held the lock."""
    global _settling  # noqa: PLW0603
    _settling = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
