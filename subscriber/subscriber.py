"""The subscriber: keeps the caches of one replica coherent. How to choose its settings: docs/subscriber.md."""

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Final, NoReturn, Self

from ..shared.clock import Clock, monotonic
from ..shared.errors import InvalidSettings
from ..shared.invalidation import Everything, Position, Target, check_namespace, invalidation_of
from ..shared.process.closing import Closing
from ..shared.receipt import Receipt
from ..shared.telemetry.tracing import publishing
from ..shared.transport.redis.address import AddressRemap, Credentials, RedisAddress
from .cache.local_cache import LocalCache
from .cache.owners import Owners
from .cache.sweeper import Sweeper
from .following.applied import Applied, Posted
from .following.follower import Follower
from .following.lag import Lag
from .following.sequencer import Sequencer
from .following.settings import Timing, checked_replica_id, checked_seconds
from .following.state import STATES_WORST_FIRST, Events, State, SubscriberStats
from .following.thread import SubscriberThread

__all__ = ["Subscriber"]

_log = logging.getLogger("broadcache.subscriber")

_COUNTERS: Final = ("gaps", "echoes", "subscriptions", "lost")
_owners: Final = Owners()


class Subscriber(Closing):
    """Keeps the caches of one replica coherent. An asynchronous context manager; `with` runs it in a thread of its own.

    Entering returns as soon as the caches are coherent, and after `start_timeout_seconds` at the latest: a service
    starts even if Redis is not reachable, and the caches are bypassed until it is.

    Shape:  `caches` maps each namespace to its cache, or to several: `{"products": cache, "users": [names, rights]}`.
            `replica_id` identifies this process to others. `on_state` is called with each new `state`, in the
            subscriber's event loop; it must not block.
            `credentials` returns (user, password) and is called for each connection, for passwords that change.
            `address_remap` maps the addresses that sentinels and clusters announce: docs/redis.md.
    Units:  about every `echo_interval_seconds` an echo proves that the link delivers; it has to arrive within
            `echo_timeout_seconds`. Reconnecting waits a random time of at most `backoff_seconds_max`.
    Raises: InvalidSettings, InvalidNamespace when built; nothing afterwards: `state`, `stats()` and the log
            `broadcache.subscriber` show what happens.
    """

    def __init__(
        self,
        url: str,
        *,
        caches: Mapping[str, LocalCache | Sequence[LocalCache]],
        replica_id: str | None = None,
        echo_interval_seconds: float = 1.0,
        echo_timeout_seconds: float = 2.0,
        connect_timeout_seconds: float = 2.0,
        start_timeout_seconds: float = 5.0,
        backoff_seconds_max: float = 5.0,
        on_state: Callable[[State], None] | None = None,
        clock: Clock = monotonic,
        uniform: Callable[[], float] = random.random,
        credentials: Credentials = None,
        address_remap: AddressRemap | None = None,
    ) -> None:
        self.replica_id: Final = checked_replica_id(replica_id)
        self._address = RedisAddress(url, credentials=credentials, address_remap=address_remap)
        self._start_timeout_seconds = checked_seconds(start_timeout_seconds, "start_timeout_seconds", may_be_zero=True)
        self._timing = Timing.checked(
            echo_interval_seconds=echo_interval_seconds,
            echo_timeout_seconds=echo_timeout_seconds,
            connect_timeout_seconds=connect_timeout_seconds,
            backoff_seconds_max=backoff_seconds_max,
        )
        self._clock = clock
        self._uniform = uniform
        self._on_state = on_state
        self._reported_state: State = "closed"
        self._sequencers: dict[str, Sequencer] = {}
        # One for all namespaces. In a cluster one for each: each namespace may be on another server.
        self._followers: dict[str, Follower] = {}
        # The counters of sequencers and followers that are gone.
        self._past: Counter[str] = Counter()
        self._posted = Posted(self.replica_id, lambda: self.state)
        self._has_lag = False
        self._events = Events(clock, is_cluster=self._address.is_cluster)
        for namespace, of_namespace in caches.items():
            for cache in of_namespace if isinstance(of_namespace, Sequence) else [of_namespace]:
                self._add(namespace, cache)
        if not self._sequencers or self._sequencers.keys() != caches.keys():
            raise InvalidSettings(
                "expected at least one namespace in caches, and at least one cache of each, e.g. {'products': cache}, "
                f"got {caches}"
            )
        self._sweeper = Sweeper(lambda: self.caches)
        self._main: asyncio.Task[None] | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._following: dict[str, asyncio.Task[NoReturn]] = {}
        self._thread: SubscriberThread | None = None

    # --- observing ----------------------------------------------------------------------------------------------------

    @property
    def caches(self) -> tuple[LocalCache, ...]:
        """The followed caches."""
        return tuple(cache for sequencer in self._sequencers.copy().values() for cache in sequencer.caches)

    @property
    def caches_by_namespace(self) -> dict[str, LocalCache]:
        """The followed caches by namespace; if a namespace has several, the first."""
        return {namespace: sequencer.caches[0] for namespace, sequencer in self._sequencers.copy().items()}

    @property
    def sequencers(self) -> Mapping[str, Sequencer]:
        """Position, counters, lag and caches of each namespace, as they are now. Read only."""
        return self._sequencers.copy()

    def measure_lag(self) -> None:
        """From now on, measure how late each invalidation is applied: for metrics.

        It costs a third of a microsecond per invalidation, so it is off by default.
        """
        self._has_lag = True
        for sequencer in self._sequencers.copy().values():
            sequencer.lag = sequencer.lag or Lag()

    @property
    def state(self) -> State:
        """The state of the subscriber. It is `coherent` only while every cache may be served."""
        states = {follower.state for follower in self._followers.copy().values()}
        for state in STATES_WORST_FIRST[:-1]:
            if state in states:
                return state
        if not self._followers:
            return "closed"
        if not all(cache.is_coherent for cache in self.caches):
            return "lost"  # the event loop is stalled, or the proof is late: the leases of the caches have ended
        return "coherent"

    def position(self, namespace: str) -> Position | None:
        """The position of the last invalidation of `namespace` that was applied here; None before the first.

        Raises: InvalidSettings when this subscriber does not follow `namespace`.
        """
        return self._sequencer(namespace).position

    def stats(self) -> SubscriberStats:
        """Return the counters."""
        # Copies: another thread may be counting.
        received = Counter(self._past)
        for counts in (self._posted.counts, *(each.counts for each in self._sequencers.copy().values())):
            received.update(counts.copy())
        for follower in self._followers.copy().values():
            received.update(_counts_of(follower))
        gaps, echoes, subscriptions, lost = (received.pop(name, 0) for name in _COUNTERS)
        return SubscriberStats(dict(received), gaps, echoes, subscriptions, lost)

    async def wait_coherent(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the caches are coherent, at most `timeout_seconds`; return whether they are."""
        return await _in_time(timeout_seconds, self._all_coherent())

    # --- namespaces ---------------------------------------------------------------------------------------------------

    async def attach(self, namespace: str, cache: LocalCache) -> bool:
        """Follow one more cache, of a new namespace or of one that is followed already. The cache is cleared.

        Returns as soon as it is coherent, and after `start_timeout_seconds` at the latest; whether it is. Before the
        start, the cache is only added to those to follow. To be called on the subscriber's event loop.

        Raises: InvalidSettings, InvalidNamespace.
        """
        self._check_loop()
        if self._tasks is not None:
            _owners.claim(self._checked_cache(namespace, cache), self)
        follower = self._add(namespace, cache)
        cache.apply(Everything(), reason="subscribed")
        self._sweeper.has_work.set()
        if self._tasks is None:
            return False
        self._run(follower, self._tasks)
        return await _in_time(self._start_timeout_seconds, follower.wait_coherent())

    async def detach(self, namespace: str) -> None:
        """Stop following `namespace`; its caches are bypassed from now on.

        To be called on the subscriber's event loop.

        Raises: InvalidSettings when this subscriber does not follow `namespace`.
        """
        self._check_loop()
        sequencer = self._sequencer(namespace)
        # First of all: a replica that is not registered must not serve.
        for cache in sequencer.caches:
            cache.disconnect()
            _owners.release(cache, self)
        key = self._link_key(namespace)
        follower = self._followers[key]
        follower.remove(namespace)
        del self._sequencers[namespace]
        self._past.update(sequencer.counts)
        if not follower.namespaces:
            del self._followers[key]
            self._past.update(_counts_of(follower))
            if (following := self._following.pop(key, None)) is not None:
                following.cancel()
                await asyncio.wait([following])

    def _add(self, namespace: str, cache: LocalCache) -> Follower:
        cache = self._checked_cache(namespace, cache)
        sequencer = self._sequencers.get(namespace)
        if sequencer is None:
            sequencer = self._sequencers[namespace] = Sequencer(namespace, [cache])
            sequencer.lag = Lag() if self._has_lag else None
            sequencer.on_clear = self._events.record_clear
        else:
            sequencer.caches = (*sequencer.caches, cache)
        key = self._link_key(namespace)
        follower = self._followers.get(key)
        if follower is None:
            follower = self._followers[key] = Follower(
                self._address.of(namespace),
                replica_id=self.replica_id,
                timing=self._timing,
                clock=self._clock,
                uniform=self._uniform,
                on_change=self._on_change,
                events=self._events,
            )
        follower.add(sequencer)
        return follower

    def _check_loop(self) -> None:
        if self._loop not in (None, asyncio.get_running_loop()):
            raise InvalidSettings("expected a call on the subscriber's event loop, got one on another event loop")

    def _link_key(self, namespace: str) -> str:
        """Return the key of the link that `namespace` uses: one for all, but in a cluster one for each."""
        return namespace if self._address.is_cluster else ""

    # --- running ------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._begin()
        self._main = asyncio.create_task(self._live(), name=f"broadcache subscriber {self.replica_id}")
        try:
            if not await self.wait_coherent(self._start_timeout_seconds):
                _log.warning(
                    "not coherent %g s after the start: the caches are bypassed until %s answers",
                    self._start_timeout_seconds,
                    self._address.label,
                )
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        """Stop, and bypass the caches. Closing twice, or before starting, is harmless."""
        if (main := self._main) is not None:
            main.cancel()
            # The subscriber is running until this task has ended, also if this call is cancelled meanwhile.
            await asyncio.wait([main])
            if self._main is main:
                self._main = None
                self._release_caches()

    def __enter__(self) -> Self:
        self._begin()
        self._thread = SubscriberThread(self._live, lambda: self.wait_coherent(self._start_timeout_seconds))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop()
            self._release_caches()

    def _release_caches(self) -> None:
        for cache in self.caches:
            _owners.release(cache, self)

    def _begin(self) -> None:
        if (self._main is not None and not self._main.done()) or self._thread is not None:
            raise InvalidSettings(
                "expected a subscriber that is not running, got one that is: it was entered twice, or its close was "
                "cancelled and has not ended yet; close it first, and wait until it has ended"
            )
        try:
            for cache in self.caches:
                _owners.claim(cache, self)
        except InvalidSettings:
            self._release_caches()
            raise
        self._sweeper.prepare()
        for follower in self._followers.values():
            follower.prepare()

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for follower in self._followers.values():
                    self._run(follower, tasks)
                tasks.create_task(self._sweeper.sweep_for_ever(), name="broadcache sweep")
        finally:
            self._tasks = self._loop = None
            self._following.clear()
            for follower in self._followers.values():
                follower.leave("closed")

    def _run(self, follower: Follower, tasks: asyncio.TaskGroup) -> None:
        """Start `follower`, if it is not running."""
        key = self._link_key(follower.namespaces[0])
        if key not in self._following:
            self._following[key] = tasks.create_task(follower.follow_for_ever(), name="broadcache follow")

    def _on_change(self) -> None:
        self._sweeper.has_work.set()
        state = self.state
        if state != self._reported_state:
            self._reported_state = state
            if self._on_state is not None:
                try:
                    self._on_state(state)
                except Exception:  # noqa: BLE001  (the user's code must not end the subscription)
                    _log.exception("on_state(%r) failed: expected a function that does not raise", state)

    async def _all_coherent(self) -> None:
        while waiting := [each for each in self._followers.values() if each.state != "coherent"]:
            await waiting[0].wait_coherent()

    # --- invalidations that do not arrive over the channel ------------------------------------------------------------

    def apply(self, body: bytes) -> Applied:
        """Apply the invalidation in the body of an HTTP request: a path to a replica that needs no Redis.

        An invalidation that also arrives over Redis is applied again, which costs a load at most. A posted one does not
        move the position, proves nothing, and lets no cache serve longer. May be called from any thread, also while the
        subscriber is not running.

        Shape:  one frame of the wire form; its `epoch` and `seq` are ignored. It concerns its namespace or, if it names
                none, all followed namespaces. An empty or malformed body drops everything of all of them.
        Raises: nothing, whatever the bytes.
        """
        applied = self._posted.apply(body, self._sequencers.copy())
        if (loop := self._loop) is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed just now
                loop.call_soon_threadsafe(self._sweeper.has_work.set)
        return applied

    async def invalidate(
        self, *targets: Target, namespace: str, reason: str = "", timeout_seconds: float = 5.0
    ) -> Receipt:
        """Drop `targets` here at once, then publish them over the subscriber's own link for all other replicas.

        The message is applied again when it arrives here, before this returns.

        Raises: LinkLost when it could not be published within `timeout_seconds`, or may not have been; this replica has
                dropped its entries even so. LogRefused, InvalidTarget, InvalidSettings.
        """
        sequencer = self._sequencer(namespace)
        invalidation = invalidation_of(targets, namespace=namespace, reason=reason, source=self.replica_id)
        sequencer.apply_own(invalidation)
        self._sweeper.has_work.set()
        with publishing(invalidation) as traced:
            follower = self._followers[self._link_key(namespace)]
            return await follower.publish(traced, timeout_seconds=timeout_seconds)

    def _sequencer(self, namespace: str) -> Sequencer:
        try:
            return self._sequencers[namespace]
        except KeyError:
            raise InvalidSettings(
                f"expected one of the namespaces {', '.join(self._sequencers)}, got {namespace!r}"
            ) from None

    def _checked_cache(self, namespace: str, cache: LocalCache) -> LocalCache:
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


async def _in_time(timeout_seconds: float | None, waiting: Awaitable[None]) -> bool:
    """Wait at most `timeout_seconds`; return whether `waiting` ended in time."""
    try:
        async with asyncio.timeout(timeout_seconds):
            await waiting
    except TimeoutError:
        return False
    return True


def _counts_of(follower: Follower) -> dict[str, int]:
    return {"echoes": follower.echoes, "subscriptions": follower.subscriptions, "lost": follower.lost}
