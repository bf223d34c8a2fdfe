"""The sequencer: takes what arrives for one namespace, applies it in order and once, and clears when in doubt."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Final

from ..shared.errors import MalformedFrame
from ..shared.invalidation import Everything, Invalidation, Position
from ..shared.wire import decode
from .local_cache import LocalCache

__all__ = ["Sequencer"]

_log = logging.getLogger("broadcache.subscriber")

_BEFORE_THE_FIRST: Final = Position("", 0)
_OWN_IDS_MAX: Final = 10_000


class Sequencer:
    """Position, counters and caches of one namespace. It does no I/O and knows no time.

    Shape: `counts` has `applied`, `duplicate`, `own`, `unsequenced`, `malformed` (messages by what became of them).
    """

    def __init__(self, namespace: str, caches: Sequence[LocalCache]) -> None:
        self.namespace: Final = namespace
        self.caches: Final = tuple(caches)
        self.counts: Counter[str] = Counter()
        self._position: Position | None = None
        self._is_recovering = True
        self._own_ids: dict[str, None] = {}
        self._clears = 0

    @property
    def position(self) -> Position | None:
        """The position of the last invalidation that was applied; None before anything is known of the log."""
        return self._position if self._position != _BEFORE_THE_FIRST else None

    def begin_recovery(self) -> None:
        """A new subscription begins: nothing is known of what was published before it."""
        self._is_recovering = True
        self._position = None

    def recover(self, head: Position | None) -> bool:
        """Begin at `head`, read after the subscription was confirmed, with empty caches.

        Returns: false when messages of another epoch have arrived meanwhile, so that the head has to be read again.
        """
        head = head or _BEFORE_THE_FIRST
        seen = self._position
        if seen is not None and seen.epoch != head.epoch:
            self._position = None
            return False
        self._position = head if seen is None else max(head, seen)
        self._is_recovering = False
        self.clear("subscribed")
        return True

    def clear(self, reason: str) -> None:
        """Drop everything. `reason` is what the caches count it under."""
        self._clears += 1
        for cache in self.caches:
            cache.apply(Everything(), reason=reason)

    def receive(self, frame: bytes) -> bool:
        """Take one frame off the channel; return whether it may have left dead entries to sweep."""
        try:
            invalidation = decode(frame, self.namespace)
        except MalformedFrame as error:
            self.counts["malformed"] += 1
            _log.warning("cleared namespace %s: %s", self.namespace, error)
            self.clear("malformed")
            return True
        clears_before = self._clears
        position = invalidation.position
        if position is None:
            self.counts["unsequenced"] += 1
        elif not self._advance(position):
            self.counts["duplicate"] += 1
            return False
        if self._is_own(invalidation.id):
            self.counts["own"] += 1
            return self._clears != clears_before
        self.counts["applied"] += 1
        for cache in self.caches:
            cache.apply(invalidation)
        return self._clears != clears_before or bool(
            invalidation.everything or invalidation.prefixes or invalidation.tags
        )

    def apply_own(self, invalidation: Invalidation) -> None:
        """Apply an invalidation of this replica's own before it is published, and skip it when it comes back."""
        self._own_ids[invalidation.id] = None
        if len(self._own_ids) > _OWN_IDS_MAX:
            del self._own_ids[next(iter(self._own_ids))]
        for cache in self.caches:
            cache.apply(invalidation)

    def _is_own(self, invalidation_id: str) -> bool:
        # The parts of a split invalidation have its id and a number.
        return bool(self._own_ids) and invalidation_id.partition(".")[0] in self._own_ids

    def _advance(self, position: Position) -> bool:
        """Move on to `position`, clearing if something was missed; return whether it is new."""
        last = self._position
        self._position = position
        if last is None or self._is_recovering:
            return True
        if position.epoch == last.epoch:
            if position.sequence == last.sequence + 1:
                return True
            if position.sequence <= last.sequence:
                self._position = last
                return False
            self._clear_gap(f"expected sequence {last.sequence + 1}, got {position.sequence}", "gap")
        elif last != _BEFORE_THE_FIRST or position.sequence != 1:
            self._clear_gap(f"expected epoch {last.epoch or 'none yet'}, got {position.epoch}", "epoch changed")
        return True

    def _clear_gap(self, text: str, reason: str) -> None:
        _log.warning("cleared namespace %s: %s", self.namespace, text)
        self.clear(reason)
