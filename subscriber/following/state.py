"""The state of a subscriber, and its counters."""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

__all__ = ["STATES_WORST_FIRST", "State", "SubscriberStats"]

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
