"""How a hit reads the wrapped mapping: straight from the dictionary inside it, where that shows the same."""

import math
import time
from collections.abc import Callable, MutableMapping
from typing import Any, Final

from cachetools import Cache, FIFOCache, LFUCache, LRUCache, RRCache, TLRUCache, TTLCache

from ....shared.clock import Clock, monotonic
from ..checks import exact

__all__ = ["TOUCHES_MAX", "Reads"]

TOUCHES_MAX: Final = 512
"""How many hits are noted before the mapping's order has to follow."""
# A lookup in these mappings changes nothing that another thread could find half-done, so hits need no lock. Exact types
# only: a subclass may do anything in __getitem__ or __missing__.
_LOCK_FREE_LOOKUPS: Final = frozenset({dict, Cache, FIFOCache, LRUCache, RRCache, TLRUCache, TTLCache})
# What looks an entry up in these without the dictionary inside would only check its expiry, and note its use.
_DICTIONARY: Final = "_Cache__data"
_ON_TOUCH: Final[dict[type, tuple[str, ...]]] = {
    Cache: (),
    FIFOCache: (),
    RRCache: (),
    LFUCache: ("_LFUCache__touch",),
    LRUCache: ("_LRUCache__order", "move_to_end"),
    TTLCache: ("_TTLCache__links", "move_to_end"),
}
# In a mapping with more entries than this, moving one costs more than finding out that it need not be moved.
_EXACT_ORDER_ENTRIES_MAX: Final = 10_000
_NEWEST_SHARE: Final = 8


class Reads:
    """Where hits look a key up, until when they may, and which keys they have found: the touches.

    A hit that looks into the dictionary inside a cachetools mapping skips the mapping's own lookup, which checks the
    entry's expiry and makes it the newest. So no hit may look there once the oldest entry has expired; and what hits
    have found is noted, and moved before the mapping evicts the next time. A bare lookup would have left the same order
    behind: exactly that in a mapping of up to `_EXACT_ORDER_ENTRIES_MAX` entries. In a larger one, an entry that is
    among the newest eighth anyway is not moved.

    A mapping of another type, or whose parts are not where cachetools 8 has them, or that has a timer of its own, is
    looked up as any mapping, by hits too: it keeps its order and its expiry itself.

    Not thread-safe, except `touches`: its cache holds the lock around every call.

    Shape:  `source` is where hits look up, and `touches` the keys they have found since the last `settle`, in order:
            at most `TOUCHES_MAX` and one of each thread. `hits` is how many keys have been in `touches` before that.
            `expiring` is whether the mapping removes its expired entries in slices.
    """

    def __init__(self, mapping: MutableMapping[str, Any], clock: Clock, *, expires_in_slices: bool) -> None:
        self.source: Any = mapping
        self.is_lock_free: bool = type(mapping) in _LOCK_FREE_LOOKUPS
        self.touches: list[str] = []
        self.hits: int = 0
        self._mapping: Any = mapping
        self._clock = clock
        self._root: Any = None
        self._clock_is_ahead_by = 0.0
        self._touch: Callable[[str], object] | None = None
        self._is_order_of_use = False
        self._newest: set[str] = set()
        self._is_settling = False
        try:
            self._look_inside(expires_in_slices=expires_in_slices)
        except AttributeError:  # another version of cachetools
            self.source, self._touch, self._root = mapping, None, None

    def _look_inside(self, *, expires_in_slices: bool) -> None:
        mapping: Any = self._mapping
        kind = type(mapping)
        if kind not in _ON_TOUCH or getattr(mapping.__missing__, "__func__", None) is not Cache.__missing__:
            return
        if kind is TTLCache:
            if not expires_in_slices or not self._is_timer_comparable(mapping.timer._Timer__timer):
                return
            self._root = mapping._TTLCache__root
        touch: Any = mapping
        for name in _ON_TOUCH[kind]:
            touch = getattr(touch, name)
        self._touch = None if touch is mapping else touch
        self._is_order_of_use = kind is not LFUCache
        self.source = getattr(mapping, _DICTIONARY)
        self.is_lock_free = True
        self.compare_clocks()

    def _is_timer_comparable(self, timer: object) -> bool:
        return timer is self._clock or (timer is time.monotonic and self._clock is monotonic)

    def compare_clocks(self) -> None:
        """Measure by how much this cache's clock is ahead of the mapping's timer. It only ever gets further ahead.

        CLOCK_BOOTTIME, unlike the timer, runs on while the machine is suspended. An old measurement, or a pause within
        this one, makes expiries seem early, which costs a look at the mapping; never late.
        """
        if self._root is not None and self._clock is not self._mapping.timer._Timer__timer:
            now = self._clock()
            self._clock_is_ahead_by = now - time.monotonic()

    @property
    def oldest_expiry(self) -> float:
        """When, on this cache's clock, the first entry of `source` expires without `source` showing it."""
        if self._root is None:
            return math.inf
        oldest = self._root.next
        return math.inf if oldest is self._root else oldest.expires + self._clock_is_ahead_by

    def look_up(self, key: str) -> Any:
        """Return the value under `key` if it has not expired. Raises: KeyError, and any error of the mapping.

        With the lock, and perhaps while the mapping is being changed: a signal handler or a finalizer may read at any
        time. So it changes nothing, if that can be.
        """
        if self.source is self._mapping:
            return self._mapping[key]
        try:
            is_there = key in self._mapping
        except TypeError:  # a TTLCache is storing it, and has not set its expiry yet
            is_there = False
        if not is_there:
            raise KeyError(key)
        return self.source[key]

    @property
    def is_misled(self) -> bool:
        """Whether `source` is no longer the dictionary inside the mapping."""
        return self.source is not self._mapping and self.source is not getattr(self._mapping, _DICTIONARY, None)

    def look_outside(self) -> None:
        """Have hits look keys up in the mapping itself, from now on."""
        self.source, self._touch, self._root = self._mapping, None, None
        self.is_lock_free = type(self._mapping) in _LOCK_FREE_LOOKUPS

    def settle(self) -> None:
        """Make the mapping's order, or its counts, what the touches say. Keys that are gone are skipped."""
        if self._is_settling:  # a finalizer, or a signal handler, reads or stores meanwhile
            return
        self._is_settling = True
        try:
            touched = self.touches[:]
            del self.touches[: len(touched)]  # other threads may append meanwhile
            self.hits += len(touched)
            if self._touch is not None:
                is_large = self._is_order_of_use and len(self.source) > _EXACT_ORDER_ENTRIES_MAX
                self._touch_each(self._but_the_newest(touched) if is_large else touched, self._touch)
        finally:
            self._is_settling = False

    def _touch_each(self, keys: list[str], touch: Callable[[str], object]) -> None:
        for key in keys:
            if type(key) is not str:
                if not issubclass(type(key), str):
                    continue
                key = exact(key)  # noqa: PLW2901  (no user's code is to run while the mapping is changed)
            try:
                touch(key)
            except KeyError:  # not `with suppress`, which takes as long as the touch itself
                continue

    def _but_the_newest(self, keys: list[str]) -> list[str]:
        """Return the keys that have not been moved or stored lately. They are about to be moved."""
        newest = self._newest
        if len(newest) > len(self.source) // _NEWEST_SHARE:
            newest.clear()
        older: list[str] = []
        for key in keys:
            if type(key) is not str:
                older.append(key)
            elif key not in newest:
                newest.add(key)
                older.append(key)
        return older

    def note_store(self, key: str) -> None:
        """Note that the mapping has stored an entry: it is the newest now."""
        if self._newest:
            self._newest.add(key)

    def forget_a_touch(self) -> None:
        """Make room in the touches, without the lock. It was a hit all the same."""
        try:
            self.touches.pop()
        except IndexError:  # another thread has settled them meanwhile
            return
        self.hits += 1
