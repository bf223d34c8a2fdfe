"""The sequencer: takes what arrives for one namespace, applies it in order and once, and clears when in doubt."""

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Final

from ..shared.confirmation import Outcome, Report
from ..shared.errors import MalformedFrame
from ..shared.invalidation import Everything, Invalidation, Position
from ..shared.log import Entry
from ..shared.tracing import trace_applied
from ..shared.wire import decode
from .heard import SHORT_BYTES_MAX, Heard
from .lag import Lag
from .local_cache import LocalCache

__all__ = ["Sequencer"]

_log = logging.getLogger("broadcache.subscriber")

_BEFORE_THE_FIRST: Final = Position("", 0)
_OWN_IDS_MAX: Final = 10_000
_REPORTS_MAX: Final = 10_000
"""How many reports are kept until they are taken. What is more is not confirmed, and shows as missing."""


class Sequencer:
    """Position, counters and caches of one namespace. It does no I/O and knows no time.

    When something was missed it is *behind*: it applies nothing out of order, and whoever owns it reads the log and
    hands over what was missed, until it is not behind any more. What the log no longer holds is missed for good, and
    everything is dropped.

    What is posted over HTTP is applied at once. It has no say in the position: it would hide a gap. It is remembered,
    so that it is not applied again when it comes over the channel or from the log, and the other way round.

    Shape: `counts` has `applied`, `duplicate`, `own`, `repeat`, `unsequenced`, `malformed` (messages by what became of
           them), `replayed` (those of them that were read from the log) and `gaps` (how often it fell behind). What was
           posted is counted by whoever hands it over. `reports` has what is to be confirmed, each with the time it was
           sent at, for whoever owns it to take.
    """

    def __init__(self, namespace: str, caches: Sequence[LocalCache]) -> None:
        self.namespace: Final = namespace
        self.caches = tuple(caches)
        self.counts: Counter[str] = Counter()
        # The last position, in two fields: comparing them is most of what a message costs. No epoch: nothing was seen.
        self._epoch: str | None = None
        self._sequence = 0
        # The highest sequence that is known to have been logged.
        self._ahead = 0
        self._own_ids: dict[str, None] = {}
        self._heard = Heard()
        self._note_short = self._heard.short.append
        self._posted = self._heard.posted
        self._clears = 0
        self.reports: deque[tuple[Report, int | None]] = deque(maxlen=_REPORTS_MAX)
        # How late invalidations are applied, once somebody wants to know it.
        self.lag: Lag | None = None

    @property
    def position(self) -> Position | None:
        """The position of the last invalidation that was applied; None before anything is known of the log."""
        return Position(self._epoch, self._sequence) if self._epoch else None

    @property
    def sequence(self) -> int:
        """The sequence of the last invalidation that was applied."""
        return self._sequence

    @property
    def is_behind(self) -> bool:
        """Whether invalidations after `sequence` are known to have been logged, and have not been applied."""
        return self._ahead > self._sequence

    # --- beginning, and beginning again ------------------------------------------------------------------------------

    def resume(self, head: Position | None, *, is_same_server: bool) -> str | None:
        """Go on from the last position, now that a new subscription stands and `head` was read after it.

        Returns: None when the log can tell what was missed, which `is_behind` then says; otherwise why it cannot, and
                 the owner has to `restart`.
        """
        if self._epoch is None:
            return "subscribed"
        if not is_same_server:
            return "server changed"  # it may have lost what was accepted, or have given out a sequence twice
        if head is None:
            return "log lost"  # even if there was none before: one may have come and gone meanwhile
        # What has come over the channel since `head` was read may be ahead of it. A log that went back is told by the
        # echo, which knows the position before it asked.
        return self.check(head, None)

    def check(self, head: Position | None, before: Position | None) -> str | None:
        """Compare with a `head` that was read after `position` had been `before`. Messages may have come since.

        Returns: as `resume` does.
        """
        if head is None:
            return None if before is None else "log lost"
        if head.epoch != self._epoch:
            # If it is still the epoch of before, then a message since has brought another, and has cleared.
            return None if before is not None and head.epoch == before.epoch else "epoch changed"
        if before is not None and head.epoch == before.epoch and head.sequence < before.sequence:
            return "log went back"
        self._fall_behind(head.sequence)
        return None

    def restart(self, head: Position | None, reason: str) -> None:
        """Drop everything and take `head` as the position: what came before it no longer matters."""
        self._epoch, self._sequence = head or _BEFORE_THE_FIRST
        self._ahead = 0
        self.clear(reason)

    def clear(self, reason: str, why: str = "") -> None:
        """Drop everything. `reason` is what the caches count it under, `why` what is logged beside it."""
        self._clears += 1
        self._log_clear(reason, why)
        for cache in self.caches:
            cache.apply(Everything(), reason=reason)

    def _log_clear(self, reason: str, why: str) -> None:
        level = logging.INFO if reason == "subscribed" else logging.WARNING
        _log.log(level, "cleared namespace %s: %s", self.namespace, why or reason)

    # --- what arrives ------------------------------------------------------------------------------------------------

    def receive(self, frame: bytes) -> bool:
        """Take one frame off the channel; return whether it needs attention: a sweep, or a look into the log."""
        try:
            invalidation = decode(frame, self.namespace)
        except MalformedFrame as error:
            self._forget_malformed(error)
            return True
        has_cleared = False
        sequence = invalidation.seq
        if sequence is None:
            self.counts["unsequenced"] += 1
        elif sequence == self._sequence + 1 and invalidation.epoch == self._epoch:
            self._sequence = sequence
        else:
            clears_before = self._clears
            if not self._place(Position(invalidation.epoch or "", sequence)):
                if invalidation.confirm and sequence <= self._sequence:
                    self._report(invalidation, "duplicate", None)
                return self.is_behind or bool(self.reports)
            has_cleared = self._clears != clears_before
        if self._posted or self._own_ids or invalidation.confirm:
            self._apply(invalidation)
        else:  # the same without a second look: nearly all messages go this way
            self.counts["applied"] += 1
            for cache in self.caches:
                cache.apply_invalidation(invalidation)
        if len(frame) <= SHORT_BYTES_MAX:
            self._note_short(frame)
        else:
            self._heard.note(invalidation)
        return has_cleared or bool(
            invalidation.everything or invalidation.prefixes or invalidation.tags or invalidation.confirm
        )

    def replay(self, entries: Sequence[Entry]) -> bool:
        """Take the entries of the log that follow `sequence`; return whether they do: all readable, without a hole."""
        for entry in entries:
            if entry.sequence <= self._sequence:
                continue  # it came over the channel meanwhile
            if entry.sequence != self._sequence + 1:
                return False
            invalidation = entry.invalidation
            # What somebody else wrote there has no say in the position: the real entry of that sequence may yet come.
            if invalidation is None or invalidation.position != (self._epoch, entry.sequence):
                return False
            self.counts["replayed"] += 1
            self._apply(invalidation)
            self._heard.note(invalidation)
            self._sequence = entry.sequence
        return bool(entries) or not self.is_behind

    def apply_own(self, invalidation: Invalidation) -> None:
        """Apply an invalidation of this replica's own before it is published, and skip it when it comes back."""
        self._own_ids[invalidation.id] = None
        if len(self._own_ids) > _OWN_IDS_MAX:
            del self._own_ids[next(iter(self._own_ids))]
        for cache in self.caches:
            cache.apply_invalidation(invalidation)
        self._heard.note(invalidation)

    # --- what is posted, from any thread -----------------------------------------------------------------------------

    def apply_posted(self, invalidation: Invalidation) -> int | None:
        """Apply an invalidation that was posted, unless it was applied before.

        Returns: how many entries were dropped (`LocalCache.apply_counted`); None when it was applied before.
        """
        if self._heard.has(invalidation):
            return None
        began_at_ns = time.time_ns() if invalidation.traceparent else 0
        dropped = sum(cache.apply_counted(invalidation) for cache in self.caches)
        self._heard.note_posted(invalidation)
        if began_at_ns:
            trace_applied(invalidation, began_at_ns)
        return dropped

    def clear_posted(self, reason: str, why: str) -> int:
        """Drop everything, as `clear` does, because of what was posted; return how many entries there were."""
        self._log_clear(reason, why)
        return sum(cache.apply_counted(Invalidation(everything=True), reason=reason) for cache in self.caches)

    # -----------------------------------------------------------------------------------------------------------------

    def _apply(self, invalidation: Invalidation) -> None:
        # The parts of a split invalidation have its id and a number.
        if self._own_ids and invalidation.id.partition(".")[0] in self._own_ids:
            self.counts["own"] += 1
            if invalidation.confirm:
                self._report(invalidation, "own", 0)
            return
        if self._posted and self._heard.take_posted(invalidation):
            self.counts["repeat"] += 1
            if invalidation.confirm:
                self._report(invalidation, "duplicate", None)
            return
        self.counts["applied"] += 1
        began_at_ns = time.time_ns() if invalidation.traceparent else 0
        if invalidation.confirm:
            self._apply_confirmed(invalidation)
        else:
            for cache in self.caches:
                cache.apply_invalidation(invalidation)
        if self.lag is not None:
            self.lag.note_sent(invalidation.sent_at_ms)
        if began_at_ns:
            trace_applied(invalidation, began_at_ns)

    def _apply_confirmed(self, invalidation: Invalidation) -> None:
        """Apply, and count what is dropped, which costs a little more."""
        dropped = 0
        for cache in self.caches:
            before = cache.stats()
            cache.apply_invalidation(invalidation)
            dropped += before.entries if invalidation.everything else cache.stats().dropped - before.dropped
        # The sweep has still to find what a prefix names, or a tag of many entries.
        is_counted = not invalidation.prefixes and not (
            invalidation.tags and any(c.has_sweep_work for c in self.caches)
        )
        self._report(invalidation, "applied", dropped if is_counted else None)

    def _report(self, invalidation: Invalidation, outcome: Outcome, dropped: int | None) -> None:
        report = Report(
            id=invalidation.id, epoch=invalidation.epoch, seq=invalidation.seq, outcome=outcome, dropped=dropped
        )
        self.reports.append((report, invalidation.sent_at_ms))

    def _place(self, position: Position) -> bool:
        """Decide about a position that does not follow the last one; return whether to apply it now."""
        if self._epoch is None:
            # A new subscription, whose head has not been read yet: it will be behind that head, or at it.
            return True
        if position.epoch == self._epoch:
            if position.sequence <= self._sequence:
                self.counts["duplicate"] += 1
            else:
                self._fall_behind(position.sequence)
            return False
        is_first_of_all = (self._epoch, position.sequence) == (_BEFORE_THE_FIRST.epoch, 1)
        self._epoch, self._sequence = position
        self._ahead = 0
        if not is_first_of_all:
            self.clear("epoch changed")
        return True

    def _fall_behind(self, sequence: int) -> None:
        if sequence > self._sequence and not self.is_behind:
            self.counts["gaps"] += 1
        self._ahead = max(self._ahead, sequence)

    def _forget_malformed(self, error: MalformedFrame) -> None:
        self.counts["malformed"] += 1
        self.clear("malformed", str(error))
