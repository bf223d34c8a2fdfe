"""Reads what a follower of the log has missed, a page at a time, with a gap for what the log no longer has."""

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

from ...shared.invalidation import Position
from ...shared.transport.redis.link import Link
from ...shared.transport.redis.log import Entry, read_after

__all__ = ["BEFORE_THE_FIRST", "Gap", "GapReason", "Missed", "read_missed"]

BEFORE_THE_FIRST: Final = Position("", 0)
"""The position of a follower of a log that has no entry yet."""
_PAGE_ENTRIES: Final = 100
"""How many entries are read at once: the connection may be shared, and one follower holds one page in memory."""

GapReason: TypeAlias = Literal["epoch-changed", "log-lost", "log-refused", "log-rewritten", "log-trimmed"]


class Gap(NamedTuple):
    """Invalidations were missed, or may have been, and the log does not have them."""

    reason: GapReason
    detail: str


class Missed(NamedTuple):
    """One page of missed entries, the oldest first, and the position after it."""

    items: list[Entry | Gap]
    position: Position


async def read_missed(
    link: Link, namespace: str, *, after: Position, until: Position | None, last_id: str = ""
) -> Missed:
    """Read the next page of entries after `after`, up to the head `until`. Call again until it is reached.

    Shape:  `last_id` is the id of the entry at `after`, if known: after a failover another may stand there. An entry
            that is unreadable, or that claims another place, has no invalidation.
    Raises: LinkLost; LogRefused.
    """
    if until is None:
        lost = Gap("log-lost", f"the log is gone, and with it the entries after {_place(after)}")
        return Missed([lost] if after.epoch else [], BEFORE_THE_FIRST)
    if after.epoch != until.epoch:
        changed = Gap(
            "epoch-changed",
            f"expected epoch {after.epoch}, got {until.epoch}: the entries after {_place(after)} are gone",
        )
        return await _read(link, namespace, 0, until, [changed] if after.epoch else [])
    if not until.reaches(after):
        went_back = f"the log ends at {_place(until)}, before {_place(after)}: the server has lost entries"
        return Missed([Gap("log-rewritten", went_back)], until)
    if last_id and await _was_rewritten(link, namespace, after, last_id):
        other = f"expected id {last_id} at {_place(after)}, got another: the server has lost entries and logged others"
        return Missed([Gap("log-rewritten", other)], until)
    return await _read(link, namespace, after.sequence, until, [])


async def _read(link: Link, namespace: str, sequence: int, until: Position, items: list[Entry | Gap]) -> Missed:
    if sequence == until.sequence:
        return Missed(items, until)
    entries = await read_after(link, namespace, after=sequence, count=_PAGE_ENTRIES)
    last = sequence
    for entry in _of_epoch(entries, until):
        if entry.sequence <= last:
            continue  # another writer added it beside an entry of this sequence
        if entry.sequence > last + 1 and not (items and isinstance(items[-1], Gap)):
            items.append(_trimmed(last, entry.sequence - 1))
        items.append(_as_placed(entry, until.epoch))
        last = entry.sequence
    if last < until.sequence and (len(entries) < _PAGE_ENTRIES or last == sequence):
        if not (items and isinstance(items[-1], Gap)):
            items.append(_trimmed(last, until.sequence))
        last = until.sequence
    return Missed(items, Position(until.epoch, last))


async def _was_rewritten(link: Link, namespace: str, position: Position, id: str) -> bool:
    """Whether another entry stands at `position` now. False when it has been trimmed."""
    found = await read_after(link, namespace, after=position.sequence - 1, count=1)
    is_there = bool(found) and found[0].sequence == position.sequence
    return is_there and (found[0].invalidation is None or found[0].invalidation.id != id)


def _of_epoch(entries: Sequence[Entry], until: Position) -> list[Entry]:
    """Return the entries up to `until`; none from the first one of another epoch on: the log was replaced meanwhile."""
    kept: list[Entry] = []
    for entry in entries:
        epoch = entry.invalidation and entry.invalidation.epoch
        if entry.sequence > until.sequence or (epoch and epoch != until.epoch):
            break
        kept.append(entry)
    return kept


def _as_placed(entry: Entry, epoch: str) -> Entry:
    """Return the entry, without its invalidation if that claims another place: then the log has not put it there."""
    invalidation = entry.invalidation
    if invalidation is None or invalidation.position == (epoch, entry.sequence):
        return entry
    return Entry(entry.sequence, None)


def _trimmed(after: int, until: int) -> Gap:
    return Gap("log-trimmed", f"the log no longer has sequences {after + 1} to {until}")


def _place(position: Position) -> str:
    return f"{position.epoch}:{position.sequence}"
