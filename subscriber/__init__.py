"""The replica's side: the subscriber, the local cache, and a mixin that puts both into a class."""

from typing import TYPE_CHECKING, TypeAlias

from ..shared.process.renamed import old_names
from .cache.decorating.functions import CachedCoroutine, CachedFunction, CacheInfo
from .cache.followed_cache import WhenIncoherent
from .cache.loading.loaded import Loaded
from .cache.local_cache import LocalCache
from .cache.stats import CacheStats
from .cache.token import LoadToken
from .decorator import cached
from .endpoint.posted import InvalidationEndpoint, PostedResponse
from .following.applied import Applied, ApplyOutcome
from .following.state import State, SubscriberStats
from .mixin import CacheInvalidationMixin
from .subscriber import Subscriber

__all__ = [
    "Applied",
    "ApplyOutcome",
    "CacheInfo",
    "CacheInvalidationMixin",
    "CacheStats",
    "CachedCoroutine",
    "CachedFunction",
    "InvalidationEndpoint",
    "LoadToken",
    "Loaded",
    "LocalCache",
    "PostedResponse",
    "State",
    "Subscriber",
    "SubscriberStats",
    "WhenIncoherent",
    "cached",
]

if TYPE_CHECKING:
    Outcome: TypeAlias = ApplyOutcome
else:
    __getattr__ = old_names(__name__, {"Outcome": "ApplyOutcome"}, globals())
