"""The log of a namespace: the commands that append to it, read it, and echo its head."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from ...errors import IdempotencyConflict, LogRefused, MalformedFrame
from ...invalidation import Anchor, Invalidation, Position
from ...receipt import Receipt
from ...wire import decode, digest_of, encode_tails
from .link import Argument, Link, Refused
from .names import Names, names_of
from .refusals import refused as _refused

__all__ = [
    "IS_SHARED",
    "LOG_LENGTH",
    "SERVES_NOTHING",
    "Entry",
    "Heads",
    "Identity",
    "ReplacedPresence",
    "Script",
    "append",
    "echo",
    "head",
    "identity",
    "names_of",
    "read_after",
    "read_at",
    "read_from",
    "read_head",
    "read_newest",
    "run_script",
]

LOG_LENGTH: Final = 10_000
"""About how many invalidations a namespace's log keeps: how far back a replica that was away can catch up."""


SERVES_NOTHING: Final = 2
"""The mark of a registration beyond whose end the replica serves nothing from its caches."""
IS_SHARED: Final = 1
"""The mark of a registration whose id may be that of another process too."""


class Script(NamedTuple):
    """A script, and the hash by which a server knows it."""

    text: bytes
    sha: str

    @classmethod
    def read(cls, *file_names: str) -> Self:
        """Read the script from files of this folder."""
        text = b"".join(Path(__file__).with_name(name).read_bytes() for name in file_names)
        return cls(text, hashlib.sha1(text, usedforsecurity=False).hexdigest())


_HEAD_FIELDS: Final = ("epoch", "seq", "digest", "digest_seq")
# By whether older versions use other names in the database.
_APPEND: Final = {False: Script.read("append.lua"), True: Script.read("older.lua", "append.lua")}
_ECHO: Final = {False: Script.read("echo.lua"), True: Script.read("older.lua", "echo.lua")}


class Identity(NamedTuple):
    """Which server answers, and which history of writes it continues.

    One of them changes whenever writes may have been lost: with a restart, a failover, a promotion.

    Shape: a text is empty when the server does not report it.
    """

    run_id: str
    replication_id: str

    @property
    def is_known(self) -> bool:
        """Whether the server reported both. An unknown identity must not be treated as equal to any, even itself."""
        return bool(self.run_id and self.replication_id)


class ReplacedPresence(NamedTuple):
    """The presence that an echo replaced, and in how many milliseconds that registration would have ended."""

    text: bytes
    left_ms: int


class Heads(NamedTuple):
    """The reply to an echo: the head of each namespace and the server's replication id, at one moment.

    Shape: the digest of a head is None when the stored digest is that of an earlier sequence: a writer that keeps no
           digest has moved the head on. When it is that of a later sequence, the head was moved back, and the digest
           is one that no frame has. `complaint` is the error that kept this replica from being registered, or empty.
           `others` has the namespaces in which another process has written the presence that this echo replaced.
           `unpublished` are the namespaces whose presence was to be renewed, and was gone.
    """

    replication_id: str
    anchors: dict[str, Anchor]
    complaint: str = ""
    others: Mapping[str, "ReplacedPresence"] = {}
    unpublished: frozenset[str] = frozenset()


class Entry(NamedTuple):
    """One entry of a log.

    Shape: `frame` is the bytes of the entry. `invalidation` is None when they are no frame: another writer added them.
    """

    sequence: int
    invalidation: Invalidation | None
    frame: bytes = b""

    @property
    def digest(self) -> str:
        """The digest of the entry's bytes."""
        return digest_of(self.frame)


async def append(
    link: Link,
    invalidation: Invalidation,
    *,
    scope: str | None = None,
    log_length: int = LOG_LENGTH,
    receipt_seconds: float = 60.0,
) -> Receipt:
    """Log `invalidation` and publish it, in one atomic step. A repeat with the same id logs nothing more.

    Shape:  `scope` is the owner of the id; by default the invalidation's source. The same id in another scope is
            another invalidation. Only a hash of the scope is written to Redis.
    Units:  `receipt_seconds` is how long the id is remembered, and so how long a retry is safe.
    Raises: LinkLost when it is not known whether it was logged: call again with the same invalidation.
            LogRefused when Redis refused, and nothing was logged. Redis 6 can refuse the message alone: the text then
            says that it is in the log, and a repeat is not logged again. NotPrimary, a LogRefused, when another server
            may accept it; IdempotencyConflict when the id was used for other targets.
    """
    names = link.names_of(invalidation.namespace)
    fingerprint = _fingerprint_of(invalidation)
    arguments: tuple[Argument, ...] = (
        names.channel,
        link.new_epoch(),
        log_length,
        max(1, round(receipt_seconds * 1_000)),
        fingerprint,
        link.publish_command,
        *encode_tails(invalidation),
    )
    try:
        answer = await run_script(
            link,
            _APPEND[link.naming.has_older_names],
            (names.head, names.log, _receipt_key(names, invalidation, scope)),
            arguments,
        )
    except Refused as refusal:
        raise _refused(f"log an invalidation of {invalidation.namespace!r}", refusal) from refusal
    epoch, sequence, receivers, is_repeat, fingerprint_before, *unpublished = answer
    if fingerprint_before.decode() != fingerprint:
        raise IdempotencyConflict(
            f"the id {invalidation.id!r} was used before for other targets; "
            "use a new id, or repeat the first request unchanged"
        )
    if unpublished:
        raise LogRefused(
            f"expected Redis to publish the invalidation {invalidation.id!r} of {invalidation.namespace!r}, got: "
            f"{unpublished[0].decode(errors='replace')}. It is in the log, at sequence {sequence}, and replicas find "
            f"it with their next echo; give the user the right to publish on the channel {names.channel}"
        )
    return Receipt(
        invalidation.id, invalidation.namespace, Position(epoch.decode(), sequence), receivers, bool(is_repeat)
    )


def _receipt_key(names: Names, invalidation: Invalidation, scope: str | None) -> str:
    whose = invalidation.source if scope is None else scope
    return f"{names.receipt_prefix}{_scope_digest_of(whose)}:{invalidation.id}"


@lru_cache(maxsize=256)
def _scope_digest_of(scope: str) -> str:
    """Return a hash of fixed length, so that it is unambiguous where the id begins. Most scopes are a publisher's."""
    return hashlib.blake2b(scope.encode(), digest_size=16).hexdigest()


async def head(link: Link, namespace: str) -> Position | None:
    """Return the position of the newest invalidation of `namespace`; None when there is no log.

    Shape:  sequence 0 when replicas follow the namespace and nothing has been logged yet.
    Raises: LinkLost; LogRefused.
    """
    newest = await read_head(link, namespace)
    return None if newest is None else newest.position


async def read_head(link: Link, namespace: str) -> Anchor | None:
    """Return the position of the newest invalidation, as `head` does, with the digest of its frame.

    Shape:  None also when the stored head is not valid: the next echo or publish then begins a new log.
    Raises: LinkLost; LogRefused.
    """
    try:
        fields = await link.call("HMGET", link.names_of(namespace).head, *_HEAD_FIELDS)
    except Refused as refusal:
        if refusal.code == "WRONGTYPE":
            return None  # the next echo or publish begins a new log
        raise _refused(f"return the head of {namespace!r}", refusal) from refusal
    try:
        return None if fields[0] is None else _anchor_of(fields)
    except ValueError:
        return None


async def identity(link: Link) -> Identity:
    """Return the identity of the server on this link. Raises: LinkLost; LogRefused."""
    try:
        server, replication = await link.call_all([("INFO", "server"), ("INFO", "replication")])
    except Refused as refusal:
        raise _refused("report its run id and replication id", refusal) from refusal
    return Identity(_field_of(server, b"run_id"), _field_of(replication, b"master_replid"))


async def echo(
    link: Link,
    namespaces: Sequence[str],
    *,
    probe_channel: str,
    replica_id: str,
    probe: str,
    life: str,
    marks: Sequence[int],
    presences: Sequence[bytes],
    presence_seconds: float,
) -> Heads:
    """Have the server, which must be a primary, publish `probe` to this replica and return the heads.

    Shape:  `probe_channel` is that of one of the namespaces (`echo_prefix` and the id). `presences` are this replica's
            encoded presences, one for each namespace; an empty one renews what is there. `marks` are those of its
            registrations (`SERVES_NOTHING`, `IS_SHARED`), and `life` is the token in the presences. A namespace without
            a head gets one, at sequence 0.
    Units:  `presence_seconds` is how long the registrations last.
    Raises: LinkLost; LogRefused, e.g. NotPrimary by a server that was demoted.
    """
    keys: list[str] = []
    for names in map(link.names_of, namespaces):
        keys += [names.head, names.presence_prefix + replica_id, names.registry]
    arguments: tuple[Argument, ...] = (
        probe_channel,
        probe,
        link.publish_command,
        replica_id,
        max(1, round(presence_seconds * 1_000)),
        link.new_epoch(),
        life,
        "".join(map(str, marks)),
        *presences,
    )
    try:
        replication_id, complaint, others, *fields = await run_script(
            link, _ECHO[link.naming.has_older_names], keys, arguments
        )
        width = len(_HEAD_FIELDS) + 1
        heads = [fields[start : start + width] for start in range(0, len(fields), width)]
        anchors = {namespace: _anchor_of(head[:-1]) for namespace, head in zip(namespaces, heads, strict=True)}
    except (Refused, ValueError) as error:
        raise _refused("answer an echo", error) from error
    replaced = {
        namespaces[int(number) - 1]: ReplacedPresence(text, left_ms)
        for number, left_ms, text in zip(others[::3], others[1::3], others[2::3], strict=True)
    }
    unpublished = frozenset(namespace for namespace, head in zip(namespaces, heads, strict=True) if not head[-1])
    return Heads(replication_id.decode(), anchors, complaint.decode(), replaced, unpublished)


async def read_after(link: Link, namespace: str, *, after: int, count: int) -> list[Entry]:
    """Return up to `count` entries of the log with a sequence above `after`, the oldest first.

    Raises: LinkLost; LogRefused.
    """
    return await read_from(link, namespace, sequence=after + 1, count=count)


async def read_from(link: Link, namespace: str, *, sequence: int, count: int) -> list[Entry]:
    """Return up to `count` entries of the log from `sequence` on, the oldest first.

    Raises: LinkLost; LogRefused, also when the log is no stream.
    """
    try:
        rows = await link.call("XRANGE", link.names_of(namespace).log, f"{sequence}-0", "+", "COUNT", count)
    except Refused as refusal:
        raise _refused(f"read the log of {namespace!r}", refusal) from refusal
    return [_entry_of(row, namespace) for row in rows]


async def read_at(link: Link, namespace: str, sequences: Iterable[int]) -> dict[int, Entry]:
    """Return the log's entries at these sequences, in one round trip; missing ones are left out.

    Raises: LinkLost; LogRefused, also when the log is no stream.
    """
    log = link.names_of(namespace).log
    # XREVRANGE, because a publisher has no right to XRANGE.
    commands = [("XREVRANGE", log, f"{last}-0", f"{first}-0") for first, last in _runs_of(sequences)]
    try:
        answers = await link.call_all(commands)
    except Refused as refusal:
        raise _refused(f"read the log of {namespace!r}", refusal) from refusal
    entries = [_entry_of(row, namespace) for rows in answers for row in rows]
    return {entry.sequence: entry for entry in entries}


async def read_newest(link: Link, namespace: str, *, count: int, before: int | None = None) -> list[Entry]:
    """Return up to `count` entries of the log, the newest first; with `before`, only those of a lower sequence.

    Raises: LinkLost; LogRefused.
    """
    newest = "+" if before is None else f"({before}-0"
    try:
        rows = await link.call("XREVRANGE", link.names_of(namespace).log, newest, "-", "COUNT", count)
    except Refused as refusal:
        raise _refused(f"read the log of {namespace!r}", refusal) from refusal
    return [_entry_of(row, namespace) for row in rows]


async def run_script(link: Link, script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
    """Run a script, and load it first if the server does not know it. Raises: LinkLost; Refused."""
    try:
        return await link.call("EVALSHA", script.sha, len(keys), *keys, *arguments)
    except Refused as refusal:
        if refusal.code != "NOSCRIPT":
            raise
    return await link.call("EVAL", script.text, len(keys), *keys, *arguments)


def _runs_of(sequences: Iterable[int]) -> list[tuple[int, int]]:
    """Return the first and last of each run of consecutive sequences."""
    runs: list[tuple[int, int]] = []
    for sequence in sorted({*sequences}):
        if runs and runs[-1][1] == sequence - 1:
            runs[-1] = (runs[-1][0], sequence)
        else:
            runs.append((sequence, sequence))
    return runs


def _field_of(info: bytes, name: bytes) -> str:
    found = re.search(rb"^%s:(\S+)" % name, info, re.MULTILINE)
    return found[1].decode() if found else ""


def _entry_of(row: tuple[bytes, Sequence[bytes]], namespace: str) -> Entry:
    entry_id, fields = row
    sequence = int(entry_id.partition(b"-")[0])
    frame = fields[1] if len(fields) > 1 else b""
    try:
        return Entry(sequence, decode(frame, namespace), frame)
    except MalformedFrame:
        return Entry(sequence, None, frame)


def _anchor_of(fields: Sequence[bytes | None]) -> Anchor:
    """Read the fields of a head. Raises: ValueError."""
    epoch, sequence, digest, digest_sequence = fields
    number = int(sequence or 0)
    if number < 0:
        raise ValueError(f"expected a sequence of 0 or more, got {number}")
    digest_number = int(digest_sequence) if digest_sequence is not None and digest_sequence.isdigit() else -1
    if digest is None or digest_number < number:
        known = None  # a writer that keeps no digest has moved the head on
    elif digest_number > number:
        known = f"of {digest_number}"  # the head was moved back: no frame has this digest
    else:
        known = digest.decode()
    return Anchor((epoch or b"").decode(), number, known)


def _fingerprint_of(invalidation: Invalidation) -> str:
    """Return a hash of the targets, and of nothing else: not of the reason, source or time."""
    digest = hashlib.blake2b(digest_size=12)
    for part in (invalidation.keys, invalidation.tags, invalidation.prefixes):
        digest.update(b"%d\0" % len(part))
        for name in part:
            digest.update(name.encode())
            digest.update(b"\0")
    digest.update(b"1" if invalidation.everything else b"0")
    return digest.hexdigest()
