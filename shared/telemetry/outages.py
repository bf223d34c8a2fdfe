"""Outages in the log of a process: one line when one begins, and one when it ends, however many attempts fail."""

import logging
import math
from collections.abc import Sequence
from typing import Final

from ..clock import Clock
from ..errors import BroadcacheError

__all__ = ["Outages", "shown"]

_NAMES_SHOWN_MAX: Final = 3


class Outages:
    """The outages of something that has several parts, e.g. links: an outage lasts until no part of it fails any more.

    An error that is none of ours is logged with its traceback, once for each place in the code during an outage.

    Shape:  `began` and `ended` are the first words of the two lines.
    Units:  a part that has not been tried for `forgotten_after_seconds` counts as if it did not fail.
    """

    def __init__(
        self,
        logger: logging.Logger,
        *,
        clock: Clock,
        began: str,
        ended: str,
        forgotten_after_seconds: float = math.inf,
    ) -> None:
        self._logger = logger
        self._clock = clock
        self._began = began
        self._ended = ended
        self._forgotten_after_seconds = forgotten_after_seconds
        self._began_at = 0.0
        # When each part failed last, and how many namespaces each has that has failed since the outage began.
        self._failing: dict[str, float] = {}
        self._namespaces: dict[str, int] = {}
        self._attempts = 0
        self._shown: set[tuple[object, ...]] = set()

    def record_failure(self, part: str, error: Exception, *, namespaces_count: int = 1) -> None:
        """Record that an attempt failed; log it if it is the first of an outage."""
        now = self._clock()
        self._forget_old(now)
        is_first = not self._failing
        if is_first:
            self._began_at, self._attempts = now, 0
            self._namespaces, self._shown = {}, set()
        self._failing[part] = now
        self._namespaces[part] = namespaces_count
        self._attempts += 1
        if not isinstance(error, BroadcacheError) and (place := _place_of(error)) not in self._shown:
            self._shown.add(place)
            self._logger.error("%s: an error in broadcache, please report it", self._began, exc_info=error)
        else:
            level = logging.WARNING if is_first else logging.DEBUG
            also = f" ({namespaces_count} namespaces)" if namespaces_count > 1 else ""
            self._logger.log(level, "%s%s: %s", self._began, also, error)

    def record_success(self, part: str) -> None:
        """Record that an attempt succeeded; log it if it ends an outage."""
        if self._failing and self._failing.pop(part, None) is not None:
            self._end_if_over()

    def forget(self, part: str) -> None:
        """Take a part out of the outage: it is not tried any more."""
        self._failing.pop(part, None)

    def _forget_old(self, now: float) -> None:
        for part, failed_at in tuple(self._failing.items()) if self._forgotten_after_seconds < math.inf else ():
            if now - failed_at > self._forgotten_after_seconds:
                del self._failing[part]

    def _end_if_over(self) -> None:
        now = self._clock()
        self._forget_old(now)
        if not self._failing:
            self._logger.info(
                "%s after %.1f s: %d failed attempts, %d namespaces",
                self._ended,
                now - self._began_at,
                self._attempts,
                sum(self._namespaces.values()),
            )


def shown(namespaces: Sequence[str]) -> str:
    """Return a text with some of the namespaces, and their number."""
    if len(namespaces) == 1:
        return f"namespace {namespaces[0]}"
    names, more = ", ".join(namespaces[:_NAMES_SHOWN_MAX]), len(namespaces) - _NAMES_SHOWN_MAX
    return f"{len(namespaces)} namespaces ({names}{f' and {more} more' if more > 0 else ''})"


def _place_of(error: Exception) -> tuple[object, ...]:
    """Return what an error has in common with the same error of the next attempt."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (type(error), trace and trace.tb_frame.f_code, trace and trace.tb_lineno)
