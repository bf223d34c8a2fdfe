"""The subscriber: keeps the caches of one replica coherent. How to choose its settings: docs/subscriber.md."""

import asyncio
import contextlib
import logging
import os
import random
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Literal, NoReturn, Self
from weakref import WeakMethod

from ..shared.clock import Clock, monotonic
from ..shared.errors import InvalidSettings
from ..shared.invalidation import Everything, Invalidation, Target, invalidation_of
from ..shared.process.forks import at_exit, in_forked_child, keep_inherited
from ..shared.process.loops import end_task, in_time, on_loop
from ..shared.telemetry.outages import shown
from ..shared.transport.redis.address import AddressRemap, Credentials, RedisAddress
from .cache.local_cache import LocalCache
from .cache.owners import owners as _owners
from .cache.sweeper import Sweeper
from .endpoint.access import Access
from .endpoint.processes.own_socket import own_socket
from .following.applied import Applied, Posted
from .following.follower import Follower
from .following.settings import Timing, checked_replica_id, checked_seconds, forked_replica_id
from .following.state import STATES_WORST_FIRST, Starts, State, SubscriberStats
from .following.thread import SubscriberThread
from .hub import Caches, Hub
from .roster import Roster

__all__ = ["Subscriber"]

_log = logging.getLogger("broadcache.subscriber")

_EXIT_SECONDS_MAX: Final = 2.0
_COUNTERS: Final = ("gaps", "echoes", "subscriptions", "lost")


class Subscriber(Hub):
    """Keeps the caches of one replica coherent. An asynchronous context manager; `with` runs it in a thread of its own.

    Entering returns as soon as the caches are coherent, and after `start_timeout_seconds` at the latest: a service
    starts even if Redis is not reachable, and the caches are bypassed until it is. Several of one address wait as one.

    Shape:  `caches` maps each namespace to its cache, or to several: `{"products": cache, "users": [names, rights]}`.
            `replica_id` identifies this process to others; without one, entering draws one. `on_state` is called with
            each new `state`, in the subscriber's event loop; it must not block.
            `credentials` returns (user, password) and is called for each connection, for passwords that change.
            `address_remap` maps addresses of sentinels and clusters, `prefix` begins all names: docs/redis.md.
            `replica_token` and `allow_open` are for the router: who may POST to it, as docs/subscriber.md has it.
    Units:  about every `echo_interval_seconds` an echo proves that the link delivers; it has to arrive within
            `echo_timeout_seconds`. Reconnecting waits a random time of at most `backoff_seconds_max`.
    Raises: InvalidSettings, InvalidNamespace when built; nothing afterwards: see `state`, `stats()` and the log.
    """

    def __init__(
        self,
        url: str,
        *,
        caches: Caches | None = None,
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
        prefix: str | None = None,
        replica_token: str | None = None,
        allow_open: bool | None = None,
    ) -> None:
        self._given_replica_id = replica_id
        self._replica_id = checked_replica_id(replica_id)
        self._address = RedisAddress(url, credentials=credentials, address_remap=address_remap, prefix=prefix)
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
        self._roster = Roster(
            self._address, timing=self._timing, clock=clock, uniform=uniform, on_change=self._on_change, subscriber=self
        )
        self._posted = Posted(lambda: self.replica_id, lambda: self.state)
        for namespace, of_namespace in ({} if caches is None else caches).items():
            for cache in of_namespace if isinstance(of_namespace, Sequence) else [of_namespace]:
                self._roster.add(namespace, cache, self._replica_id)
                _owners.record_home(cache, self)
        if caches is not None and (not caches or self.sequencers.keys() != caches.keys()):
            raise InvalidSettings(
                "expected at least one namespace in caches, and at least one cache of each, e.g. {'products': cache}, "
                f"got {caches}"
            )
        self._access = Access.of(replica_token, allow_open=allow_open)
        self._sweeper = Sweeper(lambda: self.caches)
        self._main: asyncio.Task[None] | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._following: dict[str, asyncio.Task[NoReturn]] = {}
        self._thread: SubscriberThread | None = None
        self._starts = Starts(self._address.label, clock)
        # How a parent process runs this subscriber, as long as this one has not started it again.
        self._inherited: Literal["in a thread", "in a loop"] | None = None
        self._exits_as = 0  # the process id for which an exit handler is registered
        self._restart_lock = threading.Lock()
        in_forked_child(self._start_over)

    def __repr__(self) -> str:
        caches = shown(list(self.sequencers)) if self.sequencers else "nothing"
        return f"<{type(self).__name__} of {caches} at {self._address.label}, {self.state}>"

    # --- observing ----------------------------------------------------------------------------------------------------

    @property
    def replica_id(self) -> str:
        """The id of this replica: the given one, or one of this process, which is drawn anew at each start.

        A child that was forked from a running subscriber has an id of its own in any case.
        """
        return self._replica_id

    @property
    def state(self) -> State:
        """The state of the subscriber. It is `coherent` only while every cache may be served."""
        states = {follower.state for follower in self._roster.followers.copy().values()}
        for state in STATES_WORST_FIRST[:-1]:
            if state in states:
                return state
        if not states:
            return "closed"
        if not all(cache.is_coherent for cache in self.caches):
            return "lost"  # the event loop is stalled, or the proof is late: the leases of the caches have ended
        return "coherent"

    def stats(self) -> SubscriberStats:
        """Return the counters."""
        received = self._roster.counts()
        received.update(self._posted.counts.copy())
        gaps, echoes, subscriptions, lost = (received.pop(name, 0) for name in _COUNTERS)
        return SubscriberStats(dict(received), gaps, echoes, subscriptions, lost)

    async def wait_coherent(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the caches are coherent, at most `timeout_seconds`; return whether they are."""
        self.restart_if_forked()
        return await in_time(timeout_seconds, on_loop(self._home(), self._roster.wait_coherent))

    # --- namespaces ---------------------------------------------------------------------------------------------------

    async def attach(self, namespace: str, cache: LocalCache) -> bool:
        """Follow one more cache, of a new namespace or of one that is followed already. The cache is cleared.

        Returns as soon as it is coherent, and after `start_timeout_seconds` at the latest; whether it is. Before the
        start, the cache is only added to those to follow. To be called on the subscriber's event loop.

        Raises: InvalidSettings, InvalidNamespace.
        """
        self._check_loop()
        if self._tasks is not None:
            _owners.claim(self, self._roster.checked(namespace, cache))
        follower = self._add(namespace, cache)
        self._sweeper.has_work.set()
        if self._tasks is None:
            return False
        cache.enter()
        cache.upkeep.on_bypass = None
        self._run(follower, self._tasks)
        return await in_time(self._starts.left_seconds(self._start_timeout_seconds), follower.wait_coherent())

    def add(self, namespace: str, cache: LocalCache) -> None:
        """Follow one more cache, before the start. The cache is cleared. Later, `attach` it.

        Raises: InvalidSettings, also when running; InvalidNamespace.
        """
        if self.is_running:
            raise InvalidSettings(
                "expected a subscriber that is not running, got one that is: `await attach(…)` instead"
            )
        self._add(namespace, cache)

    def _add(self, namespace: str, cache: LocalCache) -> Follower:
        follower = self._roster.add(namespace, cache, self._replica_id)
        _owners.record_home(cache, self)
        cache.apply(Everything(), reason="subscribed")
        return follower

    async def detach(self, namespace: str) -> None:
        """Stop following `namespace`; its caches are bypassed from now on.

        To be called on the subscriber's event loop.

        Raises: InvalidSettings when this subscriber does not follow `namespace`.
        """
        self._check_loop()
        sequencer = self._roster.sequencer(namespace)
        # First of all: a replica that is not registered must not serve.
        for cache in sequencer.caches:
            cache.leave()
            _owners.release(cache, self)
        key = self._roster.remove(namespace)
        if key is not None and (following := self._following.pop(key, None)) is not None:
            following.cancel()
            await asyncio.wait([following])

    def _check_loop(self) -> None:
        if self._loop not in (None, asyncio.get_running_loop()):
            raise InvalidSettings("expected a call on the subscriber's event loop, got one on another event loop")

    # --- running ------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._begin()
        self._main = asyncio.create_task(self._live(), name=f"broadcache subscriber {self.replica_id}")
        try:
            await self._starts.wait(self.wait_coherent, self._start_timeout_seconds)
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        """Stop, and bypass the caches. Closing twice, or before starting, is harmless."""
        if (main := self._main) is not None:
            # The subscriber is running until this task has ended, also if this call is cancelled meanwhile.
            await end_task(main)
            if self._main is main:
                self._main = None
                self._release_caches()

    def __enter__(self) -> Self:
        self._begin()
        try:
            self._start_thread().wait()
        except InvalidSettings:
            self.__exit__()
            raise
        return self

    def _start_thread(self) -> SubscriberThread:
        self._thread = SubscriberThread(
            self._live, lambda: self._starts.wait(self.wait_coherent, self._start_timeout_seconds)
        )
        try:
            self._thread.start()
        except BaseException:  # no thread is left, or the interpreter ends: it has not started
            self._thread = None
            self._release_caches()
            raise
        if self._exits_as != os.getpid():
            # Many services never leave the `with`: a replica that ends in order has to deregister even so.
            self._exits_as = os.getpid()
            at_exit(self._leave_at_exit)
        return self._thread

    def _leave_at_exit(self) -> None:
        if self._thread is not None:
            self._thread.stop(_EXIT_SECONDS_MAX)

    def __exit__(self, *_: object) -> None:
        thread, self._thread, self._inherited = self._thread, None, None
        if thread is not None:
            thread.stop()
            self._release_caches()

    def _release_caches(self) -> None:
        for cache in self.caches:
            if _owners.release(cache, self) and self._stand_in is None:
                cache.leave()
        own_socket.leave(self)  # after the caches have served for the last time

    @property
    def is_running(self) -> bool:
        """Whether it has been entered, and has not ended, in this process."""
        return (self._main is not None and not self._main.done()) or self._thread is not None

    def _begin(self) -> None:
        if self.is_running:
            raise InvalidSettings(
                "expected a subscriber that is not running, got one that is: it was entered twice, or its close was "
                "cancelled and has not ended yet; close it first, and wait until it has ended"
            )
        self._leave_stage()
        if not self.caches:
            raise InvalidSettings("expected a subscriber with a cache, got none; name caches, or `add` one first")
        _owners.claim(self, *self.caches)
        own_socket.join(self)  # before the caches store anything
        self._starts.begin()
        self._inherited = None
        if self._given_replica_id is None:
            self._replica_id = checked_replica_id(None)
        self._sweeper = Sweeper(lambda: self.caches)
        self._roster.follow_as(self._replica_id)
        for cache in self.caches:
            cache.enter()
            cache.upkeep.on_bypass = None

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        followers = self._roster.followers
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for follower in followers.values():
                    self._run(follower, tasks)
                tasks.create_task(self._sweeper.sweep_for_ever(), name="broadcache sweep")
        finally:
            if followers is self._roster.followers:  # else this is the parent's task, in a forked child
                self._tasks = self._loop = None
                self._starts.end()
                self._following.clear()
                for follower in followers.values():
                    follower.leave("closed")

    def _run(self, follower: Follower, tasks: asyncio.TaskGroup) -> None:
        """Start `follower`, if it is not running."""
        key = self._roster.link_key(follower.namespaces[0])
        if key not in self._following:
            self._following[key] = tasks.create_task(follower.follow_for_ever(), name="broadcache follow")

    def _on_change(self) -> None:
        self._sweeper.has_work.set()
        state = self.state
        if state != self._reported_state:
            self._reported_state = state
            self._starts.record(each.state for each in self._roster.followers.values())
            if self._on_state is not None:
                try:
                    self._on_state(state)
                except Exception:  # noqa: BLE001  (the user's code must not end the subscription)
                    _log.exception("on_state(%r) failed: expected a function that does not raise", state)

    # --- in a forked child --------------------------------------------------------------------------------------------

    def restart_if_forked(self) -> None:
        """Start again if this process was forked from one that has this subscriber running in a thread.

        The first read does the same, so only what comes before all reads needs it, e.g. a readiness probe. It does not
        wait: the caches are bypassed until they are coherent. May be called from any thread.
        """
        with self._restart_lock:
            if self._inherited != "in a thread":
                return
            self._inherited = None
            try:
                self._begin()
                self._start_thread()
            except Exception as error:  # noqa: BLE001  (a read must not fail because of it)
                _log.warning("caches bypassed: the subscriber cannot start again in this forked process: %s", error)
                return
        _log.info("started again in a forked process, as replica %s", self._replica_id)

    def _start_over(self) -> None:
        """Begin as a subscriber that is not running, in a forked child: threads, tasks and links are its parent's."""
        if self._thread is not None:
            self._inherited = "in a thread"
        elif self._main is not None and not self._main.done():
            self._inherited = "in a loop"
        keep_inherited(self._main, self._tasks, self._loop, self._following, self._sweeper)
        if self._main is not None:
            with contextlib.suppress(RuntimeError):  # of an event loop in debug mode: this is not its thread
                self._main.cancel()
        self._main = self._tasks = self._loop = self._thread = None
        self._following = {}
        self._reported_state = "closed"
        self._sweeper = Sweeper(lambda: self.caches)
        self._posted = Posted(lambda: self.replica_id, lambda: self.state)
        self._restart_lock = threading.Lock()
        if self._given_replica_id is None:
            self._replica_id = checked_replica_id(None)
        elif self._inherited:
            self._replica_id = forked_replica_id(self._given_replica_id)
        self._roster.start_over(self._replica_id)
        if self._inherited:
            on_bypass = WeakMethod(self.restart_if_forked if self._inherited == "in a thread" else self._warn_of_fork)
            for cache in self.caches:
                cache.upkeep.on_bypass = partial(_call, on_bypass)

    def _warn_of_fork(self) -> None:
        for cache in self.caches:
            cache.upkeep.on_bypass = None
        _log.warning(
            "caches bypassed: process %d was forked from one whose event loop runs the subscriber of %s; expected it "
            "to be entered again in the forked process",
            os.getpid(),
            ", ".join(self.sequencers),
        )

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
        applied = self._posted.apply(body, self._roster.sequencers.copy())
        self._sweeper.wake(self._loop)
        return applied

    def _dropped_here(self, targets: Sequence[Target], namespace: str, reason: str) -> Invalidation:
        """Return the invalidation of `targets`, after this replica has applied it. May be called from any thread."""
        sequencer = self._roster.sequencer(namespace)
        self.restart_if_forked()
        invalidation = invalidation_of(targets, namespace=namespace, reason=reason, source=self.replica_id)
        sequencer.apply_own(invalidation)
        self._sweeper.wake(self._loop)
        return invalidation

    def _served(self) -> "Subscriber":
        return self

    def _home(self) -> asyncio.AbstractEventLoop | None:
        return self._loop if (thread := self._thread) is None else thread.loop


def _call(method: "WeakMethod[Callable[[], None]]") -> None:
    if (found := method()) is not None:
        found()
