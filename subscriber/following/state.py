"""The state of a subscriber, and its counters."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from ...shared.clock import Clock
from ...shared.telemetry.outages import Outages, shown

__all__ = ["STATES_WORST_FIRST", "Events", "State", "SubscriberStats"]

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
