"""Which subscriber runs with which cache."""

import threading
from typing import Final
from weakref import WeakKeyDictionary, ref

from ...shared.errors import InvalidSettings
from ...shared.process.forks import in_forked_child
from .local_cache import LocalCache

__all__ = ["Owners", "owners"]


_RUNS_ELSEWHERE: Final = (
    "expected a cache that no other subscriber keeps coherent, got one that another running subscriber does; give each "
    "subscriber caches of its own, or close the other one first"
)


class Owners:
    """The subscriber that runs with each cache in this process.

    A cache of two would be served while either of them is coherent. An owner that is no subscriber says in `owns_alone`
    what another one is told.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: WeakKeyDictionary[LocalCache, ref[object]] = WeakKeyDictionary()
        self._homes: WeakKeyDictionary[LocalCache, ref[object]] = WeakKeyDictionary()
        in_forked_child(self._start_over)

    def _start_over(self) -> None:
        """Forget the owners: in a forked child, the subscribers of its parent do not run."""
        self._lock = threading.Lock()
        self._owners = WeakKeyDictionary()

    def claim(self, subscriber: object, *caches: LocalCache) -> None:
        """Make `subscriber` the owner of all these caches.

        Raises: InvalidSettings when another one owns one of them, and has not been closed; then nothing has changed.
        """
        with self._lock:
            for cache in caches:
                owner = self._owners.get(cache)
                if owner is not None and (other := owner()) not in (None, subscriber):
                    raise InvalidSettings(getattr(other, "owns_alone", _RUNS_ELSEWHERE))
            for cache in caches:
                self._owners[cache] = ref(subscriber)

    def release(self, cache: LocalCache, subscriber: object) -> bool:
        """Remove the owner of `cache`, if it is `subscriber`; return whether it was."""
        with self._lock:
            owner = self._owners.get(cache)
            is_owner = owner is not None and owner() is subscriber
            if is_owner:
                del self._owners[cache]
            return is_owner

    def record_home(self, cache: LocalCache, subscriber: object) -> None:
        """Record that `subscriber` has `cache`, whether it runs or not."""
        self._homes[cache] = ref(subscriber)

    def home_of(self, cache: LocalCache) -> object | None:
        """Return the subscriber that was given `cache` last; None if there is none any more."""
        home = self._homes.get(cache)
        return None if home is None else home()

    def has_owner(self, cache: LocalCache) -> bool:
        """Whether `cache` has an owner."""
        with self._lock:
            owner = self._owners.get(cache)
            return owner is not None and owner() is not None


owners: Final = Owners()
