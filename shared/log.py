"""The log and the channel of a namespace: their names in Redis, and the commands that write and read them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from .errors import IdempotencyConflict, LogRefused, MalformedFrame
from .invalidation import DEFAULT_NAMESPACE, Invalidation, Position, new_id
from .link import Link, Refused
from .wire import decode, encode_tails

__all__ = [
    "LOG_LENGTH",
    "Entry",
    "Names",
    "Receipt",
    "append",
    "head",
    "names_of",
    "read_newest",
]

LOG_LENGTH: Final = 10_000
"""How many invalidations a namespace's log keeps, about: how far back a replica that was away can catch up."""

_CHANNEL: Final = "cache-invalidation"
_APPEND: Final = Path(__file__).with_name("append.lua").read_bytes()
_APPEND_SHA: Final = hashlib.sha1(_APPEND, usedforsecurity=False).hexdigest()


class Names(NamedTuple):
    """What a namespace is called in Redis. All keys carry the channel as their hash tag, so a cluster keeps them,
    and the channel if it is sharded, in one slot."""

    channel: str
    head: str
    log: str
    receipt_prefix: str


class Receipt(NamedTuple):
    """What the log answered.

    Shape:  `position` is that of the last frame, when the invalidation was split.
            `receivers` is what PUBLISH counted: connections that were subscribed, no proof that a replica applied it.
            `is_repeat` is true when this id had been logged before, and nothing was logged now.
    """

    id: str
    namespace: str
    position: Position
    receivers: int
    is_repeat: bool = False


class Entry(NamedTuple):
    """One entry of a log. `invalidation` is None when somebody else wrote there something that is not a frame."""

    sequence: int
    invalidation: Invalidation | None


def names_of(namespace: str) -> Names:
    """Return what `namespace` is called in Redis."""
    channel = _CHANNEL if namespace == DEFAULT_NAMESPACE else f"{_CHANNEL}:{namespace}"
    tag = f"{{{channel}}}"
    return Names(channel, f"{tag}:head", f"{tag}:log", f"{tag}:receipt:")


async def append(
    link: Link,
    invalidation: Invalidation,
    *,
    log_length: int = LOG_LENGTH,
    receipt_seconds: float = 60.0,
) -> Receipt:
    """Log `invalidation` and publish it, in one atomic step. Calling again with the same id logs nothing more.

    Units:  `receipt_seconds` is how long the id is remembered, and a retry is safe.
    Raises: LinkLost when it is not known whether it was logged: call again with the same invalidation.
            LogRefused when Redis refused, IdempotencyConflict when the id was used for other targets.
    """
    names = names_of(invalidation.namespace)
    fingerprint = _fingerprint_of(invalidation)
    arguments: tuple[str | bytes | int, ...] = (
        3,
        names.head,
        names.log,
        names.receipt_prefix + invalidation.id,
        names.channel,
        new_id(),
        log_length,
        max(1, round(receipt_seconds * 1_000)),
        fingerprint,
        *encode_tails(invalidation),
    )
    try:
        try:
            answer = await link.call("EVALSHA", _APPEND_SHA, *arguments)
        except Refused as refusal:
            if refusal.code != "NOSCRIPT":
                raise
            answer = await link.call("EVAL", _APPEND, *arguments)
    except Refused as refusal:
        raise LogRefused(
            f"expected Redis to log an invalidation of {invalidation.namespace!r}, got: {refusal}"
        ) from refusal
    epoch, sequence, receivers, is_repeat, fingerprint_before = answer
    if fingerprint_before.decode() != fingerprint:
        raise IdempotencyConflict(
            f"expected id {invalidation.id!r} to be new or to name the same targets as before, got other targets; "
            "use a new id, or repeat the first request unchanged"
        )
    return Receipt(
        invalidation.id, invalidation.namespace, Position(epoch.decode(), sequence), receivers, bool(is_repeat)
    )


async def head(link: Link, namespace: str) -> Position | None:
    """Return the position of the newest invalidation of `namespace`; None when there was none, or the log was lost.

    Raises: LinkLost; LogRefused.
    """
    try:
        epoch, sequence = await link.call("HMGET", names_of(namespace).head, "epoch", "seq")
        return None if epoch is None else Position(epoch.decode(), int(sequence or 0))
    except (Refused, ValueError) as error:
        raise LogRefused(f"expected Redis to tell the head of {namespace!r}, got: {error}") from error


async def read_newest(link: Link, namespace: str, *, count: int, before: int | None = None) -> list[Entry]:
    """Return up to `count` entries of the log, the newest first; with `before`, only those of a lower sequence.

    Raises: LinkLost; LogRefused.
    """
    newest = "+" if before is None else f"({before}-0"
    try:
        rows = await link.call("XREVRANGE", names_of(namespace).log, newest, "-", "COUNT", count)
    except Refused as refusal:
        raise LogRefused(f"expected Redis to read the log of {namespace!r}, got: {refusal}") from refusal
    return [_entry_of(row, namespace) for row in rows]


def _entry_of(row: tuple[bytes, Sequence[bytes]], namespace: str) -> Entry:
    entry_id, fields = row
    sequence = int(entry_id.partition(b"-")[0])
    try:
        return Entry(sequence, decode(fields[1], namespace))
    except (MalformedFrame, IndexError):
        return Entry(sequence, None)


def _fingerprint_of(invalidation: Invalidation) -> str:
    """Tell two invalidations apart by what they drop; not by their reason, source or time."""
    digest = hashlib.blake2b(digest_size=12)
    for part in (invalidation.keys, invalidation.tags, invalidation.prefixes):
        digest.update(b"%d\0" % len(part))
        for name in part:
            digest.update(name.encode())
            digest.update(b"\0")
    digest.update(b"1" if invalidation.everything else b"0")
    return digest.hexdigest()
