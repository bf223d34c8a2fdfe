"""Hears of invalidations: the subscriber, the local cache, and the mixin that puts both into a class."""

from .local_cache import CacheStats, LoadToken, LocalCache, WhenIncoherent
from .mixin import CacheInvalidationMixin
from .subscriber import State, Subscriber, SubscriberStats

__all__ = [
    "CacheInvalidationMixin",
    "CacheStats",
    "LoadToken",
    "LocalCache",
    "State",
    "Subscriber",
    "SubscriberStats",
    "WhenIncoherent",
]
