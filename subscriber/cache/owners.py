"""Which subscriber runs with which cache."""

import threading
from weakref import WeakKeyDictionary, ref

from ...shared.errors import InvalidSettings
from .local_cache import LocalCache

__all__ = ["Owners"]


class Owners:
    """The running subscriber of each cache. A cache of two would be served while either of them is coherent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: WeakKeyDictionary[LocalCache, ref[object]] = WeakKeyDictionary()

    def claim(self, cache: LocalCache, subscriber: object) -> None:
        """Make `subscriber` the owner. Raises: InvalidSettings when another one is, and has not been closed."""
        with self._lock:
            owner = self._owners.get(cache)
            if owner is not None and owner() not in (None, subscriber):
                raise InvalidSettings(
                    "expected a cache that no other subscriber keeps coherent, got one that another running subscriber "
                    "does; give each subscriber caches of its own, or close the other one first"
                )
            self._owners[cache] = ref(subscriber)

    def release(self, cache: LocalCache, subscriber: object) -> None:
        """Remove the owner of `cache`, if it is `subscriber`."""
        with self._lock:
            owner = self._owners.get(cache)
            if owner is not None and owner() is subscriber:
                del self._owners[cache]
