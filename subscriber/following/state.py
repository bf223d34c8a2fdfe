"""The state of a subscriber, its counters, what it logs, and how long a start waits for the state `coherent`."""

import logging
import os
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from time import time
from typing import Final, Literal, TypeAlias

from ...shared.clock import Clock
from ...shared.telemetry.histogram import Histogram
from ...shared.telemetry.outages import Outages, shown

__all__ = ["STATES_WORST_FIRST", "Events", "Lag", "Starts", "State", "SubscriberStats"]

_log = logging.getLogger("broadcache.subscriber")

_SECONDS_BETWEEN_CLEARS: Final = 1.0

State: TypeAlias = Literal["connecting", "recovering", "coherent", "lost", "closed"]

STATES_WORST_FIRST: Final[tuple[State, ...]] = ("closed", "lost", "connecting", "recovering", "coherent")
"""In this order, the first state among several is that of the whole: it is coherent only when each of them is."""


@dataclass(frozen=True, slots=True)
class SubscriberStats:
    """Counters of one subscriber since it was made.

    Shape: `received` counts messages by outcome: `applied`, `malformed` and, of posted ones, `not followed` (of another
           namespace) and `requested` (without a body, which clears everything). It also counts how they arrived: `http`
           were posted, `replayed` were read from the log, `unsequenced` had no position, `duplicate` had a position
           reached before, `foreign` had one of another epoch. `unlogged` is how often a message claimed a position
           that the log does not have. `gaps` is how often a message was missed, `echoes` how often coherence was
           proven, `subscriptions` how often the subscriber subscribed again, `lost` how often it had no link.
    """

    received: dict[str, int]
    gaps: int
    echoes: int
    subscriptions: int
    lost: int


class Events:
    """What a subscriber logs of its links and namespaces: a line for all that something has happened to.

    Shape: `outages` are those of its links: one, or in a cluster one for each namespace.
    """

    def __init__(self, clock: Clock, *, is_cluster: bool) -> None:
        self.outages: Final = Outages(_log, clock=clock, began="caches bypassed", ended="coherent again")
        self._clock = clock
        self._is_cluster = is_cluster
        self._cleared: dict[str, list[str]] = {}
        self._logged_at: float | None = None

    def record_coherent(self, link: str, namespaces: Sequence[str], label: str) -> None:
        """Record that a link has been subscribed and proven."""
        self.outages.record_success(link)
        level = logging.DEBUG if self._is_cluster else logging.INFO
        _log.log(level, "coherent: subscribed to %s at %s", shown(namespaces), label)

    def record_clear(self, namespace: str, reason: str) -> None:
        """Record that everything of a namespace was dropped; `log_clears` logs it."""
        self._cleared.setdefault(reason, []).append(namespace)

    def log_clears(self) -> None:
        """Log the recorded clears, one line for each reason. To be called again about every second.

        In a cluster each namespace is followed by itself: after the first line, the next ones wait for one another.
        """
        if not self._cleared:
            return
        now = self._clock()
        if self._is_cluster and self._logged_at is not None and now - self._logged_at < _SECONDS_BETWEEN_CLEARS:
            return
        self._logged_at = now
        cleared, self._cleared = self._cleared, {}
        for reason, namespaces in cleared.items():
            level = logging.INFO if reason == "subscribed" else logging.WARNING
            _log.log(level, "cleared %s: %s", shown(namespaces), reason)


class Lag(Histogram):
    """The time from the sending of an invalidation to the end of its apply, for all that have a time of sending.

    It compares two wall clocks, the sender's and this machine's. It is for display: no decision depends on it.

    Units: seconds, with the precision of `sent_at_ms`, a millisecond. If the sender's clock is ahead, the lag is zero.
    """

    __slots__ = ()
    total: float

    def record(self, sent_at_ms: int | None) -> None:
        """Count one that has just been applied. `Histogram.observe` is inlined here, as each message calls this."""
        if sent_at_ms is not None:
            seconds = time() - sent_at_ms * 0.001
            if seconds < 0.0:  # noqa: PLR1730  (a call would be a good part of what all of this costs)
                seconds = 0.0
            self._counts[bisect_left(self._bounds, seconds)] += 1
            self.total += seconds


class Starts:
    """How long one subscriber waits at its start. Subscribers that start one after another wait at the same time.

    While a running subscriber gets no answer from the address, the time that it has waited counts for the others.

    Shape:  `address` is the label of the address: subscribers with the same one share the wait.
    """

    def __init__(self, address: str, clock: Clock) -> None:
        self._address = address
        self._clock = clock
        self._silent_since: float | None = None
        self._pid = 0

    def begin(self) -> None:
        """Record that the subscriber starts."""
        self._silent_since = self._clock()
        self._pid = os.getpid()
        _running[id(self)] = self

    def record(self, states: Iterable[State]) -> None:
        """Record the states of the followers: one that has a link has had an answer."""
        if any(state in ("recovering", "coherent") for state in states):
            self._silent_since = None
        elif self._silent_since is None:
            self._silent_since = self._clock()

    def end(self) -> None:
        """Record that the subscriber has ended."""
        _running.pop(id(self), None)

    async def wait(self, wait_coherent: Callable[[float], Awaitable[bool]], timeout_seconds: float) -> bool:
        """Wait for coherence, for what is left of `timeout_seconds`; return whether it was reached."""
        left_seconds = self.left_seconds(timeout_seconds)
        is_coherent = await wait_coherent(left_seconds)
        if not is_coherent:
            _log.warning(
                "not coherent %g s after the start%s: the caches are bypassed until %s answers",
                round(left_seconds, 1),
                "" if timeout_seconds - left_seconds < _SHARED_SECONDS_MIN else ", others have waited already",
                self._address,
            )
        return is_coherent

    def left_seconds(self, timeout_seconds: float) -> float:
        """Return what is left of a wait."""
        waited = [each._silent_seconds for each in list(_running.values()) if each._address == self._address]
        return max(0.0, timeout_seconds - max(waited, default=0.0))

    @property
    def _silent_seconds(self) -> float:
        since = self._silent_since
        if since is None or self._pid != os.getpid():  # of the parent of a fork: it does not run here
            return 0.0
        return self._clock() - since


_SHARED_SECONDS_MIN: Final = 0.05
_running: Final[dict[int, Starts]] = {}
