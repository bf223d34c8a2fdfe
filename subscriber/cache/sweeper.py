"""The sweeper: frees the memory of dead entries in the background."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import NoReturn

from .local_cache import LocalCache

__all__ = ["Sweeper"]

_log = logging.getLogger("broadcache.subscriber")


class Sweeper:
    """Sweeps caches in slices on the subscriber's event loop, and lets other tasks run in between.

    Shape:  `caches` returns the caches to sweep. `has_work` is set when some may have dead entries.
    """

    def __init__(self, caches: Callable[[], Iterable[LocalCache]]) -> None:
        self.has_work: asyncio.Event = asyncio.Event()
        self._caches = caches

    def wake(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Set `has_work`, from any thread. `loop` is the event loop of the sweep; None when there is none."""
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it was closed just now
                loop.call_soon_threadsafe(self.has_work.set)

    async def sweep_for_ever(self) -> NoReturn:
        """Sweep whenever there is work. Ends only by being cancelled."""
        failing: set[LocalCache] = set()
        while True:
            await self.has_work.wait()
            self.has_work.clear()
            for cache in self._caches():
                try:
                    while cache.has_sweep_work:
                        cache.sweep()
                        await asyncio.sleep(0)
                except Exception as error:  # noqa: BLE001  (the user's code must not end the subscription)
                    if cache not in failing:
                        failing.add(cache)
                        _log.error(
                            "the sweep of a cache (%s) raised %s: expected a sweep that does not raise. Its dead "
                            "entries take up memory until a later sweep; fix the methods that this class overrides",
                            type(cache).__qualname__,
                            type(error).__qualname__,
                        )
