"""The roster: the namespaces and caches that a subscriber follows, and who follows each."""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final
from weakref import ref

from ..shared.clock import Clock
from ..shared.errors import InvalidSettings
from ..shared.invalidation import Invalidation, check_namespace
from ..shared.process.forks import keep_inherited
from ..shared.receipt import Receipt
from ..shared.transport.redis.address import RedisAddress
from .cache.local_cache import LocalCache
from .following.follower import Follower
from .following.sequencer import Sequencer
from .following.settings import Timing
from .following.state import Events, Lag

__all__ = ["Roster"]

_log = logging.getLogger("broadcache.subscriber")

_NOT_STARTED: Final = (
    "the cache of namespace %s is bypassed, every read goes to the source (with when_incoherent='serve' it serves what "
    "no publisher can invalidate over Redis): its subscriber was never started; expected it to be entered (`async "
    "with`, `with`), or a lifespan that runs: that of a mounted application does not"
)


class Roster:
    """The sequencer of each namespace, and the follower of each link.

    Shape:  `sequencers` are by namespace. `followers` are by `link_key`: one for all namespaces, but in a cluster one
            for each, since each may be on another server. `past` has the counters of those that are gone.
    """

    def __init__(
        self,
        address: RedisAddress,
        *,
        timing: Timing,
        clock: Clock,
        uniform: Callable[[], float],
        on_change: Callable[[], None],
        subscriber: object,
    ) -> None:
        self._subscriber = ref(subscriber)
        self.sequencers: dict[str, Sequencer] = {}
        self.followers: dict[str, Follower] = {}
        self.past: Counter[str] = Counter()
        self._address = address
        self._timing = timing
        self._clock = clock
        self._uniform = uniform
        self._on_change = on_change
        self._has_lag = False
        self._new_follower: Callable[..., Follower] = Follower
        self._events = self._new_events()

    @property
    def caches(self) -> tuple[LocalCache, ...]:
        """All caches. May be called from any thread."""
        return tuple(cache for sequencer in self.sequencers.copy().values() for cache in sequencer.caches)

    def measure_lag(self) -> None:
        """Measure the lag of every namespace from now on."""
        self._has_lag = True
        for sequencer in self.sequencers.copy().values():
            sequencer.lag = sequencer.lag or Lag()

    def sequencer(self, namespace: str) -> Sequencer:
        """Return the sequencer of a namespace. Raises: InvalidSettings when there is none."""
        try:
            return self.sequencers[namespace]
        except KeyError:
            raise InvalidSettings(
                f"expected one of the namespaces {', '.join(self.sequencers)}, got {namespace!r}"
            ) from None

    def counts(self) -> Counter[str]:
        """Return the counters, added up."""
        # Copies: another thread may be counting.
        counts = Counter(self.past)
        for sequencer in self.sequencers.copy().values():
            counts.update(sequencer.counts.copy())
        for follower in self.followers.copy().values():
            counts.update(_counts_of(follower))
        return counts

    def add(self, namespace: str, cache: LocalCache, replica_id: str) -> Follower:
        """Add one more cache; return the follower of its namespace. Raises: InvalidSettings, InvalidNamespace."""
        cache = self.checked(namespace, cache)
        sequencer = self.sequencers.get(namespace)
        if sequencer is None:
            sequencer = self.sequencers[namespace] = self._new_sequencer(namespace, (cache,))
        else:
            sequencer.caches = (*sequencer.caches, cache)
        cache.upkeep.on_bypass = partial(_log.warning, _NOT_STARTED, namespace)
        cache.upkeep.home = (self._subscriber, namespace)
        return self._follow(sequencer, replica_id)

    def remove(self, namespace: str) -> str | None:
        """Remove a namespace; return the key of its link if no other namespace uses it, and its follower is removed."""
        sequencer = self.sequencers.pop(namespace)
        for cache in sequencer.caches:
            cache.upkeep.home = None
        self.past.update(sequencer.counts)
        key = self.link_key(namespace)
        follower = self.followers[key]
        follower.remove(namespace)
        if follower.namespaces:
            return None
        del self.followers[key]
        self.past.update(_counts_of(follower))
        return key

    def checked(self, namespace: str, cache: LocalCache) -> LocalCache:
        """Return a cache that may be added. Raises: InvalidSettings, InvalidNamespace."""
        check_namespace(namespace)
        if not isinstance(cache, LocalCache):
            raise InvalidSettings(
                f"expected a LocalCache for namespace {namespace!r}, got {type(cache).__name__}; wrap it: LocalCache(…)"
            )
        if any(cache is each for each in self.caches):
            raise InvalidSettings(
                f"expected a cache that is not followed yet, got one that is, for {namespace!r}; use another LocalCache"
            )
        if cache.clock is not self._clock:
            raise InvalidSettings(
                "expected the subscriber and its caches to use one clock, got two; pass the same `clock` to both"
            )
        if cache.max_staleness_seconds <= self._timing.echo_interval_seconds:
            raise InvalidSettings(
                f"max_staleness_seconds must exceed echo_interval_seconds (got {cache.max_staleness_seconds:g} and "
                f"{self._timing.echo_interval_seconds:g}): reads would be bypassed between two proofs of coherence"
            )
        return cache

    async def wait_coherent(self) -> None:
        """Wait until every follower is coherent."""
        while waiting := [each for each in self.followers.values() if each.state != "coherent"]:
            await waiting[0].wait_coherent()

    def publish(self, invalidation: Invalidation, timeout_seconds: float) -> Callable[[], Awaitable[Receipt]]:
        """Return the work that publishes an invalidation over the link of its namespace."""
        follower = self.followers[self.link_key(invalidation.namespace)]
        return partial(follower.publish, invalidation, timeout_seconds=timeout_seconds)

    def link_key(self, namespace: str) -> str:
        """Return the key of the link that `namespace` uses: one for all, but in a cluster one for each."""
        return namespace if self._address.is_cluster else ""

    def follow_as(self, replica_id: str) -> None:
        """Have new followers, for a new event loop, which follow under this id."""
        self.followers = {key: follower.again(replica_id) for key, follower in self.followers.items()}
        for namespace, sequencer in self.sequencers.items():
            for cache in sequencer.caches:
                cache.upkeep.home = (self._subscriber, namespace)

    def start_over(self, replica_id: str) -> None:
        """Forget all positions and counters, in a forked child: its caches have dropped everything."""
        for follower in self.followers.values():
            follower.abandon()
        keep_inherited(self.followers)
        self.followers, self.past, self._events = {}, Counter(), self._new_events()
        inherited: Mapping[str, Sequencer] = self.sequencers
        self.sequencers = {
            namespace: self._new_sequencer(namespace, each.caches) for namespace, each in inherited.items()
        }
        for sequencer in self.sequencers.values():
            self._follow(sequencer, replica_id)

    def stage(self, new_follower: Callable[..., Follower], replica_id: str) -> Callable[[], None]:
        """Follow by followers of another kind, from no position and with no counts, until the result is called.

        For tests, while the subscriber does not run.
        """
        saved = self.sequencers, self.followers, self.past, self._events, self._new_follower

        def restore() -> None:
            followed = {id(cache) for sequencer in saved[0].values() for cache in sequencer.caches}
            for cache in self.caches:
                if id(cache) not in followed:  # added meanwhile
                    cache.upkeep.home = None
            self.sequencers, self.followers, self.past, self._events, self._new_follower = saved

        self.sequencers = {name: self._new_sequencer(name, each.caches) for name, each in self.sequencers.items()}
        self.followers, self.past, self._events, self._new_follower = {}, Counter(), self._new_events(), new_follower
        try:
            for sequencer in self.sequencers.values():
                self._follow(sequencer, replica_id)
        except BaseException:
            restore()
            raise
        return restore

    def _new_sequencer(self, namespace: str, caches: tuple[LocalCache, ...]) -> Sequencer:
        sequencer = Sequencer(namespace, caches)
        sequencer.lag = Lag() if self._has_lag else None
        sequencer.on_clear = self._events.record_clear
        return sequencer

    def _new_events(self) -> Events:
        return Events(self._clock, is_cluster=self._address.is_cluster)

    def _follow(self, sequencer: Sequencer, replica_id: str) -> Follower:
        key = self.link_key(sequencer.namespace)
        follower = self.followers.get(key)
        if follower is None:
            follower = self.followers[key] = self._new_follower(
                self._address.of(sequencer.namespace),
                replica_id=replica_id,
                timing=self._timing,
                clock=self._clock,
                uniform=self._uniform,
                on_change=self._on_change,
                events=self._events,
            )
        follower.add(sequencer)
        return follower


def _counts_of(follower: Follower) -> dict[str, int]:
    return {"echoes": follower.echoes, "subscriptions": follower.subscriptions, "lost": follower.lost}
