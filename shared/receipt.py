"""The receipt of a publish."""

import math
from numbers import Real
from typing import Any, NamedTuple

from .confirmation import Confirmation
from .errors import InvalidSettings
from .fanout_report import FanoutReport
from .invalidation import Position

__all__ = ["Receipt", "checked_receipt_seconds"]


class Receipt(NamedTuple):
    """The result of a publish.

    Shape:  `position` is that of the last frame, when the invalidation was split; None when it is not in the log.
            `receivers` is the count that PUBLISH returned: subscribed connections, no proof that a replica applied it.
            `is_repeat` is true when this id had been logged before, and nothing was logged now.
            `fanout` is the report of the HTTP fan-out; None when no replica was called.
            `pending` is true when the invalidation waits in the publisher's retry queue, to be logged later.
            `confirmation` lists the replicas that have applied it; None when the publish did not wait for them.
    """

    id: str
    namespace: str
    position: Position | None
    receivers: int
    is_repeat: bool = False
    fanout: FanoutReport | None = None
    pending: bool = False
    confirmation: Confirmation | None = None

    @property
    def is_logged(self) -> bool:
        """Whether the log has accepted it. If not, every replica has applied it by HTTP."""
        return self.position is not None


def checked_receipt_seconds(given: Any, default: float) -> float:
    """Return how long the id of an invalidation is remembered: `given`, unless it is None. Raises: InvalidSettings."""
    if given is None:
        return default
    if not isinstance(given, Real) or not math.isfinite(given):
        raise InvalidSettings(f"expected receipt_seconds to be a finite number of seconds or None, got {given!r:.100}")
    return float(given)
