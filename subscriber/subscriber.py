"""The subscriber: one replica's caches, and what keeps them coherent. How to choose its numbers: docs/subscriber.md."""

import asyncio
import contextlib
import logging
import math
import os
import random
import re
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, NoReturn, Self
from weakref import WeakKeyDictionary, ref

from ..shared.clock import Clock, monotonic
from ..shared.errors import InvalidSettings, LinkLost, LogRefused, MalformedFrame, NotPrimary
from ..shared.invalidation import Everything, Invalidation, Position, Target, check_namespace, invalidation_of
from ..shared.process.closing import Closing
from ..shared.receipt import Receipt
from ..shared.telemetry.tracing import publishing
from ..shared.transport.redis.address import RedisAddress
from ..shared.transport.redis.log import append
from ..shared.wire import decode
from .cache.local_cache import LocalCache
from .following.applied import Applied, ApplyOutcome
from .following.follower import Follower, State, Timing
from .following.lag import Lag
from .following.sequencer import Sequencer

__all__ = ["State", "Subscriber", "SubscriberStats"]

_log = logging.getLogger("broadcache.subscriber")

_STATES_WORST_FIRST: Final[tuple[State, ...]] = ("closed", "lost", "connecting", "recovering")
_COUNTERS: Final = ("gaps", "echoes", "subscriptions", "lost")
_REPLICA_ID = re.compile(r"[!-~]{1,128}", re.ASCII)


@dataclass(frozen=True, slots=True)
class SubscriberStats:
    """Counters of one subscriber since it was made.

    Shape: `received` counts messages by what became of them: `applied`, `malformed`, `not followed` and
           `requested` (of those that were posted: of another namespace, and without a body, which clears). How they
           came is counted as well: `http` ones were posted, `replayed` ones were read from the log, `unsequenced` ones
           had no position, `duplicate` ones one that was reached already, `foreign` ones one of another epoch.
           `unlogged` is how often a message claimed a position that the log does not have, `gaps` how often something
           was missed, `echoes` how often coherence was proven, `subscriptions` how often it subscribed anew, `lost` how
           often it had no link.
    """

    received: dict[str, int]
    gaps: int
    echoes: int
    subscriptions: int
    lost: int


class Subscriber(Closing):
    """Keeps the caches of one replica coherent. An asynchronous context manager; `with` runs it in a thread of its own.

    Entering returns as soon as the caches are coherent, and after `start_timeout_seconds` at the latest: a Redis that
    is away does not keep a service from starting, the caches are bypassed until it comes.

    Shape:  `caches` maps each namespace to its cache, or to several: `{"products": cache, "users": [names, rights]}`.
            `replica_id` names this process to others. `on_state` is told each new `state`, in the subscriber's event
            loop; it must not block.
    Units:  about every `echo_interval_seconds` the link is asked for proof that it delivers, which has to come within
            `echo_timeout_seconds`. Reconnecting waits at most `backoff_seconds_max`, at random.
    Raises: InvalidSettings, InvalidNamespace when built; nothing afterwards: what happens is in `state`, in `stats()`
            and in the log `broadcache.subscriber`.
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
    ) -> None:
        self.replica_id: Final = _checked_replica_id(replica_id)
        self._address = RedisAddress(url)
        self._start_timeout_seconds = _checked_seconds(start_timeout_seconds, "start_timeout_seconds", may_be_zero=True)
        self._timing = Timing(
            echo_interval_seconds=_checked_seconds(echo_interval_seconds, "echo_interval_seconds"),
            echo_timeout_seconds=_checked_seconds(echo_timeout_seconds, "echo_timeout_seconds"),
            connect_timeout_seconds=_checked_seconds(connect_timeout_seconds, "connect_timeout_seconds"),
            backoff_seconds_max=_checked_seconds(backoff_seconds_max, "backoff_seconds_max"),
        )
        self._clock = clock
        self._uniform = uniform
        self._on_state = on_state
        self._told_state: State = "closed"
        self._sequencers: dict[str, Sequencer] = {}
        # One for all namespaces; in a cluster, where each may be at another server, one for each.
        self._followers: dict[str, Follower] = {}
        self._past: Counter[str] = Counter()
        # What was posted, by what became of it. Any thread may hand it over.
        self._posted: Counter[str] = Counter()
        self._posted_lock = threading.Lock()
        self._has_lag = False
        for namespace, of_namespace in caches.items():
            for cache in of_namespace if isinstance(of_namespace, Sequence) else [of_namespace]:
                self._add(namespace, cache)
        if not self._sequencers or self._sequencers.keys() != caches.keys():
            raise InvalidSettings(
                "expected at least one namespace in caches, and at least one cache of each, e.g. {'products': cache}, "
                f"got {caches}"
            )
        self._has_sweep_work = asyncio.Event()
        self._main: asyncio.Task[None] | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._following: dict[str, asyncio.Task[NoReturn]] = {}
        self._thread: _Thread | None = None

    # --- what is known ------------------------------------------------------------------------------------------------

    @property
    def caches(self) -> tuple[LocalCache, ...]:
        """The caches it keeps coherent."""
        return tuple(cache for sequencer in self._sequencers.copy().values() for cache in sequencer.caches)

    @property
    def caches_by_namespace(self) -> dict[str, LocalCache]:
        """The caches it keeps coherent, by namespace; of several, the first."""
        return {namespace: sequencer.caches[0] for namespace, sequencer in self._sequencers.copy().items()}

    @property
    def sequencers(self) -> Mapping[str, Sequencer]:
        """Position, counters, lag and caches of each namespace, as they are now. To look at, not to change."""
        return self._sequencers.copy()

    def measure_lag(self) -> None:
        """From now on, note how late each invalidation is applied. Whoever collects metrics asks for it.

        It costs a third of a microsecond an invalidation, which is why it is not done unasked.
        """
        self._has_lag = True
        for sequencer in self._sequencers.copy().values():
            sequencer.lag = sequencer.lag or Lag()

    @property
    def state(self) -> State:
        """Where the subscriber is in its life. It is `coherent` only while every cache may be served."""
        states = {follower.state for follower in self._followers.copy().values()}
        for state in _STATES_WORST_FIRST:
            if state in states:
                return state
        if not self._followers:
            return "closed"
        if not all(cache.is_coherent for cache in self.caches):
            return "lost"  # the event loop is stalled, or the proof is late: the caches have noticed before us
        return "coherent"

    def position(self, namespace: str) -> Position | None:
        """The position of the last invalidation of `namespace` that was applied here; None when there is none yet.

        Raises: InvalidSettings when this subscriber does not follow `namespace`.
        """
        return self._sequencer(namespace).position

    def stats(self) -> SubscriberStats:
        """Return the counters."""
        # Copies: another thread may be counting.
        received = Counter(self._past)
        for counts in (self._posted, *(each.counts for each in self._sequencers.copy().values())):
            received.update(counts.copy())
        for follower in self._followers.copy().values():
            received.update(_counts_of(follower))
        gaps, echoes, subscriptions, lost = (received.pop(name, 0) for name in _COUNTERS)
        return SubscriberStats(dict(received), gaps, echoes, subscriptions, lost)

    async def wait_coherent(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the caches are coherent, at most `timeout_seconds`; return whether they are."""
        return await _in_time(timeout_seconds, self._all_coherent())

    # --- what it follows ----------------------------------------------------------------------------------------------

    async def attach(self, namespace: str, cache: LocalCache) -> bool:
        """Keep one more cache coherent, of a new namespace or of one that is followed already. The cache is cleared.

        Returns as soon as it is coherent, and after `start_timeout_seconds` at the latest; whether it is. Called
        before the start, it only makes the cache one of those to follow. To be called on the subscriber's event loop.

        Raises: InvalidSettings, InvalidNamespace.
        """
        self._check_loop()
        if self._tasks is not None:
            _owners.claim(self._checked_cache(namespace, cache), self)
        follower = self._add(namespace, cache)
        cache.apply(Everything(), reason="subscribed")
        self._has_sweep_work.set()
        if self._tasks is None:
            return False
        self._run(follower, self._tasks)
        return await _in_time(self._start_timeout_seconds, follower.wait_coherent())

    async def detach(self, namespace: str) -> None:
        """Follow `namespace` no longer; its caches are bypassed from now on.

        To be called on the subscriber's event loop.

        Raises: InvalidSettings when this subscriber does not follow `namespace`.
        """
        self._check_loop()
        sequencer = self._sequencer(namespace)
        # Before anything else: once it is not registered any more, it must not be served.
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
                on_change=self._note_change,
            )
        follower.add(sequencer)
        return follower

    def _check_loop(self) -> None:
        if self._loop not in (None, asyncio.get_running_loop()):
            raise InvalidSettings("expected to be called on the subscriber's event loop, got called on another one")

    def _link_key(self, namespace: str) -> str:
        """Return what namespaces that share a link have in common."""
        return namespace if self._address.is_cluster else ""

    # --- its life -----------------------------------------------------------------------------------------------------

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
            # It counts as running until it has ended, also if this call is cancelled meanwhile.
            await asyncio.wait([main])
            if self._main is main:
                self._main = None
                self._release_caches()

    def __enter__(self) -> Self:
        self._begin()
        self._thread = _Thread(self)
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
                "cancelled and has not ended yet"
            )
        try:
            for cache in self.caches:
                _owners.claim(cache, self)
        except InvalidSettings:
            self._release_caches()
            raise
        # Events belong to the event loop that first waits for them, and the next life may have another.
        self._has_sweep_work = asyncio.Event()
        for follower in self._followers.values():
            follower.prepare()

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for follower in self._followers.values():
                    self._run(follower, tasks)
                tasks.create_task(self._sweep_for_ever(), name="broadcache sweep")
        finally:
            self._tasks = self._loop = None
            self._following.clear()
            for follower in self._followers.values():
                follower.leave("closed")

    def _run(self, follower: Follower, tasks: asyncio.TaskGroup) -> None:
        """Have `follower` follow, if it does not yet."""
        key = self._link_key(follower.namespaces[0])
        if key not in self._following:
            self._following[key] = tasks.create_task(follower.follow_for_ever(), name="broadcache follow")

    def _note_change(self) -> None:
        self._has_sweep_work.set()
        state = self.state
        if state != self._told_state:
            self._told_state = state
            if self._on_state is not None:
                try:
                    self._on_state(state)
                except Exception:  # noqa: BLE001  (somebody else's mistake must not end the subscription)
                    _log.exception("on_state(%r) failed: expected a function that does not raise", state)

    async def _all_coherent(self) -> None:
        while waiting := [each for each in self._followers.values() if each.state != "coherent"]:
            await waiting[0].wait_coherent()

    async def _sweep_for_ever(self) -> None:
        failing: set[LocalCache] = set()
        while True:
            await self._has_sweep_work.wait()
            self._has_sweep_work.clear()
            for cache in self.caches:
                try:
                    while cache.has_sweep_work:
                        cache.sweep()
                        await asyncio.sleep(0)
                except Exception as error:  # noqa: BLE001  (code of the user's must not end the subscription)
                    if cache not in failing:
                        failing.add(cache)
                        _log.error(
                            "the sweep of a cache (%s) raised %s: expected a sweep that does not raise. Its dead "
                            "entries take up memory until a later sweep; fix the methods that this class overrides",
                            type(cache).__qualname__,
                            type(error).__qualname__,
                        )

    # --- what is posted to it -----------------------------------------------------------------------------------------

    def apply(self, body: bytes) -> Applied:
        """Forget what the body of a request names: the way to a replica that does not lead through Redis.

        What comes over Redis as well is applied again: it costs a load at most. It has no say in the position, proves
        nothing, and lets no cache serve longer. To be called from any thread, also while the subscriber is not running.

        Shape:  one frame of the wire form, whose `epoch` and `seq` are not looked at. It concerns its namespace, or all
                that are followed when it names none. An empty body, and one that cannot be read, mean everything of all
                of them.
        Raises: nothing, whatever the bytes.
        """
        sequencers = self._sequencers.copy()
        if not body:
            return self._clear_posted(sequencers, "requested", "an empty body was posted")
        try:
            invalidation = decode(body, None)
        except MalformedFrame as error:
            return self._clear_posted(sequencers, "malformed", f"{error}; it was posted over HTTP")
        if namespace := invalidation.namespace:
            sequencers = {namespace: sequencers[namespace]} if namespace in sequencers else {}
        elif len(sequencers) == 1:
            [namespace] = sequencers
        dropped = sum([each.apply_posted(invalidation) for each in sequencers.values()])
        outcome: ApplyOutcome = "applied" if sequencers else "not followed"
        self._wake_sweep()
        self._count_posted(outcome)
        return self._applied(outcome, invalidation, namespace or None, dropped, sequencers)

    def _clear_posted(self, sequencers: dict[str, Sequencer], reason: str, why: str) -> Applied:
        dropped = sum(each.clear_posted(reason, why) for each in sequencers.values())
        self._wake_sweep()
        self._count_posted(reason)
        return self._applied("cleared", None, None, dropped, sequencers)

    def _applied(
        self,
        outcome: ApplyOutcome,
        invalidation: Invalidation | None,
        namespace: str | None,
        dropped: int,
        sequencers: dict[str, Sequencer],
    ) -> Applied:
        return Applied(
            replica=self.replica_id,
            state=self.state,
            outcome=outcome,
            id=(invalidation.id or None) if invalidation else None,
            namespace=namespace,
            dropped=dropped,
            positions={name: each.position for name, each in sequencers.items()},
        )

    def _count_posted(self, what: str) -> None:
        with self._posted_lock:
            self._posted.update(("http", what))

    def _wake_sweep(self) -> None:
        """Have the subscriber's event loop, if it has one now, look for dead entries."""
        if (loop := self._loop) is not None:
            with contextlib.suppress(RuntimeError):  # it was closed just now
                loop.call_soon_threadsafe(self._has_sweep_work.set)

    # --- what this replica says ---------------------------------------------------------------------------------------

    async def invalidate(
        self, *targets: Target, namespace: str, reason: str = "", timeout_seconds: float = 5.0
    ) -> Receipt:
        """Forget `targets` here, at once, then publish them so that every other replica does.

        Its message is applied again when it comes back, before this returns. It is published over the subscriber's own
        link.

        Raises: LinkLost when it could not be published within `timeout_seconds`, or is not known to have been; this
                replica has forgotten all the same. LogRefused, InvalidTarget, InvalidSettings.
        """
        sequencer = self._sequencer(namespace)
        invalidation = invalidation_of(targets, namespace=namespace, reason=reason, source=self.replica_id)
        sequencer.apply_own(invalidation)
        self._has_sweep_work.set()
        with publishing(invalidation) as traced:
            return await self._publish_own(traced, timeout_seconds)

    async def _publish_own(self, invalidation: Invalidation, timeout_seconds: float) -> Receipt:
        follower = self._followers[self._link_key(invalidation.namespace)]
        last: LinkLost | NotPrimary | None = None
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    await follower.wait_coherent()
                    if (link := follower.link) is None:
                        await asyncio.sleep(0)
                        continue
                    try:
                        return await append(link, invalidation, receipt_seconds=2 * timeout_seconds)
                    except LinkLost as error:
                        last = error
                        await asyncio.sleep(0)
                    except NotPrimary as error:
                        # The echo would find out too, a second later.
                        last = last if isinstance(last, LinkLost) else error
                        await link.close()
                    except LogRefused as error:
                        if isinstance(last, LinkLost):
                            raise LinkLost(f"{last}; and then: {error}") from error
                        raise
        except TimeoutError:
            why = f": {last}" if last else "; there is no link to Redis"
            raise LinkLost(
                f"expected to publish within {timeout_seconds:g} s, could not{why}; this replica has dropped "
                "its entries, the others may not have: publish again, and expect it to be harmless"
            ) from last

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
            raise InvalidSettings(f"expected a cache that is not followed yet, got one that is, for {namespace!r}")
        if cache.clock is not self._clock:
            raise InvalidSettings("expected the subscriber and its caches to use one clock, got two")
        if cache.max_staleness_seconds <= self._timing.echo_interval_seconds:
            raise InvalidSettings(
                f"max_staleness_seconds must exceed echo_interval_seconds (got {cache.max_staleness_seconds:g} and "
                f"{self._timing.echo_interval_seconds:g}): reads would be bypassed between two proofs of coherence"
            )
        return cache


class _Owners:
    """Which subscriber runs with which cache. A cache of two would be served as long as either of them is coherent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: WeakKeyDictionary[LocalCache, ref[Subscriber]] = WeakKeyDictionary()

    def claim(self, cache: LocalCache, subscriber: Subscriber) -> None:
        """Make `subscriber` the owner. Raises: InvalidSettings when another one is, and has not been closed."""
        with self._lock:
            owner = self._owners.get(cache)
            if owner is not None and owner() not in (None, subscriber):
                raise InvalidSettings(
                    "expected a cache that no other subscriber keeps coherent, got one that another running one does; "
                    "give each subscriber caches of its own, or close the other one first"
                )
            self._owners[cache] = ref(subscriber)

    def release(self, cache: LocalCache, subscriber: Subscriber) -> None:
        """Take the cache from `subscriber`, if it is the owner."""
        with self._lock:
            owner = self._owners.get(cache)
            if owner is not None and owner() is subscriber:
                del self._owners[cache]


_owners: Final = _Owners()


class _Thread:
    """An event loop in a daemon thread, with a subscriber in it: for services that have no loop of their own."""

    def __init__(self, subscriber: Subscriber) -> None:
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(
            target=asyncio.run, args=[self._run(subscriber)], name="broadcache subscriber", daemon=True
        )
        self._thread.start()
        self._started.wait()

    def stop(self) -> None:
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self, subscriber: Subscriber) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            main = asyncio.create_task(subscriber._live())
            await subscriber.wait_coherent(subscriber._start_timeout_seconds)
            self._started.set()
            await self._stop.wait()
            main.cancel()
            await asyncio.wait([main])
        finally:
            self._started.set()


async def _in_time(timeout_seconds: float | None, waiting: Awaitable[None]) -> bool:
    """Wait for something, at most `timeout_seconds`; return whether it came."""
    try:
        async with asyncio.timeout(timeout_seconds):
            await waiting
    except TimeoutError:
        return False
    return True


def _counts_of(follower: Follower) -> dict[str, int]:
    return {"echoes": follower.echoes, "subscriptions": follower.subscriptions, "lost": follower.lost}


def _checked_seconds(seconds: float, name: str, *, may_be_zero: bool = False) -> float:
    if not 0 <= seconds < math.inf or (seconds == 0 and not may_be_zero):
        raise InvalidSettings(f"expected {name} to be a positive number of seconds, got {seconds!r}")
    return float(seconds)


def _checked_replica_id(replica_id: str | None) -> str:
    if replica_id is None:
        replica_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    if not _REPLICA_ID.fullmatch(replica_id):
        raise InvalidSettings(
            f"expected replica_id to be 1 to 128 printable ASCII characters without spaces, got {replica_id!r:.200}"
        )
    return replica_id
