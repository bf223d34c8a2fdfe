"""The receipt of a publish."""

from typing import NamedTuple

from .confirmation import Confirmation
from .fanout_report import FanoutReport
from .invalidation import Position

__all__ = ["Receipt"]


class Receipt(NamedTuple):
    """What became of a publish.

    Shape:  `position` is that of the last frame, when the invalidation was split; None when it is not in the log.
            `receivers` is what PUBLISH counted: connections that were subscribed, no proof that a replica applied it.
            `is_repeat` is true when this id had been logged before, and nothing was logged now.
            `fanout` is which replicas heard it by HTTP, when they were called.
            `pending` is true when it waits in the publisher's retry queue to be logged.
            `confirmation` says which replicas have applied it, if that was asked for.
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
        """Whether the log has accepted it. If not, every replica has heard it by HTTP."""
        return self.position is not None
