"""The errors that the user's mapping raises: counted, and logged once per spell."""

import logging
import math
import threading
from types import TracebackType
from typing import Final

from cachetools import Cache

from ...shared.clock import Clock

__all__ = ["MappingErrors", "is_refusal"]

_log = logging.getLogger("broadcache.subscriber")

_QUIET_SECONDS: Final = 60.0
"""A spell of errors ends after this long without one. The next error is logged again."""


class MappingErrors:
    """Counts the errors of one cache's mapping. The log never shows an error's text, a key or a value."""

    def __init__(self, mapping: object, clock: Clock) -> None:
        self.count: int = 0
        self._mapping_type = type(mapping).__qualname__
        self._clock = clock
        self._lock = threading.Lock()
        self._last_at = -math.inf

    def start_over(self) -> None:
        """Count from 0, with a lock of its own: in a forked child."""
        self.count = 0
        self._lock = threading.Lock()

    def report(self, error: Exception, doing: str) -> None:
        """Count an error, and log it if it is the first of its spell. May be called from any thread.

        Shape: `doing` is what failed and how the cache handled it: "applying an invalidation: the cache was cleared".
        """
        now = self._clock()
        with self._lock:
            self.count += 1
            is_first = now - self._last_at > _QUIET_SECONDS
            self._last_at = now
        if is_first:
            _log.error(
                "a local cache's mapping (%s) raised %s in %s while %s. Expected a mapping that raises only "
                "KeyError for absent keys and ValueError for values too large: fix it, its getsizeof or its timer. "
                "Further errors are only counted, in stats().mapping_errors, until none has come for %d seconds",
                self._mapping_type,
                type(error).__qualname__,
                _place_of(error.__traceback__),
                doing,
                _QUIET_SECONDS,
            )


def is_refusal(error: ValueError) -> bool:
    """Whether a mapping raised `error` to refuse a value as too large.

    Of a cachetools mapping only its own "value too large" is a refusal. Any other ValueError is a mistake of its
    `getsizeof`, which may raise one or return a negative size, or of another method that a store calls.
    """
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is Cache.__setitem__.__code__:
            return trace.tb_next is None and error.args == ("value too large",)
        trace = trace.tb_next
    return True


def _place_of(trace: TracebackType | None) -> str:
    """Return where an error was raised: the function, and its line."""
    if trace is None:
        return "an unknown place"
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return f"{code.co_qualname} ({code.co_filename}:{trace.tb_lineno})"
