"""The receipt of a publish."""

from typing import NamedTuple

from .confirmation import Confirmation
from .fanout_report import FanoutReport
from .invalidation import Position

__all__ = ["Receipt"]


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
