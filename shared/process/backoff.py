"""The pause before the next attempt: exponential backoff with full jitter."""

from collections.abc import Callable

__all__ = ["backoff_seconds"]

_DOUBLINGS_MAX = 32


def backoff_seconds(failures: int, *, seconds_min: float, seconds_max: float, uniform: Callable[[], float]) -> float:
    """Return how long to wait after `failures` failures, with full jitter: clients do not retry in step.

    Units:  from 0 to a ceiling that is `seconds_min` after the first failure, doubles with each further one, and
            never exceeds `seconds_max`. `uniform` returns a number from 0 to 1.
    """
    return uniform() * min(seconds_max, seconds_min * 2.0 ** min(max(0, failures - 1), _DOUBLINGS_MAX))
