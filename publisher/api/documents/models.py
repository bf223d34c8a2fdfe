"""What the API takes and gives, as JSON. Field names are those of the wire form."""

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any, Final, Self, TypeAlias

import msgspec
from msgspec import Meta

from ....shared.confirmation import CONFIRM_SECONDS_MAX, Confirm, Confirmation, ReplicaConfirmation
from ....shared.errors import InvalidNamespace, InvalidSettings, InvalidTarget
from ....shared.fanout_report import FanoutReport
from ....shared.invalidation import (
    DEFAULT_NAMESPACE,
    KEY_BYTES_MAX,
    NAMESPACE_PATTERN,
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
from ....shared.presence import ReplicaPresence
from ....shared.receipt import Receipt
from ....shared.transport.redis.log import Entry
from ...history.pages import HistoryPage
from .problems import BODY_UNREADABLE, INVALIDATION_INVALID, Flaw, Problem

__all__ = [
    "Accepted",
    "ConfirmRequest",
    "Confirmed",
    "History",
    "ListedPosition",
    "ListedReplica",
    "LoggedInvalidation",
    "PreviewRequest",
    "PublishRequest",
    "Replicas",
    "UnreadableEntry",
    "shown",
]

_FLAWS_MAX: Final = 20
"""How many flaws of one request are listed: enough to mend it, too few to make a small request a large answer."""
_SHOWN_CHARACTERS_MAX: Final = 60
"""How much of a value that is wrong is shown."""

# Limits are described here and checked by the targets themselves: those say what they got.
_NAMES = {"maxItems": REQUEST_NAMES_MAX}
_Key: TypeAlias = Annotated[str, Meta(extra_json_schema={"minLength": 1, "maxLength": KEY_BYTES_MAX})]
_Tag: TypeAlias = Annotated[str, Meta(extra_json_schema={"minLength": 1, "maxLength": TAG_BYTES_MAX})]


class ConfirmRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to wait for replicas. `timeout_seconds` counts from when the log has accepted it."""

    timeout_seconds: Annotated[
        float,
        Meta(
            description="How long to wait for those that have not confirmed.",
            extra_json_schema={"exclusiveMinimum": 0, "maximum": CONFIRM_SECONDS_MAX},
        ),
    ] = 1.0


class PreviewRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which entries are meant: `everything` of a namespace, or at least one key, tag or prefix."""

    namespace: Annotated[
        str,
        Meta(
            description="The family of caches that is meant.",
            extra_json_schema={"pattern": f"^{NAMESPACE_PATTERN}$"},
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
    def read(cls, body: bytes) -> Self:
        """Read a request's body. Raises: Problem and nothing else, whatever the bytes; it points at what is wrong."""
        try:
            return msgspec.json.decode(body, type=cls)
        except msgspec.ValidationError as error:
            raise Problem(INVALIDATION_INVALID, errors=(_flaw_of(str(error), cls),)) from None
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
        yield from self._more_flaws()
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

    def _more_flaws(self) -> Iterator[Flaw]:
        """Yield those of what a kind of request has besides."""
        yield from ()


class PublishRequest(PreviewRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which entries every replica has to drop: `everything` of a namespace, or at least one key, tag or prefix."""

    confirm: Annotated[
        ConfirmRequest | None,
        Meta(description="Wait until every replica that is there has applied it, and answer who has."),
    ] = None

    def confirmation(self) -> Confirm | None:
        """Return how to wait for replicas, if at all. Raises: InvalidSettings; `flaws` says where in the body."""
        return None if self.confirm is None else Confirm(timeout_seconds=self.confirm.timeout_seconds)

    def _more_flaws(self) -> Iterator[Flaw]:
        try:
            self.confirmation()
        except InvalidSettings as error:
            yield Flaw(pointer="/confirm/timeout_seconds", detail=f"{error} at /confirm/timeout_seconds")


class Confirmed(msgspec.Struct, frozen=True, kw_only=True):
    """Which replicas have applied it, by their own reports. `expected` were registered when it was published.

    Of those that are `missing` nothing is known: they may serve what they were told to drop, up to their bound. `doubt`
    says why there may be replicas that were not expected, and may serve it as well; null when there are none.
    `is_complete` means that none is missing, and that there is no doubt.
    """

    is_complete: bool
    expected: tuple[str, ...]
    confirmed: tuple[str, ...]
    missing: tuple[str, ...]
    doubt: str | None
    replicas: tuple[ReplicaConfirmation, ...]


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """The invalidation is delivered: `logged` says whether the log has it; if not, `fanout` reached every replica.

    `epoch` and `sequence` are its place in the namespace's log; the last one, when it was split; null when it is not
    logged. `receivers` counts connections that listened, which proves no replica applied it. `pending` says that it
    waits to be logged when Redis takes it. `fanout` is who was called by HTTP; null when nobody was. `confirmation` is
    there when it was asked for.
    """

    id: str
    namespace: str
    epoch: str | None
    sequence: int | None
    receivers: int
    logged: bool
    pending: bool
    fanout: FanoutReport | None
    confirmation: Confirmed | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, receipt: Receipt) -> "Accepted":
        """Return what to answer for this receipt."""
        epoch, sequence = receipt.position or (None, None)
        return cls(
            id=receipt.id,
            namespace=receipt.namespace,
            epoch=epoch,
            sequence=sequence,
            receivers=receipt.receivers,
            logged=receipt.is_logged,
            pending=receipt.pending,
            fanout=receipt.fanout,
            confirmation=msgspec.UNSET if receipt.confirmation is None else _confirmed(receipt.confirmation),
        )


def _confirmed(confirmation: Confirmation) -> Confirmed:
    return Confirmed(
        is_complete=confirmation.is_complete,
        expected=confirmation.expected,
        confirmed=confirmation.confirmed,
        missing=confirmation.missing,
        doubt=confirmation.doubt,
        replicas=confirmation.replicas,
    )


class ListedPosition(msgspec.Struct, frozen=True, kw_only=True):
    """A place in a namespace's log. Sequences of different epochs say nothing about each other."""

    epoch: str
    sequence: int


class ListedReplica(msgspec.Struct, frozen=True, kw_only=True):
    """One replica as it was at its last echo, `seen_ms_ago`. Only `staleness_seconds` and `is_coherent` are as of now.

    `staleness_seconds` is how long ago everything accepted was last proven to be applied there; it may serve from its
    cache while that is below `max_staleness_seconds`. `behind` is null when it is in another epoch than the log.
    `state` is `coherent`, `recovering`, `connecting`, `lost`, or `unknown`. Counters begin with the replica's life;
    `lag_ms` is by two machines' wall clocks.
    """

    replica: str
    namespaces: tuple[str, ...]
    host: str
    pid: int
    version: str
    started_at: str | None
    seen_ms_ago: int | None
    state: str
    is_coherent: bool
    position: ListedPosition | None
    behind: int | None
    staleness_seconds: float | None
    max_staleness_seconds: float | None
    when_incoherent: str
    entries: int
    hits: int
    misses: int
    bypassed: int
    hit_ratio: float | None
    clears: dict[str, int]
    clears_total: int
    replays: int
    gaps: int
    lag_ms: float | None

    @classmethod
    def of(cls, replica: ReplicaPresence) -> "ListedReplica":
        """Return what to answer for this replica."""
        derived: dict[str, Any] = {
            "started_at": _rfc_3339(replica.started_at_ms or None),
            "position": replica.position and ListedPosition(**replica.position._asdict()),
        }
        same: dict[str, Any] = {name: getattr(replica, name) for name in cls.__struct_fields__ if name not in derived}
        return cls(**same, **derived)


class Replicas(msgspec.Struct, frozen=True, kw_only=True):
    """The replicas of a namespace, by name."""

    namespace: str
    replicas: tuple[ListedReplica, ...]

    @classmethod
    def of(cls, namespace: str, replicas: Sequence[ReplicaPresence]) -> "Replicas":
        """Return what to answer for these replicas."""
        return cls(namespace=namespace, replicas=tuple(map(ListedReplica.of, replicas)))


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


def _flaw_of(message: str, request: type[msgspec.Struct]) -> Flaw:
    """Say in our words what msgspec found: expected, got, and where as a JSON pointer."""
    problem, _, place = message.partition(" - at `")
    _, is_unknown, unknown = problem.partition("Object contains unknown field `")
    if is_unknown:
        where = ConfirmRequest if place else request
        fields = ", ".join(where.__struct_fields__)
        detail = f"expected no fields but {fields}, got {_cut(unknown.removesuffix('`'))!r}"
        return Flaw(pointer="/confirm" if place else "", detail=f"{detail} at /confirm" if place else detail)
    pointer = "".join(f"/{step}" for step in re.findall(r"\w+", place))
    expected, _, got = problem.replace("`", "").replace("Expected", "expected").partition(", got ")
    if not got:
        expected, got = "expected a value of the documented type", expected
    return Flaw(pointer=pointer, detail=f"{expected}, got {got} at {pointer or 'the top of the body'}")


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS_MAX else f"{text[:_SHOWN_CHARACTERS_MAX]}…"
