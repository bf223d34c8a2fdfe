"""An event loop without I/O, on a clock that stands still: the schedule decides when it runs, and how far."""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any, TypeVarTuple

from tests.support.fake_clock import FakeClock

Ts = TypeVarTuple("Ts")

_TURNS_MAX = 10_000


class ScheduledLoop(asyncio.BaseEventLoop):
    """Runs what is ready when it is told to, one callback or all of them."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.errors: list[str] = []
        self._clock = clock
        self._callbacks: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timer_count = 0

    def time(self) -> float:
        return self._clock.now

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._callbacks.append(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._timer_count += 1
        heapq.heappush(self._timers, (when, self._timer_count, handle))
        return handle

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    def next_timer(self) -> float | None:
        """When the earliest timer that still matters is due."""
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def turn(self, callbacks_max: int = _TURNS_MAX) -> None:
        """Run what is ready and due, and what becomes ready by that."""
        while (due := self.next_timer()) is not None and due <= self._clock.now:
            self._callbacks.append(heapq.heappop(self._timers)[2])
        asyncio._set_running_loop(self)
        try:
            for _ in range(callbacks_max):
                if not self._callbacks:
                    return
                handle = self._callbacks.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            asyncio._set_running_loop(None)
        assert callbacks_max < _TURNS_MAX, "expected the event loop to come to rest, got an endless loop"
