"""The thread of a subscriber: for a service that has no event loop of its own."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from ...shared.errors import InvalidSettings

__all__ = ["SubscriberThread"]


class SubscriberThread:
    """A daemon thread with an event loop in which a subscriber runs.

    Shape:  `live` runs the subscriber until it is cancelled; `wait_ready` returns when the subscriber is ready, or its
            time is up.
    """

    def __init__(
        self, live: Callable[[], Coroutine[Any, Any, None]], wait_ready: Callable[[], Awaitable[bool]]
    ) -> None:
        self._live = live
        self._wait_ready = wait_ready
        self._started = threading.Event()
        self._is_stopping = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._has_loop = threading.Event()
        self._stop: asyncio.Event | None = None
        self._other_loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run_loop, name="broadcache subscriber", daemon=True)

    def start(self) -> None:
        """Start the thread. Raises: RuntimeError when the interpreter is ending, or has no thread left."""
        self._thread.start()

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop of the thread, which has been started. None if it could not run one."""
        self._has_loop.wait()
        return self._loop

    def wait(self) -> None:
        """Return when the subscriber is ready, or has given up waiting for that."""
        self._started.wait()
        if self._other_loop is not None:
            raise InvalidSettings(
                "expected a thread without an event loop, got one that runs a loop already: with gevent, all greenlets "
                "share one; give all caches to one subscriber, and enter it before other code runs a loop"
            )

    def stop(self, timeout_seconds: float | None = None) -> None:
        """Stop the subscriber, and return when the thread has ended, or after `timeout_seconds`."""
        self._is_stopping.set()
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop was closed just now
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout_seconds)

    def _run_loop(self) -> None:
        try:
            self._other_loop = asyncio.get_running_loop()  # with gevent, in which this is a greenlet
            self._started.set()
        except RuntimeError:
            asyncio.run(self._run())
        finally:
            self._has_loop.set()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._has_loop.set()
        self._stop = asyncio.Event()
        try:
            if self._is_stopping.is_set():  # before there was a loop to tell
                return
            main = asyncio.create_task(self._live())
            ready = asyncio.ensure_future(self._wait_ready())
            ready.add_done_callback(lambda _: self._started.set())
            await self._stop.wait()
            ready.cancel()
            main.cancel()
            await asyncio.wait([main, ready])
        finally:
            self._started.set()
