"""The pause before the next attempt: exponential backoff with full jitter."""

from collections.abc import Callable
from typing import Final, NamedTuple

__all__ = ["Backoff"]

_DOUBLINGS_MAX: Final = 32


class Backoff(NamedTuple):
    """How long a client waits after failures, with full jitter: clients do not retry in step.

    Units:  the ceiling of a pause is `seconds_min` after the first failure, doubles with each further one, and never
            exceeds `seconds_max`.
    """

    seconds_min: float
    seconds_max: float

    def seconds(self, failures: int, uniform: Callable[[], float]) -> float:
        """Return the pause after `failures` failures, from 0 to its ceiling. `uniform` returns a number from 0 to 1."""
        doublings = min(max(0, failures - 1), _DOUBLINGS_MAX)
        return uniform() * min(self.seconds_max, self.seconds_min * 2.0**doublings)
