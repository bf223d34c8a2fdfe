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
        self._is_recovering = True
        # The last position, in two fields: comparing them is most of what a message costs. No epoch: nothing was seen.
        self._epoch: str | None = None
        self._sequence = 0
        self._own_ids: dict[str, None] = {}
        self._clears = 0

    @property
    def position(self) -> Position | None:
        """The position of the last invalidation that was applied; None before anything is known of the log."""
        return Position(self._epoch, self._sequence) if self._epoch else None

    def begin_recovery(self) -> None:
        """A new subscription begins: nothing is known of what was published before it."""
        self._is_recovering = True
        self._epoch = None

    def recover(self, head: Position | None) -> bool:
        """Begin at `head`, read after the subscription was confirmed, with empty caches.

        Returns: false when messages of another epoch have arrived meanwhile, so that the head has to be read again.
        """
        epoch, sequence = head or _BEFORE_THE_FIRST
        if self._epoch is None:
            self._epoch, self._sequence = epoch, sequence
        elif self._epoch == epoch:
            self._sequence = max(self._sequence, sequence)
        else:
            self._epoch = None
            return False
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
        sequence = invalidation.seq
        if sequence is None:
            self.counts["unsequenced"] += 1
        elif sequence == self._sequence + 1 and invalidation.epoch == self._epoch:
            self._sequence = sequence
        elif not self._advance(Position(invalidation.epoch or "", sequence)):
            self.counts["duplicate"] += 1
            return False
        if self._own_ids and self._is_own(invalidation.id):
            self.counts["own"] += 1
            return self._clears != clears_before
        self.counts["applied"] += 1
        for cache in self.caches:
            cache.apply_invalidation(invalidation)
        return self._clears != clears_before or bool(
            invalidation.everything or invalidation.prefixes or invalidation.tags
        )

    def apply_own(self, invalidation: Invalidation) -> None:
        """Apply an invalidation of this replica's own before it is published, and skip it when it comes back."""
        self._own_ids[invalidation.id] = None
        if len(self._own_ids) > _OWN_IDS_MAX:
            del self._own_ids[next(iter(self._own_ids))]
        for cache in self.caches:
            cache.apply_invalidation(invalidation)

    def _is_own(self, invalidation_id: str) -> bool:
        # The parts of a split invalidation have its id and a number.
        return invalidation_id.partition(".")[0] in self._own_ids

    def _advance(self, position: Position) -> bool:
        """Move on to a position that does not follow the last one, clearing if something was missed.

        Returns: whether it is new.
        """
        last = Position(self._epoch or "", self._sequence)
        is_known = self._epoch is not None and not self._is_recovering
        if is_known and position.epoch == last.epoch and position.sequence <= last.sequence:
            return False
        self._epoch, self._sequence = position
        if not is_known:
            return True
        if position.epoch == last.epoch:
            self._clear_gap(f"expected sequence {last.sequence + 1}, got {position.sequence}", "gap")
        elif last != _BEFORE_THE_FIRST or position.sequence != 1:
            self._clear_gap(f"expected epoch {last.epoch or 'none yet'}, got {position.epoch}", "epoch changed")
        return True

    def _clear_gap(self, text: str, reason: str) -> None:
        _log.warning("cleared namespace %s: %s", self.namespace, text)
        self.clear(reason)
