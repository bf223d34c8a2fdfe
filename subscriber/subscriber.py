"""The subscriber: hears of invalidations for one replica, tells its caches what to drop and how long they may serve.

Its life: connect, subscribe, recover, stay coherent by proving again and again that the link delivers, lose the link,
and begin again, for ever. What it cannot prove it does not claim: see docs/how-it-works.md.
"""

import asyncio
import logging
import math
import os
import random
import re
import secrets
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias

from ..shared.clock import Clock, monotonic
from ..shared.errors import BroadcacheError, InvalidSettings, LinkLost
from ..shared.invalidation import Position, Target, check_namespace, invalidation_of
from ..shared.link import Link, RedisAddress, Refused
from ..shared.log import Receipt, append, head, names_of
from .local_cache import LocalCache
from .sequencer import Sequencer

__all__ = ["State", "Subscriber", "SubscriberStats"]

State: TypeAlias = Literal["connecting", "recovering", "coherent", "lost", "closed"]

_log = logging.getLogger("broadcache.subscriber")

_BACKOFF_SECONDS_MIN: Final = 0.05
_REPLICA_ID = re.compile(r"[!-~]{1,128}", re.ASCII)


@dataclass(frozen=True, slots=True)
class SubscriberStats:
    """Counters of one subscriber since it was made.

    Shape: `received` counts messages by what became of them: `applied`, `duplicate`, `own`, `malformed`; `unsequenced`
           ones are applied too. `subscriptions` is how often it subscribed anew, `lost` how often it had no link.
    """

    received: dict[str, int]
    subscriptions: int
    lost: int


class Subscriber:
    """Keeps the caches of one replica coherent. An asynchronous context manager; `with` runs it in a thread of its own.

    Entering returns as soon as the caches are coherent, and after `start_timeout_seconds` at the latest: a Redis that
    is away does not keep a service from starting, the caches are bypassed until it comes.

    Shape:  `caches` maps namespaces to caches: `{"products": cache}`. `replica_id` names this process to others.
    Units:  every `echo_interval_seconds` at most the link is asked for proof that it delivers, which has to come within
            `echo_timeout_seconds`. Reconnecting waits at most `backoff_seconds_max`, at random.
    Raises: InvalidSettings, InvalidNamespace when built; nothing afterwards: what happens is in `state`, in `stats()`
            and in the log `broadcache.subscriber`.
    """

    def __init__(
        self,
        url: str,
        *,
        caches: Mapping[str, LocalCache],
        replica_id: str | None = None,
        echo_interval_seconds: float = 1.0,
        echo_timeout_seconds: float = 2.0,
        connect_timeout_seconds: float = 2.0,
        start_timeout_seconds: float = 5.0,
        backoff_seconds_max: float = 5.0,
        clock: Clock = monotonic,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self.replica_id: Final = _checked_replica_id(replica_id)
        self._address = RedisAddress(url)
        self._echo_interval_seconds = _checked_seconds(echo_interval_seconds, "echo_interval_seconds")
        self._echo_timeout_seconds = _checked_seconds(echo_timeout_seconds, "echo_timeout_seconds")
        self._connect_timeout_seconds = _checked_seconds(connect_timeout_seconds, "connect_timeout_seconds")
        self._start_timeout_seconds = _checked_seconds(start_timeout_seconds, "start_timeout_seconds", may_be_zero=True)
        self._backoff_seconds_max = _checked_seconds(backoff_seconds_max, "backoff_seconds_max")
        self._clock = clock
        self._uniform = uniform
        self._sequencers = {
            namespace: Sequencer(namespace, [self._checked_cache(namespace, cache)])
            for namespace, cache in caches.items()
        }
        if not self._sequencers:
            raise InvalidSettings("expected at least one namespace in caches, e.g. {'products': cache}, got none")
        self.caches: Final = tuple(cache for each in self._sequencers.values() for cache in each.caches)
        self._of_channel = {names_of(name).channel.encode(): each for name, each in self._sequencers.items()}
        self._state: State = "closed"
        self._subscriptions = 0
        self._lost = 0
        self._link: Link | None = None
        self._is_coherent = asyncio.Event()
        self._has_sweep_work = asyncio.Event()
        self._main: asyncio.Task[None] | None = None
        self._thread: _Thread | None = None

    # --- what is known -----------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Where the subscriber is in its life. It is `coherent` only while every cache may be served."""
        if self._state == "coherent" and not all(cache.is_coherent for cache in self.caches):
            return "lost"  # the event loop is stalled, or the proof is late: the caches have noticed before us
        return self._state

    @property
    def caches_by_namespace(self) -> dict[str, LocalCache]:
        """The caches it keeps coherent, by namespace."""
        return {namespace: sequencer.caches[0] for namespace, sequencer in self._sequencers.items()}

    def position(self, namespace: str) -> Position | None:
        """The position of the last invalidation of `namespace` that was applied here; None when there is none yet.

        Raises: InvalidSettings when this subscriber does not follow `namespace`.
        """
        return self._sequencer(namespace).position

    def stats(self) -> SubscriberStats:
        """Return the counters."""
        received = sum((each.counts for each in self._sequencers.values()), Counter())
        return SubscriberStats(dict(received), self._subscriptions, self._lost)

    async def wait_coherent(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the caches are coherent, at most `timeout_seconds`; return whether they are."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._is_coherent.wait()
        except TimeoutError:
            return False
        return True

    # --- its life ----------------------------------------------------------------------------------------------------

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

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop, and bypass the caches. Closing twice, or before starting, is harmless."""
        main, self._main = self._main, None
        if main is not None:
            main.cancel()
            await asyncio.wait([main])

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

    def _begin(self) -> None:
        if self._main is not None or self._thread is not None:
            raise InvalidSettings("expected a subscriber that is not running, got one that is: it was entered twice")
        # Events belong to the event loop that first waits for them, and the next life may have another.
        self._is_coherent = asyncio.Event()
        self._has_sweep_work = asyncio.Event()

    async def _live(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow_for_ever(), name="broadcache follow")
                tasks.create_task(self._sweep_for_ever(), name="broadcache sweep")
        finally:
            self._leave("closed")

    async def _follow_for_ever(self) -> None:
        failures = 0
        while True:
            proofs = 0
            try:
                self._state = "connecting"
                link = await Link.open(
                    self._address,
                    client_name=f"broadcache:{self.replica_id}",
                    timeout_seconds=self._connect_timeout_seconds,
                    on_message=self._receive,
                )
                try:
                    await self._recover(link)
                    while True:
                        await self._prove(link)
                        proofs += 1
                finally:
                    self._leave("lost")
                    await link.close()
            except BroadcacheError as error:
                # One line an outage, not one an attempt.
                _log.log(logging.WARNING if proofs or not failures else logging.DEBUG, "caches bypassed: %s", error)
            except Exception:  # noqa: BLE001  (the outermost task: a replica must outlive our mistakes)
                _log.exception("caches bypassed: an error of our own, please report it")
            self._lost += 1
            self._state = "lost"
            # A link that has delivered proof was a good one: the next attempt is the first again.
            failures = 1 if proofs else failures + 1
            await asyncio.sleep(self._backoff_seconds(failures))

    async def _recover(self, link: Link) -> None:
        """Subscribe, and begin anew: what was published before cannot be known, so everything is dropped."""
        self._state = "recovering"
        for sequencer in self._sequencers.values():
            sequencer.begin_recovery()
        async with _deadline(self._echo_timeout_seconds, link.label):
            try:
                await link.subscribe(*(channel.decode() for channel in self._of_channel))
            except Refused as refusal:
                raise LinkLost(f"expected {link.label} to let this user subscribe, got: {refusal}") from refusal
            asked_at = self._clock()
            for namespace, sequencer in self._sequencers.items():
                while not sequencer.recover(await head(link, namespace)):
                    pass
        self._subscriptions += 1
        self._link = link
        self._confirm(asked_at)
        _log.info("coherent: subscribed to %s at %s", ", ".join(self._sequencers), link.label)

    async def _prove(self, link: Link) -> None:
        """Wait a while, then have the server answer on the link that carries the messages.

        Everything on a link arrives in order. So the answer proves that what was accepted before the question was asked
        has arrived, and has been applied.
        """
        pause_seconds = self._echo_interval_seconds * (0.8 + 0.2 * self._uniform())
        await asyncio.wait([link.lost], timeout=pause_seconds)
        asked_at = self._clock()
        async with _deadline(self._echo_timeout_seconds, link.label):
            await link.call("PING")
        self._confirm(asked_at)

    def _confirm(self, as_of: float) -> None:
        for cache in self.caches:
            cache.confirm_coherent(as_of)
        self._state = "coherent"
        self._is_coherent.set()
        self._has_sweep_work.set()

    def _leave(self, state: State) -> None:
        self._link = None
        self._state = state
        self._is_coherent.clear()
        for cache in self.caches:
            cache.disconnect()

    def _backoff_seconds(self, failures: int) -> float:
        """Full jitter: anything from nothing to a ceiling that doubles, so that replicas do not come back in step."""
        ceiling_seconds: float = min(self._backoff_seconds_max, _BACKOFF_SECONDS_MIN * 2.0 ** min(failures, 32))
        return self._uniform() * ceiling_seconds

    # --- what arrives ------------------------------------------------------------------------------------------------

    def _receive(self, channel: bytes, frame: bytes) -> None:
        if self._of_channel[channel].receive(frame):
            self._has_sweep_work.set()

    async def _sweep_for_ever(self) -> None:
        while True:
            await self._has_sweep_work.wait()
            self._has_sweep_work.clear()
            for cache in self.caches:
                while cache.has_sweep_work:
                    cache.sweep()
                    await asyncio.sleep(0)

    # --- what this replica says --------------------------------------------------------------------------------------

    async def invalidate(
        self, *targets: Target, namespace: str, reason: str = "", timeout_seconds: float = 5.0
    ) -> Receipt:
        """Forget `targets` here, at once, then publish them so that every other replica does.

        Its message is not applied a second time when it comes back. It is published over the subscriber's own link.

        Raises: LinkLost when it could not be published within `timeout_seconds`, or is not known to have been; this
                replica has forgotten all the same. LogRefused, InvalidTarget, InvalidSettings.
        """
        sequencer = self._sequencer(namespace)
        invalidation = invalidation_of(targets, namespace=namespace, reason=reason, source=self.replica_id)
        sequencer.apply_own(invalidation)
        self._has_sweep_work.set()
        last: LinkLost | None = None
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    await self._is_coherent.wait()
                    if (link := self._link) is None:
                        continue
                    try:
                        return await append(link, invalidation, receipt_seconds=2 * timeout_seconds)
                    except LinkLost as error:
                        last = error
                        await asyncio.sleep(0)
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
        if cache.clock is not self._clock:
            raise InvalidSettings("expected the subscriber and its caches to use one clock, got two")
        if cache.max_staleness_seconds <= self._echo_interval_seconds:
            raise InvalidSettings(
                f"max_staleness_seconds must exceed echo_interval_seconds (got {cache.max_staleness_seconds:g} and "
                f"{self._echo_interval_seconds:g}): reads would be bypassed between two proofs of coherence"
            )
        return cache


@asynccontextmanager
async def _deadline(seconds: float, label: str) -> AsyncIterator[None]:
    """End what is awaited within it after some seconds, as a lost link."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise LinkLost(f"expected an answer from {label} within {seconds:g} s, got none") from None


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
