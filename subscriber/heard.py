"""What one namespace has heard lately: how an invalidation that comes over Redis and over HTTP is applied once."""

import threading
from collections import deque
from typing import Final, NamedTuple

import msgspec

from ..shared.invalidation import Invalidation
from ..shared.wire import decode

__all__ = ["SHORT_BYTES_MAX", "Heard"]

SHORT_BYTES_MAX: Final = 512
"""The longest frame that is remembered as it came, which costs least; of longer ones a mark is kept."""
_CHANNEL_MAX: Final = 1_024
"""How many are remembered. Four times as many would make each message cost 5 % more: they no longer fit in the cache of
a processor core."""
_POSTED_MAX: Final = 10_000


class _Mark(NamedTuple):
    """What tells one invalidation from another: small, however many targets it names."""

    id: str
    sent_at_ms: int | None
    targets: int


class Heard:
    """The invalidations that were applied lately, by the way they came. Bounded; what is forgotten is applied again.

    Whoever applies an invalidation notes it *afterwards*. So nobody skips what another thread is still doing. Two
    threads that have it at the same time both apply it: that costs a load, the other mistake would be a stale value.

    Skipping what was applied before is right. It had been published by then, and before that the source had changed.
    Entries of before were dropped, and loads under way voided; a load that began later has seen the change. That holds
    whatever has happened to the position in between.

    What has the id of another but other targets, or was sent at another time, is not the same: an id may come again
    when its owner uses it again. One that does not say when it was sent is told by its id and targets alone.
    """

    def __init__(self) -> None:
        # What came over the channel or from the log. Noting is on the path of every message: whoever reads a short
        # frame appends it here as it is, and only a question has it read again.
        self.short: Final[deque[bytes]] = deque(maxlen=_CHANNEL_MAX)
        self._long: Final[deque[_Mark]] = deque(maxlen=_CHANNEL_MAX)
        # What was posted, and has not come over the channel yet.
        self.posted: Final[dict[str, _Mark]] = {}
        self._lock = threading.Lock()

    def note(self, invalidation: Invalidation) -> None:
        """Remember one that came over the channel in a long frame, or from the log, and has been applied."""
        self._long.append(_mark_of(invalidation))

    def note_posted(self, invalidation: Invalidation) -> None:
        """Remember one that was posted, and has been applied."""
        if not invalidation.id:
            return
        with self._lock:
            self.posted.pop(invalidation.id, None)
            self.posted[invalidation.id] = _mark_of(invalidation)
            if len(self.posted) > _POSTED_MAX:
                del self.posted[next(iter(self.posted))]

    def has(self, invalidation: Invalidation) -> bool:
        """Whether this one, which was posted, has been applied before, whichever way it came."""
        if not invalidation.id:
            return False
        asked = _mark_of(invalidation)
        posted = self.posted.get(asked.id)
        if posted is not None and _is_same(posted, asked):
            return True
        return any(_is_same(heard, asked) for heard in self._long.copy()) or self._is_in_short_frames(asked)

    def _is_in_short_frames(self, asked: _Mark) -> bool:
        # An id that somebody wrote with escapes of his own is not found: it is applied again, which is harmless.
        id_as_written = msgspec.json.encode(asked.id)
        frames = self.short.copy()
        if id_as_written not in b"".join(frames):  # one search is far cheaper than thousands
            return False
        return any(id_as_written in frame and _is_same(_mark_of(decode(frame, None)), asked) for frame in frames)

    def take_posted(self, invalidation: Invalidation) -> bool:
        """Whether this one, which came over the channel or from the log, was posted before; that is then forgotten.

        So each one that was posted spares one that is published, and no other that is given its id later.
        """
        mark = self.posted.get(invalidation.id)
        if mark is None or not _is_same(mark, _mark_of(invalidation)):
            return False
        with self._lock:
            self.posted.pop(invalidation.id, None)
        return True


def _mark_of(invalidation: Invalidation) -> _Mark:
    targets = (invalidation.keys, invalidation.tags, invalidation.prefixes, invalidation.everything)
    return _Mark(invalidation.id, invalidation.sent_at_ms, hash(targets))


def _is_same(one: _Mark, other: _Mark) -> bool:
    is_same_time = one.sent_at_ms == other.sent_at_ms or None in (one.sent_at_ms, other.sent_at_ms)
    return is_same_time and (one.id, one.targets) == (other.id, other.targets)
