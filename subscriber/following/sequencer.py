"""The sequencer: applies the messages of one namespace, and tracks the position up to which its log is applied."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from ...shared.confirmation import Report
from ...shared.errors import MalformedFrame
from ...shared.invalidation import Anchor, Everything, Invalidation, Position
from ...shared.telemetry.tracing import trace_applied
from ...shared.transport.redis.log import Entry
from ...shared.wire import decode, digest_of
from ..cache.local_cache import LocalCache
from .state import Lag

__all__ = ["Mark", "Sequencer"]

_log = logging.getLogger("broadcache.subscriber")

_REPORTS_MAX: Final = 10_000
"""How many reports are kept for the owner. Beyond that the oldest are dropped, and show as missing."""


class Mark(NamedTuple):
    """The live position at one moment, and its content: the frame there, or its digest; None when it is not known."""

    epoch: str | None
    sequence: int
    content: bytes | str | None

    @property
    def digest(self) -> str | None:
        """The digest of the content."""
        return digest_of(self.content) if isinstance(self.content, bytes) else self.content

    @property
    def anchor(self) -> Anchor | None:
        """The position with its digest; None when no log is known."""
        return None if self.epoch is None else Anchor(self.epoch, self.sequence, self.digest)


class _Run(NamedTuple):
    """Consecutive frames that arrived beyond a gap. `content` is the last of them."""

    first: int
    last: int
    content: bytes


class Sequencer:
    """Position, counters and caches of one namespace. It does no I/O and reads no clock.

    Every message is applied at once, whatever its sequence: that costs a load at most. Sequences decide only about the
    *position*: where the log has to be read from after a loss.

    The live position is tentative: any client with the right to publish on the channel can move it. The owner reads
    the head of the log, compares it with the live position of that moment (`compare`), and so proves it (`prove`). Only
    the proven position is published, and a new subscription reads the log from there (`rewind`).

    When it has missed a message the sequencer is *behind*: the owner reads the log from the live position on, and
    passes the entries in (`replay`). Until then only the log moves the position: messages that fill a gap may be
    forged. If the log no longer has what was missed, everything is dropped.

    Shape: `counts` has `applied` and `malformed`: messages by outcome. Of those applied, `duplicate` had a sequence not
           above the position, `foreign` had another epoch, `unsequenced` had no sequence, and `replayed` were read from
           the log. `gaps` is how often it fell behind, `unlogged` how often a frame claimed a position that the log did
           not have. The owner counts posted messages. `reports` has the reports to send, each with the time of sending
           of its invalidation, for the owner to remove.
    """

    def __init__(self, namespace: str, caches: Sequence[LocalCache]) -> None:
        self.namespace: Final = namespace
        self.caches: tuple[LocalCache, ...] = tuple(caches)
        self._counts: Counter[str] = Counter()
        self._applied = 0  # beside the others: adding to a Counter takes as long as recording a key
        # The live position, in separate fields: comparing them is most of a message's cost besides its apply.
        self._epoch: str | None = None
        self._sequence = 0
        self._content: bytes | str | None = None
        self._proven: Anchor | None = None
        # Whether the log has to be read from the position on. Until then, nothing else moves the position.
        self._is_behind = False
        # The sequence of the newest head, which the log must have, and the frames that arrived beyond a gap.
        self._head_sequence = 0
        self._run: _Run | None = None
        self._has_warned_of_numbers = False
        self.reports: deque[tuple[Report, int | None]] = deque(maxlen=_REPORTS_MAX)
        # Called with the namespace and the reason of each clear, to log those of many namespaces together.
        self.on_clear: Callable[[str, str], None] | None = None
        # How late invalidations are applied, if that is measured.
        self.lag: Lag | None = None

    @property
    def counts(self) -> Counter[str]:
        """The counters of this moment, from any thread."""
        counts = self._counts.copy()
        if self._applied:
            counts["applied"] = self._applied
        return counts

    @property
    def position(self) -> Position | None:
        """The live position: that of the last invalidation applied in the order of the log; None when no log is known.

        It is not proven to be in the log: `proven` is.
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
        """Whether the log has to be read from the live position on, because messages were, or may have been, missed."""
        return self._is_behind

    @property
    def backlog(self) -> int:
        """How many invalidations have to be read from the log, as far as is known."""
        if self._run is not None:
            return self._run.first - self._sequence - 1
        return max(0, self._head_sequence - self._sequence)

    @property
    def claimed(self) -> int:
        """The highest sequence that a frame or a head has claimed so far."""
        return max(self._sequence, self._head_sequence, self._run.last if self._run else 0)

    def mark(self) -> Mark:
        """Return the live position of this moment, with its content."""
        return Mark(self._epoch, self._sequence, self._content)

    # --- resuming and restarting --------------------------------------------------------------------------------------

    def rewind(self) -> None:
        """Go back to the proven position. To be called before each new subscription."""
        self._move_to(self._proven)

    def resume(self, head: Anchor | None, *, is_same_server: bool) -> str | None:
        """Continue from the proven position over a new subscription; `head` was read after subscribing.

        Returns: None when the log may have what was missed, which `is_behind` shows; otherwise the reason why it does
                 not, and the owner has to `restart`.
        """
        proven = self._proven
        if proven is None:
            return "subscribed"
        if not is_same_server:
            return "server changed"  # it may have lost accepted invalidations, or have used a sequence twice
        if head is None:
            return "log lost"
        reason = self._differs(proven, head)
        if reason is None and proven.digest is None:
            return "digest unknown"  # the log may have another frame there by now
        if reason is None:
            # Go back to the proven position: frames that have arrived since may have filled the gap with forged
            # sequences. Read the log in any case: another client may have set the head back.
            self._go_back(Mark(*proven), head)
        return reason

    def compare(self, mark: Mark, head: Anchor) -> str | None:
        """Compare the live position with the head, both of one moment: when the probe of an echo arrived.

        Returns: the same as `resume`.
        """
        anchor = mark.anchor
        if anchor is None:
            # This subscription began without a log, by dropping everything. All that was accepted since has arrived.
            self._move_to(head)
            return None
        reason = self._differs(anchor, head)
        if reason is None and anchor.sequence < head.sequence:
            self._go_back(mark, head)  # as in `resume`
        return reason

    def _go_back(self, mark: Mark, head: Anchor) -> None:
        """Move the live position back to `mark`, and be behind `head`."""
        self._epoch, self._sequence, self._content = mark
        self._is_behind = True
        self._run = None
        self._head_sequence = head.sequence
        if mark.sequence < head.sequence:
            self._counts["gaps"] += 1

    def prove(self, mark: Mark, head: Anchor) -> None:
        """Record that everything up to `head` has been applied, by `compare` or by reading the log since."""
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
                "a publisher of namespace %s keeps no digest of the head: positions are compared by their sequences "
                "only; expected every publisher to have the same version, upgrade the older ones",
                self.namespace,
            )
        return None

    def restart(self, head: Anchor | None, reason: str) -> None:
        """Drop everything, and set the position to `head`. That proves it: nothing before it matters any more."""
        self._proven = head
        self._move_to(head)
        self.clear(reason)

    def _move_to(self, anchor: Anchor | None) -> None:
        self._epoch, self._sequence, self._content = anchor or (None, 0, None)
        self._is_behind = False
        self._head_sequence = 0
        self._run = None

    def clear(self, reason: str, why: str = "") -> None:
        """Drop everything. The caches count it under `reason`; the log shows `why`, if given."""
        self._log_clear(reason, why)
        for cache in self.caches:
            cache.apply(Everything(), reason=reason)

    def _log_clear(self, reason: str, why: str) -> None:
        if self.on_clear is not None and not why:
            self.on_clear(self.namespace, reason)
        else:
            level = logging.INFO if reason == "subscribed" else logging.WARNING
            _log.log(level, "cleared namespace %s: %s", self.namespace, why or reason)

    # --- messages and log entries -------------------------------------------------------------------------------------

    def receive(self, frame: bytes) -> bool:
        """Apply one frame from the channel; return whether it needs more work: a sweep, a report, or the log."""
        try:
            invalidation = decode(frame, self.namespace)
        except MalformedFrame as error:
            self._clear_malformed(error)
            return True
        if invalidation.confirm or invalidation.traceparent or self.lag is not None:
            self._apply(invalidation, frame)
        else:  # the same without those checks: nearly all messages take this path
            for cache in self.caches:
                cache.apply_invalidation(invalidation)
            self._applied += 1
        # The position moves only after every cache has applied it.
        sequence = invalidation.seq
        if sequence is None:
            self._counts["unsequenced"] += 1
        elif sequence == self._sequence + 1 and invalidation.epoch == self._epoch and not self._is_behind:
            self._sequence = sequence
            self._content = frame
        else:
            self._place(invalidation.epoch, sequence, frame)
        if invalidation.everything or invalidation.prefixes or invalidation.tags or invalidation.confirm:
            return True
        return self._is_behind

    def replay(self, entries: Sequence[Entry], *, claimed: int, is_end: bool) -> bool:
        """Apply the entries of the log from the live position on, the one at that position included.

        Shape:   `claimed` is the property's value before the log was read. `is_end` is whether the log had no entry
                 after these.
        Returns: whether the log continues the history of the position: it has the same frame there, and the entries
                 that follow are readable and without a hole. If not, the owner has to `restart`.
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
            # An entry of another writer does not move the position: the real entry of that sequence may still follow.
            invalidation = entry.invalidation
            if invalidation is None or invalidation.position != (self._epoch, entry.sequence):
                return False
            if entry.sequence != self._sequence + 1:
                return False
            self._apply(invalidation, entry.frame)
            self._counts["replayed"] += 1
            self._sequence, self._content = entry.sequence, entry.frame
        if is_proven and following:
            # Read from the log itself, following a proven position: the next link need not read it again.
            self._proven = self.mark().anchor
        return self._go_on(claimed, is_end=is_end)

    def _go_on(self, claimed: int, *, is_end: bool) -> bool:
        """End the replay if it has caught up; return false when the log lacks entries that it must have."""
        has_reached_head = self._sequence >= self._head_sequence
        if is_end and not has_reached_head:
            return False
        run = self._run
        if run is not None and run.first <= self._sequence + 1 and has_reached_head:
            if run.last > self._sequence:
                self._sequence, self._content = run.last, run.content
            self._run, self._is_behind = None, False
        elif is_end and (run is None or run.last <= claimed):
            # A frame claimed a position that the log did not have when it was read later. It has been applied.
            if run is not None:
                self._counts["unlogged"] += 1
            self._run, self._is_behind = None, False
        return True

    def apply_own(self, invalidation: Invalidation) -> None:
        """Apply an invalidation of this replica's own before it is published.

        It is applied again when it arrives: a load in between may have read the source before it was accepted.
        """
        for cache in self.caches:
            cache.apply_invalidation(invalidation)

    # --- posted invalidations, from any thread ------------------------------------------------------------------------

    def apply_posted(self, invalidation: Invalidation) -> int:
        """Apply an invalidation that was posted; return how many entries were dropped (`LocalCache.apply_counted`).

        It does not move the position. If it also arrives over the channel it is applied again: only the log knows
        which of the two is the later one.
        """
        began_at_ns = time.time_ns() if invalidation.traceparent else 0
        dropped = sum([cache.apply_counted(invalidation) for cache in self.caches])
        if began_at_ns:
            trace_applied(invalidation, began_at_ns)
        return dropped

    def clear_posted(self, reason: str) -> int:
        """Drop everything, as `clear` does, because of a post; return how many entries the caches had."""
        return sum([cache.apply_counted(Invalidation(everything=True), reason=reason) for cache in self.caches])

    # ------------------------------------------------------------------------------------------------------------------

    def _apply(self, invalidation: Invalidation, frame: bytes) -> None:
        self._applied += 1
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
        """Apply, and count the dropped entries for a report, which costs a little more."""
        dropped = sum([cache.apply_counted(invalidation) for cache in self.caches])
        # Entries of a prefix, or of a tag with many entries, are not counted: the sweep has still to find them.
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
        """Handle the position of an applied frame that does not simply follow the last one."""
        if epoch != self._epoch:
            # Another log, a former primary or a forger: the next echo compares the head.
            self._counts["foreign"] += 1
        elif sequence <= self._sequence:
            self._counts["duplicate"] += 1
        else:
            # The log has what belongs in between; until it is read, these wait. A forged one costs a read of the log.
            if not self._is_behind:
                self._counts["gaps"] += 1
            self._is_behind = True
            run = self._run
            is_next = run is not None and sequence == run.last + 1
            self._run = _Run(run.first if run is not None and is_next else sequence, sequence, frame)

    def _clear_malformed(self, error: MalformedFrame) -> None:
        self._counts["malformed"] += 1
        self.clear("malformed", str(error))
