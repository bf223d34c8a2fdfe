"""The thread of a subscriber: for a service that has no event loop of its own."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

__all__ = ["SubscriberThread"]


class SubscriberThread:
    """A daemon thread with an event loop in which a subscriber runs.

    It starts when it is made. Making it returns when the subscriber is ready, or has given up waiting for that.

    Shape:  `live` runs the subscriber until it is cancelled; `wait_ready` returns when the subscriber is ready, or its
            time is up.
    """

    def __init__(
        self, live: Callable[[], Coroutine[Any, Any, None]], wait_ready: Callable[[], Awaitable[bool]]
    ) -> None:
        self._live = live
        self._wait_ready = wait_ready
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(
            target=asyncio.run, args=[self._run()], name="broadcache subscriber", daemon=True
        )
        self._thread.start()
        self._started.wait()

    def stop(self) -> None:
        """Stop the subscriber, and return when the thread has ended."""
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            main = asyncio.create_task(self._live())
            await self._wait_ready()
            self._started.set()
            await self._stop.wait()
            main.cancel()
            await asyncio.wait([main])
        finally:
            self._started.set()
