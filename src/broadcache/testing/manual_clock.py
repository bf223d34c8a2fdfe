"""The clock of a test: it stands still until it is told to tick, and so do the lifetimes of the entries."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from ..shared.clock import monotonic
from ..shared.errors import InvalidSettings
from ..subscriber.cache.checks import Seconds, seconds_of
from ..subscriber.cache.local_cache import LocalCache

__all__ = ["ManualClock", "timed_by"]


class ManualClock:
    """The clock of the caches in a `coherent` block: `clock.tick(301)` also expires what had a lifetime of 300 s.

    Shape:  calling it returns its time in seconds; `elapsed_seconds` is how far it was ticked. The caches stay coherent
            however far it ticks: a link that works renews its proof all the time.
    """

    def __init__(self) -> None:
        self._began = monotonic()
        self._caches: list[LocalCache] = []
        self.elapsed_seconds: float = 0.0

    def __call__(self) -> float:
        """Return its time in seconds."""
        return self._began + self.elapsed_seconds

    def tick(self, seconds: Seconds) -> None:
        """Let this much time pass. Raises: InvalidSettings when it is not a number from 0 on, or a timedelta."""
        passed = seconds_of(seconds, "seconds")
        if not 0 <= passed < math.inf:
            raise InvalidSettings(f"expected seconds to be a number from 0 on, got {seconds!r}: time never goes back")
        for cache in tuple(self._caches):  # first, so that no read in another thread finds a lease that has ended
            cache.confirm_coherent(self() + passed)
        self.elapsed_seconds += passed

    def adopt(self, cache: LocalCache) -> None:
        """Keep a cache, which already goes by this clock, coherent."""
        self._caches.append(cache)
        cache.confirm_coherent(self())

    def abandon(self, cache: LocalCache) -> None:
        """Keep a cache coherent no longer."""
        self._caches = [each for each in self._caches if each is not cache]

    def __repr__(self) -> str:
        return f"<ManualClock, {self.elapsed_seconds:g} s after its start>"


@contextmanager
def timed_by(clock: ManualClock, mapping: Any) -> Iterator[None]:
    """Let the lifetimes of a cachetools mapping go by `clock`. Other mappings are left as they are."""
    timer: Any = getattr(mapping, "timer", None)
    inner: Any = vars(timer).get("_Timer__timer") if hasattr(timer, "__dict__") else None
    replaced = None if inner is None else _follower_of(inner, clock)
    if replaced is None:
        yield
        return
    timer._Timer__timer = replaced
    try:
        yield
    finally:
        timer._Timer__timer = inner


def _follower_of(timer: Callable[[], Any], clock: ManualClock) -> Callable[[], Any] | None:
    """Return a timer in the units of `timer` that begins at its time, and follows `clock`; None for unknown units."""
    try:
        began, elapsed = timer(), clock.elapsed_seconds
    except Exception:  # noqa: BLE001  (the user's code: the cache reports it when it stores)
        return None
    if isinstance(began, datetime):
        return lambda: began + timedelta(seconds=clock.elapsed_seconds - elapsed)
    if isinstance(began, int | float):
        return lambda: began + (clock.elapsed_seconds - elapsed)
    return None
