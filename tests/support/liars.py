"""Caches that break their promise, for an audit to find."""

from broadcache.shared import Invalidation
from broadcache.subscriber import LocalCache


class DeafCache(LocalCache):
    """It hears of invalidations and does nothing."""

    def apply_invalidation(self, invalidation: Invalidation, *, reason: str = "invalidation") -> None:
        if reason != "invalidation":
            super().apply_invalidation(invalidation, reason=reason)


class RevivingCache(LocalCache):
    """It forgets, and then writes the old value back."""

    def apply_invalidation(self, invalidation: Invalidation, *, reason: str = "invalidation") -> None:
        before = {key: self.get(key) for key in invalidation.keys if key in self}
        super().apply_invalidation(invalidation, reason=reason)
        for key, value in before.items():
            self.store(self.begin_load(key), value)
