"""The errors that broadcache raises, one class for each kind of failure.

A text says what was expected, what was found, where, and what to do. Mistakes of the user raise when an object is
constructed; failures of the environment (Redis unreachable, a broken frame) raise where they happen.
"""

from .fanout_report import FanoutReport

__all__ = [
    "BroadcacheError",
    "IdempotencyConflict",
    "InvalidLoader",
    "InvalidName",
    "InvalidNamespace",
    "InvalidSettings",
    "InvalidTarget",
    "LinkLost",
    "LogRefused",
    "MalformedFrame",
    "NotConnected",
    "NotDelivered",
    "NotPrimary",
    "ServerBinaryNotFound",
]


class BroadcacheError(Exception):
    """The base class: `except BroadcacheError` catches the errors of broadcache and no others."""


class InvalidLoader(BroadcacheError, TypeError):
    """The loader cannot be used here, e.g. an asynchronous loader in a synchronous call."""


class InvalidName(BroadcacheError, TypeError):
    """A key or tag that was given to a local cache is not a string. No invalidation could name it.

    Not a ValueError: `cachetools.cached` takes that for a value that is too large, and goes on without the cache.
    """


class InvalidTarget(BroadcacheError, ValueError):
    """A target or set of targets is empty or too large; or a name, reason, source or id is too long or not UTF-8."""


class InvalidNamespace(BroadcacheError, ValueError):
    """The namespace is not 1 to 64 ASCII letters, digits, `.`, `_` or `-`, beginning with a letter or digit."""


class InvalidSettings(BroadcacheError, ValueError):
    """A setting or argument is of the wrong type or out of bounds, or several contradict each other."""


class MalformedFrame(BroadcacheError, ValueError):
    """Bytes from a channel or log are not valid in the wire form.

    A replica that receives such bytes on the channel of a namespace drops everything in it.
    """


class LinkLost(BroadcacheError, ConnectionError):
    """Redis is unreachable, the connection was lost, or the answer did not arrive in time.

    A command that was sent before may have run.
    """


class NotConnected(LinkLost):
    """There was no connection to Redis, so no command was sent: nothing was logged."""


class LogRefused(BroadcacheError):
    """Redis refused a command: a missing right, out of memory, a read-only server.

    Of a publish, nothing was logged, with one exception: if only the right to the channel is missing, the invalidation
    is in the log, and each replica applies it after its next echo.
    """


class NotPrimary(LogRefused):
    """This server refused the command, but another server may accept it, or this one soon.

    The server was demoted, the slot moved, or it is loading its data. Find the primary again and retry.
    """


class NotDelivered(BroadcacheError):
    """The log did not accept the invalidation, and not every replica is known to have applied it by HTTP.

    Shape: `reasons` has, for each path that failed (`redis`, `fanout`, `retry_queue`), its name and why; `report` is
           that of the fan-out, None when there was none; `is_pending` is whether the invalidation waits in the
           publisher's retry queue, to be logged later.
    """

    def __init__(
        self, text: str, *, reasons: tuple[tuple[str, str], ...], report: FanoutReport | None, is_pending: bool
    ) -> None:
        super().__init__(text)
        self.reasons = reasons
        self.report = report
        self.is_pending = is_pending


class IdempotencyConflict(BroadcacheError):
    """An invalidation with the same id, but other targets, was logged before."""


class ServerBinaryNotFound(BroadcacheError):
    """No Valkey or Redis server program was found on this machine."""
