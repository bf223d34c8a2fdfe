"""What can be seen of a cache without a read."""

import threading
from typing import Any

from ...shared.clock import Clock
from ...shared.fingerprint import NO_FINGERPRINT, fingerprint_of
from .checks import exact
from .entries import MISSING, Entries

__all__ = ["Inspection"]


class Inspection:
    """The part of a cache that shows its entries and sizes, and counts nothing."""

    _clock: Clock
    _lock: threading.RLock
    _entries: Entries

    def _expire(self, now: float) -> None:
        raise NotImplementedError

    def _may_serve(self, now: float) -> bool:
        raise NotImplementedError

    def __contains__(self, key: object) -> bool:
        with self._lock:
            now = self._clock()
            self._expire(now)
            return isinstance(key, str) and self._may_serve(now) and self._entries.has_served(exact(key), now)

    def fingerprint(self, key: str) -> str | None:
        """Return the fingerprint of the value that a read of `key` would return now; None when it would find nothing.

        This is not a read: it counts nothing, and does not make the entry the newest. Returns `NO_FINGERPRINT` for a
        value that has none, and for a mapping that cannot be inspected without a read.
        """
        with self._lock:
            if key not in self:
                return None
            value = self._entries.peek(key)
        if value is MISSING:
            return NO_FINGERPRINT
        try:
            return fingerprint_of(value)
        except Exception:  # noqa: BLE001  (the value's own code)
            return NO_FINGERPRINT

    def wraps(self, mapping: object) -> bool:
        """Whether this cache keeps its entries in `mapping`."""
        return self._entries.mapping is mapping

    @property
    def maxsize(self) -> float | None:
        """How many entries the mapping holds at most, or the most that their sizes add up to; None: it has no limit."""
        return getattr(self._entries.mapping, "maxsize", None)

    @property
    def currsize(self) -> float:
        """What counts towards `maxsize` now, dead entries not yet swept included. Raises: any error of the mapping."""
        with self._lock:
            size = getattr(self._entries.mapping, "currsize", None)
            return len(self._entries.mapping) if size is None else size

    @property
    def ttl(self) -> Any:
        """The lifetime of the mapping's entries as the mapping has it, e.g. in seconds; None: it has none."""
        return getattr(self._entries.mapping, "ttl", None)
