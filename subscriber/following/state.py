"""The state of a subscriber, and its counters."""

from bisect import bisect_left
from dataclasses import dataclass
from time import time
from typing import Final, Literal, TypeAlias

from ...shared.telemetry.histogram import Histogram

__all__ = ["STATES_WORST_FIRST", "Lag", "State", "SubscriberStats"]

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
