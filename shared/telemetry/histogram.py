"""A histogram that any metrics library can export. Observing a value takes a few hundred nanoseconds."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

__all__ = ["LATENCY_SECONDS_BOUNDS", "Histogram"]

LATENCY_SECONDS_BOUNDS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""From the latency of a local network to the length of an outage."""


class Histogram:
    """Counts of the values up to each bound, and the sum of all values.

    Another thread may read it while it is filled: sum and buckets may then differ by a value.
    """

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: Sequence[float] = LATENCY_SECONDS_BOUNDS) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.total: float = 0.0

    def observe(self, value: float) -> None:
        """Count one value, which must not be negative."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Return pairs (upper bound as Prometheus writes it, number of values up to it)."""
        count, buckets = 0, []
        for bound, of_bound in zip((*map(str, self._bounds), "+Inf"), self._counts.copy(), strict=True):
            count += of_bound
            buckets.append((bound, float(count)))
        return buckets
