"""The sequencer: applies all that arrives for one namespace, and knows up to where the log has been applied."""

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from ...shared.confirmation import Report
from ...shared.errors import MalformedFrame
from ...shared.invalidation import Anchor, Everything, Invalidation, Position
from ...shared.telemetry.tracing import trace_applied
from ...shared.transport.redis.log import Entry
from ...shared.wire import decode, digest_of
from ..cache.local_cache import LocalCache
from .lag import Lag

__all__ = ["Mark", "Sequencer"]

_log = logging.getLogger("broadcache.subscriber")

_REPORTS_MAX: Final = 10_000
"""How many reports are kept until they are taken. What is more is not confirmed, and shows as missing."""


class Mark(NamedTuple):
    """The live position at one moment, and what stands there: the frame, or its digest; None when it is not known."""

    epoch: str | None
    sequence: int
    content: bytes | str | None

    @property
    def digest(self) -> str | None:
        """The digest of what stands there."""
        return digest_of(self.content) if isinstance(self.content, bytes) else self.content

    @property
    def anchor(self) -> Anchor | None:
        """The same with its digest; None when no log is known."""
        return None if self.epoch is None else Anchor(self.epoch, self.sequence, self.digest)


class _Run(NamedTuple):
    """Frames that came beyond a gap, without another gap between them. `content` is the last of them."""

    first: int
    last: int
    content: bytes


class Sequencer:
    """Position, counters and caches of one namespace. It does no I/O and knows no time.

    Whatever arrives is applied, at once and whatever its number: it costs a load at most. Numbers decide about the
    *position* alone, that is, from where on the log has to be read after a loss.

    The live position is tentative: any client with the right to publish on the channel can move it. The owner asks the
    log for its head, compares it with the live position of the moment (`compare`), and so proves it (`prove`). Only the
    proven position is told to others, and only from there is the log read again over a new subscription (`rewind`).

    When something was missed the sequencer is *behind*: the owner reads the log from the live position on, and hands
    over what stands there (`replay`). Until then the log alone moves the position: a gap that messages fill may be
    filled by forged ones. What the log no longer holds is missed for good, and everything is dropped.

    Shape: `counts` has `applied` and `malformed`: messages by what became of them. Of those that were applied,
           `duplicate` had a number that was not above the position, `foreign` were of another epoch, `unsequenced` had
           none, and `replayed` were read from the log. `gaps` is how often it fell behind, `unlogged` how often a frame
           claimed a position that the log did not have. What was posted is counted by the owner. `reports` has what is
           to be confirmed, each with the time it was sent at, for the owner to take.
    """

    def __init__(self, namespace: str, caches: Sequence[LocalCache]) -> None:
        self.namespace: Final = namespace
        self.caches = tuple(caches)
        self.counts: Counter[str] = Counter()
        # The live position, in fields of its own: comparing them is most of what a message costs beside its apply.
        self._epoch: str | None = None
        self._sequence = 0
        self._content: bytes | str | None = None
        self._proven: Anchor | None = None
        # Whether the log has to be read from the position on. Until that is done, nothing else moves the position.
        self._is_behind = False
        # The highest sequence that a head has told, which the log must have, and the frames that came beyond a gap.
        self._head_sequence = 0
        self._run: _Run | None = None
        self._has_warned_of_numbers = False
        self.reports: deque[tuple[Report, int | None]] = deque(maxlen=_REPORTS_MAX)
        # How late invalidations are applied, once it is asked for.
        self.lag: Lag | None = None

    @property
    def position(self) -> Position | None:
        """The live position: that of the last invalidation applied in the order of the log; None when no log is known.

        It is not proven to be of the log: `proven` is.
        """
        return None if self._epoch is None else Position(self._epoch, self._sequence)

    @property
    def sequence(self) -> int:
        """The sequence of the live position."""
        return self._sequence

    @property
    def proven(self) -> Anchor | None:
        """The newest position up to which the log is proven to be applied; None before the first proof."""
        return self._proven

    @property
    def is_behind(self) -> bool:
        """Whether the log has to be read from the live position on: it has, or may have, what was missed."""
        return self._is_behind

    @property
    def backlog(self) -> int:
        """How many invalidations have to be read from the log, as far as that is known."""
        if self._run is not None:
            return self._run.first - self._sequence - 1
        return max(0, self._head_sequence - self._sequence)

    @property
    def claimed(self) -> int:
        """The highest sequence that any frame, or a head, has claimed so far."""
        return max(self._sequence, self._head_sequence, self._run.last if self._run else 0)

    def mark(self) -> Mark:
        """Return the live position of this moment, with what stands there."""
        return Mark(self._epoch, self._sequence, self._content)

    # --- beginning, and beginning again -------------------------------------------------------------------------------

    def rewind(self) -> None:
        """Go back to the proven position. To be called before each new subscription."""
        self._move_to(self._proven)

    def resume(self, head: Anchor | None, *, is_same_server: bool) -> str | None:
        """Go on from the proven position, now that a new subscription stands and `head` was read after it.

        Returns: None when the log can tell what was missed, which `is_behind` then says; otherwise why it cannot, and
                 the owner has to `restart`.
        """
        proven = self._proven
        if proven is None:
            return "subscribed"
        if not is_same_server:
            return "server changed"  # it may have lost what was accepted, or have given out a sequence twice
        if head is None:
            return "log lost"
        reason = self._differs(proven, head)
        if reason is None and proven.digest is None:
            return "digest unknown"  # another frame may have taken its place meanwhile
        if reason is None:
            # What has come meanwhile may fill the gap with forged numbers: it counts from the proven place on. And the
            # log is looked into in any case: the head alone may have been counted back by a foreign hand.
            self._go_back(Mark(*proven), head)
        return reason

    def compare(self, mark: Mark, head: Anchor) -> str | None:
        """Compare the live position with the head, both as of one moment: when the probe of an echo was handled.

        Returns: as `resume` does.
        """
        anchor = mark.anchor
        if anchor is None:
            # This subscription began by dropping everything, without a log. All of what was accepted since has come.
            self._move_to(head)
            return None
        reason = self._differs(anchor, head)
        if reason is None and anchor.sequence < head.sequence:
            self._go_back(mark, head)  # likewise
        return reason

    def _go_back(self, mark: Mark, head: Anchor) -> None:
        """Be behind `head` from an earlier place on."""
        self._epoch, self._sequence, self._content = mark
        self._is_behind = True
        self._run = None
        self._head_sequence = head.sequence
        if mark.sequence < head.sequence:
            self.counts["gaps"] += 1

    def prove(self, mark: Mark, head: Anchor) -> None:
        """Take note that everything up to `head` has been applied: `compare` found it so, or the log was read since."""
        digest = head.digest
        for ours in (mark, self.mark()) if digest is None else ():
            if ours.sequence == head.sequence:
                digest = ours.digest
        self._proven = head._replace(digest=digest)

    def _differs(self, ours: Anchor, head: Anchor) -> str | None:
        if head.epoch != ours.epoch:
            return "epoch changed"
        if head.sequence < ours.sequence:
            return "log went back"
        if head.contradicts(ours):
            return "another history"
        if head.digest is None and not self._has_warned_of_numbers:
            self._has_warned_of_numbers = True
            _log.warning(
                "the head of namespace %s was moved by a writer that keeps no digest of it: positions are compared by "
                "their numbers alone; expected every publisher to have one version, upgrade the older ones",
                self.namespace,
            )
        return None

    def restart(self, head: Anchor | None, reason: str) -> None:
        """Drop everything and take `head` as the position, proven by that: what came before it no longer matters."""
        self._proven = head
        self._move_to(head)
        self.clear(reason)

    def _move_to(self, anchor: Anchor | None) -> None:
        self._epoch, self._sequence, self._content = anchor or (None, 0, None)
        self._is_behind = False
        self._head_sequence = 0
        self._run = None

    def clear(self, reason: str, why: str = "") -> None:
        """Drop everything. `reason` is what the caches count it under, `why` what is logged beside it."""
        self._log_clear(reason, why)
        for cache in self.caches:
            cache.apply(Everything(), reason=reason)

    def _log_clear(self, reason: str, why: str) -> None:
        level = logging.INFO if reason == "subscribed" else logging.WARNING
        _log.log(level, "cleared namespace %s: %s", self.namespace, why or reason)

    # --- what arrives -------------------------------------------------------------------------------------------------

    def receive(self, frame: bytes) -> bool:
        """Take one frame off the channel; return whether it needs attention: a sweep, or a look into the log."""
        try:
            invalidation = decode(frame, self.namespace)
        except MalformedFrame as error:
            self._forget_malformed(error)
            return True
        if invalidation.confirm or invalidation.traceparent or self.lag is not None:
            self._apply(invalidation, frame)
        else:  # the same without a second look: nearly all messages go this way
            for cache in self.caches:
                cache.apply_invalidation(invalidation)
            self.counts["applied"] += 1
        # Only now, when every cache has applied it.
        sequence = invalidation.seq
        if sequence is None:
            self.counts["unsequenced"] += 1
        elif sequence == self._sequence + 1 and invalidation.epoch == self._epoch and not self._is_behind:
            self._sequence = sequence
            self._content = frame
        else:
            self._place(invalidation.epoch, sequence, frame)
        return bool(
            invalidation.everything
            or invalidation.prefixes
            or invalidation.tags
            or invalidation.confirm
            or self._is_behind
        )

    def replay(self, entries: Sequence[Entry], *, claimed: int, is_end: bool) -> bool:
        """Apply the entries of the log from the live position on, that place included.

        Shape:   `claimed` is what the property was before the log was asked. `is_end` is whether the log had no entry
                 after these.
        Returns: whether the log continues the history of the position: the same stands there, and what follows is
                 readable and without a hole. If not, the owner has to `restart`.
        """
        start, following = self.mark(), list(entries)
        if start.sequence:
            if not following or following[0].sequence != start.sequence:
                return False
            own = following.pop(0)
            if start.digest not in (None, own.digest):
                return False
        is_proven = start.anchor is not None and start.anchor == self._proven
        for entry in following:
            # What another writer put there has no say in the position: the real entry of that sequence may yet come.
            invalidation = entry.invalidation
            if invalidation is None or invalidation.position != (self._epoch, entry.sequence):
                return False
            if entry.sequence != self._sequence + 1:
                return False
            self._apply(invalidation, entry.frame)
            self.counts["replayed"] += 1
            self._sequence, self._content = entry.sequence, entry.frame
        if is_proven and following:
            # Read from the log itself, and behind what was proven: it need not be read again over another link.
            self._proven = self.mark().anchor
        return self._go_on(claimed, is_end=is_end)

    def _go_on(self, claimed: int, *, is_end: bool) -> bool:
        """End the replay if it has reached what was missed; return whether the log can be whole."""
        has_reached_head = self._sequence >= self._head_sequence
        if is_end and not has_reached_head:
            return False
        run = self._run
        if run is not None and run.first <= self._sequence + 1 and has_reached_head:
            if run.last > self._sequence:
                self._sequence, self._content = run.last, run.content
            self._run, self._is_behind = None, False
        elif is_end and (run is None or run.last <= claimed):
            # A frame claimed a place that the log did not have when it was read afterwards. It has been applied.
            if run is not None:
                self.counts["unlogged"] += 1
            self._run, self._is_behind = None, False
        return True

    def apply_own(self, invalidation: Invalidation) -> None:
        """Apply an invalidation of this replica's own before it is published. It is applied again when it comes back:
        what was loaded in between may have been read before it was accepted.
        """
        for cache in self.caches:
            cache.apply_invalidation(invalidation)

    # --- what is posted, from any thread ------------------------------------------------------------------------------

    def apply_posted(self, invalidation: Invalidation) -> int:
        """Apply an invalidation that was posted; return how many entries were dropped (`LocalCache.apply_counted`).

        It has no say in the position, and when it comes over the channel as well it is applied again: only the log
        knows which of the two is the later one.
        """
        began_at_ns = time.time_ns() if invalidation.traceparent else 0
        dropped = sum([cache.apply_counted(invalidation) for cache in self.caches])
        if began_at_ns:
            trace_applied(invalidation, began_at_ns)
        return dropped

    def clear_posted(self, reason: str, why: str) -> int:
        """Drop everything, as `clear` does, because of what was posted; return how many entries there were."""
        self._log_clear(reason, why)
        return sum([cache.apply_counted(Invalidation(everything=True), reason=reason) for cache in self.caches])

    # -----------------------------------------------------------------------------------------------------------------

    def _apply(self, invalidation: Invalidation, frame: bytes) -> None:
        self.counts["applied"] += 1
        began_at_ns = time.time_ns() if invalidation.traceparent else 0
        if invalidation.confirm:
            self._apply_confirmed(invalidation, frame)
        else:
            for cache in self.caches:
                cache.apply_invalidation(invalidation)
        if self.lag is not None:
            self.lag.record(invalidation.sent_at_ms)
        if began_at_ns:
            trace_applied(invalidation, began_at_ns)

    def _apply_confirmed(self, invalidation: Invalidation, frame: bytes) -> None:
        """Apply, and count what is dropped, which costs a little more."""
        dropped = sum([cache.apply_counted(invalidation) for cache in self.caches])
        # The sweep has still to find what a prefix names, or a tag of many entries.
        is_counted = not invalidation.prefixes and not (
            invalidation.tags and any(c.has_sweep_work for c in self.caches)
        )
        report = Report(
            id=invalidation.id,
            epoch=invalidation.epoch,
            seq=invalidation.seq,
            digest=digest_of(frame),
            dropped=dropped if is_counted else None,
        )
        self.reports.append((report, invalidation.sent_at_ms))

    def _place(self, epoch: str | None, sequence: int, frame: bytes) -> None:
        """Decide what a frame that was applied, and does not simply follow the last one, does to the position."""
        if epoch != self._epoch:
            # Another log, a thawed primary or a forger: the head tells with the next echo.
            self.counts["foreign"] += 1
        elif sequence <= self._sequence:
            self.counts["duplicate"] += 1
        else:
            # The log tells what belongs in between; until then these wait. A forged one in their midst costs a look.
            if not self._is_behind:
                self.counts["gaps"] += 1
            self._is_behind = True
            run = self._run
            is_next = run is not None and sequence == run.last + 1
            self._run = _Run(run.first if run is not None and is_next else sequence, sequence, frame)

    def _forget_malformed(self, error: MalformedFrame) -> None:
        self.counts["malformed"] += 1
        self.clear("malformed", str(error))
