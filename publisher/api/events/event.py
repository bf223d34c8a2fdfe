"""The events of GET /events, in the format of Server-Sent Events."""

import re
from typing import Any, Final, NamedTuple

import msgspec

from ....shared.invalidation import Invalidation, Position
from ....shared.transport.redis.log import Entry
from ...history.replay import Gap
from ..documents.models import shown

__all__ = [
    "HEARTBEAT",
    "Event",
    "of_entry",
    "of_gap",
    "of_invalidation",
    "of_link",
    "of_loss",
    "of_unreadable",
    "position_of",
]

HEARTBEAT: Final = b": still here\n\n"
"""A comment: clients skip it, and proxies see that the connection is alive."""

_ID: Final = re.compile(r"([!-9;-~]{0,64}):(\d{1,16})", re.ASCII)


class Event(NamedTuple):
    """One event as it is sent. `position` is its position in the log; None when it is not in the log."""

    frame: bytes
    position: Position | None = None


def of_invalidation(invalidation: Invalidation) -> Event:
    """Return the event for an invalidation, with an id if it is in the log."""
    return _event("invalidation", shown(invalidation, invalidation.seq), invalidation.position)


def of_entry(entry: Entry, epoch: str) -> Event:
    """Return the event for an entry of the log of this epoch."""
    if entry.invalidation is not None:
        return of_invalidation(entry.invalidation)
    return of_unreadable("expected an invalidation in the log, got something else", Position(epoch, entry.sequence))


def of_unreadable(detail: str, position: Position | None) -> Event:
    """Return the event for a message or log entry that is not a valid invalidation."""
    data = {"sequence": position and position.sequence, "unreadable": True, "detail": detail}
    return _event("unreadable", data, position)


def of_gap(gap: Gap) -> Event:
    """Return the event for missed invalidations that cannot be read from the log."""
    return _event("gap", {"reason": gap.reason, "detail": gap.detail})


def of_link(position: Position | None = None) -> Event:
    """Return the event that says that events arrive; with `position`, the client resumes after it."""
    return _event("linked", {}, position)


def of_loss(detail: str) -> Event:
    """Return the event that says that no events arrive."""
    return _event("lost", {"detail": detail})


def position_of(id: str) -> Position | None:
    """Return the position in an event's id; None when the id is malformed."""
    found = _ID.fullmatch(id)
    return Position(found[1], int(found[2])) if found else None


def _event(kind: str, data: Any, position: Position | None = None) -> Event:
    lines = [b"event: " + kind.encode(), b"data: " + msgspec.json.encode(data), b"", b""]
    if position is not None:
        id = f"{position.epoch}:{position.sequence}"
        # A user with publish rights on Redis can send any epoch: it must not add a line to the event.
        if _ID.fullmatch(id):
            lines.insert(0, b"id: " + id.encode())
    return Event(b"\n".join(lines), position)
