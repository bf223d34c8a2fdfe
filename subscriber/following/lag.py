"""How late invalidations are applied: from the publisher's clock to the replica's."""

from bisect import bisect_left
from time import time

from ...shared.telemetry.histogram import Histogram

__all__ = ["Lag"]


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
