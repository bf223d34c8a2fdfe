"""Every error broadcache raises, one class for each thing that can go wrong.

A text says what was expected, what came, where, and what to do. Users' mistakes raise when an object is built;
what the world does wrong (Redis away, a broken frame) raises where it happens.
"""

from .fanout_report import FanoutReport

__all__ = [
    "BroadcacheError",
    "IdempotencyConflict",
    "InvalidLoader",
    "InvalidNamespace",
    "InvalidSettings",
    "InvalidTarget",
    "LinkLost",
    "LogRefused",
    "MalformedFrame",
    "NotDelivered",
    "NotPrimary",
    "ServerBinaryNotFound",
]


class BroadcacheError(Exception):
    """The base of all of them: `except BroadcacheError` catches what broadcache raises and nothing else."""


class InvalidLoader(BroadcacheError, TypeError):
    """A loader that cannot be used where it was given, such as an asynchronous one where a thread waits for it."""


class InvalidTarget(BroadcacheError, ValueError):
    """A target, or a set of targets, that names nothing, too much, or something that cannot be sent."""


class InvalidNamespace(BroadcacheError, ValueError):
    """A namespace that is not 1 to 64 letters, digits, `.`, `_` or `-`."""


class InvalidSettings(BroadcacheError, ValueError):
    """Settings that are of the wrong type, or that contradict each other."""


class MalformedFrame(BroadcacheError, ValueError):
    """Bytes on a channel or in a log that are not a frame of the wire form. A replica then drops everything."""


class LinkLost(BroadcacheError, ConnectionError):
    """Redis could not be reached, went away, or did not answer in time. Whether a command ran is not known."""


class LogRefused(BroadcacheError):
    """Redis answered, and refused: no right to a key, out of memory, a read-only replica. Nothing was logged."""


class NotPrimary(LogRefused):
    """This server does not take it, but another one may, or this one soon: it was demoted, a slot moved, it is loading
    its data. Find the primary anew, and try again."""


class NotDelivered(BroadcacheError):
    """Neither did the log accept an invalidation, nor is every replica known to have taken it by HTTP.

    Shape: `reasons` has the path that failed (`redis`, `fanout`, `retry_queue`) and why; `report` is that
           of the fan-out; `is_pending` is whether it waits in the publisher's retry queue to be logged all the same.
    """

    def __init__(
        self, text: str, *, reasons: tuple[tuple[str, str], ...], report: FanoutReport | None, is_pending: bool
    ) -> None:
        super().__init__(text)
        self.reasons = reasons
        self.report = report
        self.is_pending = is_pending


class IdempotencyConflict(BroadcacheError):
    """An invalidation with this id is in the log already, and it names other targets."""


class ServerBinaryNotFound(BroadcacheError):
    """No Valkey or Redis server program to start was found on this machine."""
