"""What the API takes and gives, as JSON. Field names are those of the wire form."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any, Final, TypeAlias

import msgspec
from msgspec import Meta

from ..shared.errors import InvalidNamespace, InvalidTarget
from ..shared.invalidation import (
    DEFAULT_NAMESPACE,
    KEY_BYTES_MAX,
    REASON_BYTES_MAX,
    REQUEST_NAMES_MAX,
    TAG_BYTES_MAX,
    Everything,
    Invalidation,
    Keys,
    Prefixes,
    Tags,
    Target,
    check_namespace,
    check_text,
)
from ..shared.log import Entry, Receipt
from .history import HistoryPage
from .problems import BODY_UNREADABLE, INVALIDATION_INVALID, Flaw, Problem

__all__ = ["Accepted", "History", "LoggedInvalidation", "PublishRequest", "UnreadableEntry", "shown"]

_FLAWS_MAX: Final = 20
"""How many flaws of one request are listed: enough to mend it, too few to make a small request a large answer."""
_SHOWN_CHARACTERS_MAX: Final = 60
"""How much of a value that is wrong is shown."""

# Limits are described here and checked by the targets themselves: those say what they got.
_NAMES = {"maxItems": REQUEST_NAMES_MAX}
_Key: TypeAlias = Annotated[str, Meta(extra_json_schema={"minLength": 1, "maxLength": KEY_BYTES_MAX})]
_Tag: TypeAlias = Annotated[str, Meta(extra_json_schema={"minLength": 1, "maxLength": TAG_BYTES_MAX})]


class PublishRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which entries every replica has to drop: `everything` of a namespace, or at least one key, tag or prefix."""

    namespace: Annotated[
        str,
        Meta(
            description="The family of caches that is meant.",
            extra_json_schema={"pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"},
        ),
    ] = DEFAULT_NAMESPACE
    keys: Annotated[
        tuple[_Key, ...],
        Meta(description="Drop the entries with exactly these keys.", extra_json_schema=_NAMES),
    ] = ()
    tags: Annotated[
        tuple[_Tag, ...],
        Meta(description="Drop the entries with one of these tags.", extra_json_schema=_NAMES),
    ] = ()
    prefixes: Annotated[
        tuple[_Key, ...],
        Meta(description="Drop the entries whose key begins with one of these.", extra_json_schema=_NAMES),
    ] = ()
    everything: Annotated[
        bool, Meta(description="Drop every entry of the namespace. Nothing else is named then: it is covered.")
    ] = False
    reason: Annotated[
        str,
        Meta(
            description="Why, for whoever reads the history or a log.",
            extra_json_schema={"maxLength": REASON_BYTES_MAX},
        ),
    ] = ""

    @classmethod
    def read(cls, body: bytes) -> "PublishRequest":
        """Read a request's body. Raises: Problem and nothing else, whatever the bytes; it points at what is wrong."""
        try:
            return _decoder.decode(body)
        except msgspec.ValidationError as error:
            raise Problem(INVALIDATION_INVALID, errors=(_flaw_of(str(error), body),)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Problem(
                BODY_UNREADABLE,
                f"expected a body of one JSON object in UTF-8, got {len(body)} bytes that are none: {error}; mend it",
            ) from None

    def targets(self) -> list[Target]:
        """Return what is to be dropped. Raises: InvalidTarget; `flaws` says where in the body."""
        targets: list[Target] = []
        if self.keys:
            targets.append(Keys(*self.keys))
        if self.tags:
            targets.append(Tags(*self.tags))
        if self.prefixes:
            targets.append(Prefixes(*self.prefixes))
        if self.everything:
            targets.append(Everything())
        return targets

    def flaws(self) -> tuple[Flaw, ...]:
        """Return what makes this request an invalid one, each with its place in the body."""
        return tuple(islice(self._all_flaws(), _FLAWS_MAX))

    def _all_flaws(self) -> Iterator[Flaw]:
        try:
            check_namespace(self.namespace)
        except InvalidNamespace as error:
            yield Flaw(pointer="/namespace", detail=f"{error} at /namespace")
        count = len(self.keys) + len(self.tags) + len(self.prefixes)
        if not count and not self.everything:
            yield Flaw(
                pointer="",
                detail="expected at least one of keys, tags or prefixes, got none; to drop all, send everything: true",
            )
        if count and self.everything:
            yield Flaw(
                pointer="/everything",
                detail=f"expected everything alone, got {count} names beside it at /everything; leave them out",
            )
        if count > REQUEST_NAMES_MAX:
            yield Flaw(
                pointer="",
                detail=f"expected at most {REQUEST_NAMES_MAX} keys, tags and prefixes together, got {count}; "
                "send several requests, or name a tag or a prefix",
            )
        texts = [
            *((name, KEY_BYTES_MAX, f"/keys/{place}") for place, name in enumerate(self.keys)),
            *((name, TAG_BYTES_MAX, f"/tags/{place}") for place, name in enumerate(self.tags)),
            *((name, KEY_BYTES_MAX, f"/prefixes/{place}") for place, name in enumerate(self.prefixes)),
            (self.reason, REASON_BYTES_MAX, "/reason"),
        ]
        for text, bytes_max, pointer in texts:
            try:
                check_text(text, bytes_max, pointer, may_be_empty=pointer == "/reason")
            except InvalidTarget as error:
                yield Flaw(pointer=pointer, detail=str(error))


_decoder = msgspec.json.Decoder(PublishRequest)


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """The log has the invalidation. `receivers` counts connections that listened, which proves no replica applied it.

    `epoch` and `sequence` are its place in the namespace's log; the last one, when it was split.
    """

    id: str
    namespace: str
    epoch: str
    sequence: int
    receivers: int

    @classmethod
    def of(cls, receipt: Receipt) -> "Accepted":
        """Return what to answer for this receipt."""
        return cls(
            id=receipt.id,
            namespace=receipt.namespace,
            epoch=receipt.position.epoch,
            sequence=receipt.position.sequence,
            receivers=receipt.receivers,
        )


class LoggedInvalidation(msgspec.Struct, frozen=True, kw_only=True):
    """One invalidation of the log. `sent_at` is the publisher's clock (RFC 3339): for people, never for order.

    `sequence` and `epoch` are null when it was published past the log, which only GET /events can show.
    """

    sequence: int | None
    epoch: str | None
    id: str
    keys: tuple[str, ...]
    tags: tuple[str, ...]
    prefixes: tuple[str, ...]
    everything: bool
    reason: str
    source: str
    sent_at: str | None


class UnreadableEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Something in the log that is no invalidation: replicas drop everything when they meet it."""

    sequence: int
    unreadable: bool = True


class History(msgspec.Struct, frozen=True, kw_only=True):
    """A page of a namespace's log, the newest first. `next_before` is the next page's `before`; null on the last.

    `examined` is how many entries were looked at for it: a filter may leave few of them, or none, and yet there may be
    more to find on the next page.
    """

    namespace: str
    # Not a union of the two: msgspec describes no union of objects that share no tag.
    invalidations: tuple[Any, ...]
    next_before: int | None
    examined: int

    @classmethod
    def of(cls, namespace: str, page: HistoryPage) -> "History":
        """Return what to answer for this page."""
        return cls(
            namespace=namespace,
            invalidations=tuple(map(_entry_shown, page.entries)),
            next_before=page.next_before,
            examined=page.examined,
        )


def _entry_shown(entry: Entry) -> LoggedInvalidation | UnreadableEntry:
    if entry.invalidation is None:
        return UnreadableEntry(sequence=entry.sequence)
    return shown(entry.invalidation, entry.sequence)


def shown(invalidation: Invalidation, sequence: int | None) -> LoggedInvalidation:
    """Return an invalidation as the API shows it; `sequence` is where the log has it."""
    return LoggedInvalidation(
        sequence=sequence,
        epoch=invalidation.epoch,
        id=invalidation.id,
        keys=invalidation.keys,
        tags=invalidation.tags,
        prefixes=invalidation.prefixes,
        everything=invalidation.everything,
        reason=invalidation.reason,
        source=invalidation.source,
        sent_at=_rfc_3339(invalidation.sent_at_ms),
    )


def _rfc_3339(unix_ms: int | None) -> str | None:
    if unix_ms is None:
        return None
    try:
        return datetime.fromtimestamp(unix_ms / 1_000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):  # a sender's clock beyond the year 9999
        return None


def _flaw_of(message: str, body: bytes) -> Flaw:
    """Say in our words what msgspec found: expected, got, and where as a JSON pointer."""
    problem, _, place = message.partition(" - at `")
    _, is_unknown, unknown = problem.partition("Object contains unknown field `")
    if is_unknown:
        fields = ", ".join(PublishRequest.__struct_fields__)
        return Flaw(pointer="", detail=f"expected no fields but {fields}, got {_cut(unknown.removesuffix('`'))!r}")
    pointer = "".join(f"/{step}" for step in re.findall(r"\w+", place))
    expected, _, got = problem.replace("`", "").replace("Expected", "expected").partition(", got ")
    if not got:
        expected, got = "expected a value of the documented type", expected
    return Flaw(pointer=pointer, detail=f"{expected}, got {got} at {pointer or 'the top of the body'}")


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS_MAX else f"{text[:_SHOWN_CHARACTERS_MAX]}…"
