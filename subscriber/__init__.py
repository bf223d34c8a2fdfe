"""Hears of invalidations: the subscriber, the local cache, and the mixin that puts both into a class."""

from .cache.local_cache import CacheStats, LoadToken, LocalCache, WhenIncoherent
from .following.applied import Applied, Outcome
from .mixin import CacheInvalidationMixin
from .subscriber import State, Subscriber, SubscriberStats

__all__ = [
    "Applied",
    "CacheInvalidationMixin",
    "CacheStats",
    "LoadToken",
    "LocalCache",
    "Outcome",
    "State",
    "Subscriber",
    "SubscriberStats",
    "WhenIncoherent",
]
