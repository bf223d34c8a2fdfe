"""Pages of the log, and filters for its entries."""

from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from ...shared.invalidation import Invalidation
from ...shared.transport.redis.log import Entry

__all__ = ["EXAMINED_MAX", "Filter", "HistoryPage", "read_page"]

EXAMINED_MAX: Final = 10_000
"""How many entries one page examines: as many as a log keeps by default."""
_PAGE_ENTRIES: Final = 100
"""How many entries are read at once: publishes share the connection, and wait behind each read."""


class HistoryPage(NamedTuple):
    """Entries, the newest first. The next page begins before `next_before`; None when the log has been read."""

    entries: list[Entry]
    next_before: int | None
    examined: int


class Filter(NamedTuple):
    """Selects entries. Unreadable ones always match: replicas drop everything for them, and their time is unknown.

    Units:  `since_ms` is compared with the time of sending by the publisher's clock, in milliseconds.
    """

    key: str | None = None
    since_ms: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether every entry matches."""
        return self.key is None and self.since_ms is None

    def __call__(self, entry: Entry) -> bool:
        """Whether this entry matches."""
        invalidation = entry.invalidation
        if invalidation is None:
            return True
        sent_at_ms = invalidation.sent_at_ms
        if self.since_ms is not None and sent_at_ms is not None and sent_at_ms < self.since_ms:
            return False
        return self.key is None or _concerns(invalidation, self.key)


async def read_page(
    read: Callable[[int, int | None], Awaitable[list[Entry]]],
    is_wanted: Filter,
    *,
    count: int,
    before: int | None,
    examined_max: int,
) -> HistoryPage:
    """Search the log, backwards from `before`, for up to `count` wanted entries.

    Shape:  `read(count, before)` returns the newest `count` entries below `before`; fewer, when there are no more.
    """
    found: list[Entry] = []
    examined = 0
    # One more than `count` shows whether another page follows.
    while len(found) <= count:
        room = min(_PAGE_ENTRIES, examined_max - examined)
        if is_wanted.is_empty:
            room = min(room, count + 1 - len(found))
        if room <= 0:
            return HistoryPage(found, before, examined)
        entries = await read(room, before)
        for entry in entries:
            examined += 1
            before = entry.sequence
            if is_wanted(entry):
                found.append(entry)
                if len(found) > count:
                    break
        else:
            if len(entries) < room:
                return HistoryPage(found, None, examined)
    return HistoryPage(found[:count], found[count - 1].sequence if count else before, examined)


def _concerns(invalidation: Invalidation, key: str) -> bool:
    return invalidation.everything or key in invalidation.keys or key.startswith(invalidation.prefixes)
