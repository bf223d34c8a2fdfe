"""The JSON that the API returns. Field names are those of the wire form."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from ....shared.confirmation import Confirmation, ReplicaConfirmation
from ....shared.fanout_report import FanoutReport
from ....shared.invalidation import Invalidation
from ....shared.presence import ReplicaPresence
from ....shared.receipt import Receipt
from ....shared.transport.redis.log import Entry
from ...history.namespaces import NamespacesPage, NamespaceSummary
from ...history.pages import HistoryPage

__all__ = [
    "Accepted",
    "Confirmed",
    "History",
    "ListedNamespace",
    "ListedNamespaces",
    "ListedPosition",
    "ListedReplica",
    "LoggedInvalidation",
    "Replicas",
    "UnreadableEntry",
    "shown",
]


class Confirmed(msgspec.Struct, frozen=True, kw_only=True):
    """Which replicas have reported that they applied it. `expected` were registered when it was published.

    Replicas that are `missing` may serve the dropped entries until their staleness bound, or longer if they are set to
    serve while incoherent. Those that are `silent` serve nothing, and those that are `not_followed` answered by HTTP
    that no subscriber of their process follows the namespace. `doubt` says why there may be
    replicas that the registry does not list, which may serve them as well; null when there is no such reason.
    `is_complete`: no replica is missing, there is no doubt, and at least one applied it if some do not follow it.
    """

    is_complete: bool
    expected: tuple[str, ...]
    confirmed: tuple[str, ...]
    missing: tuple[str, ...]
    silent: tuple[str, ...]
    not_followed: tuple[str, ...]
    doubt: str | None
    replicas: tuple[ReplicaConfirmation, ...]


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """The invalidation is delivered: `logged` says whether the log has it; if not, `fanout` reached every replica.

    `epoch` and `sequence` are its position in the namespace's log (of its last part, when it was split); null when it
    is not logged. `receivers` counts subscribed connections, which does not prove that a replica applied it. `pending`:
    it waits to be logged until Redis is back. `fanout` reports the HTTP calls to replicas; null when there were none.
    `confirmation` is present when the request asked for it.
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
        """Convert a receipt."""
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
        silent=confirmation.silent,
        not_followed=confirmation.not_followed,
        doubt=confirmation.doubt,
        replicas=confirmation.replicas,
    )


class ListedPosition(msgspec.Struct, frozen=True, kw_only=True):
    """A position in a namespace's log. Sequences of different epochs cannot be compared."""

    epoch: str
    sequence: int


class ListedReplica(msgspec.Struct, frozen=True, kw_only=True):
    """One replica as of its last echo, `seen_ms_ago`; `staleness_seconds` and the booleans are as of now.

    `staleness_seconds` is how long ago everything accepted was last proven to be applied there; it may serve from its
    cache while that is below `max_staleness_seconds`. `namespaces` are the first 16 of `namespaces_count`.
    `behind` is null when its epoch is not that of the log.
    `state` is `coherent`, `recovering`, `connecting`, `lost`, or `unknown`. Counters begin when the replica starts;
    `lag_ms` is the difference of two machines' wall clocks. `is_silent`: it has not left, and its registration has
    ended; it is listed for a day, or until DELETE. `may_serve` is false if it then serves nothing from its caches.
    `conflict` names other processes that use the same id; empty if there is none.
    """

    replica: str
    namespaces: tuple[str, ...]
    namespaces_count: int
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
    is_silent: bool
    may_serve: bool
    conflict: str

    @classmethod
    def of(cls, replica: ReplicaPresence) -> "ListedReplica":
        """Convert a presence."""
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
        """Convert presences."""
        return cls(namespace=namespace, replicas=tuple(map(ListedReplica.of, replicas)))


class ListedNamespace(msgspec.Struct, frozen=True, kw_only=True):
    """A namespace. `last_sent_at` is when its newest logged invalidation was sent, by its publisher's clock.

    `head` is null when it was lost. `registered` counts the replicas that follow it, `silent` those that fell silent
    within a day and serve nothing, `silent_serving` those that may serve. `memory_bytes` is that of the head and the
    log; null when Redis does not tell.
    """

    namespace: str
    head: ListedPosition | None
    log_length: int
    last_sent_at: str | None
    registered: int
    silent: int
    silent_serving: int
    memory_bytes: int | None

    @classmethod
    def of(cls, summary: NamespaceSummary) -> "ListedNamespace":
        """Convert a summary."""
        return cls(
            namespace=summary.namespace,
            head=summary.head and ListedPosition(**summary.head._asdict()),
            log_length=summary.log_length,
            last_sent_at=_rfc_3339(summary.last_sent_at_ms),
            memory_bytes=summary.memory_bytes,
            **summary.replicas._asdict(),
        )


class ListedNamespaces(msgspec.Struct, frozen=True, kw_only=True):
    """Some namespaces, by name. `next_after` is the `after` of the next page; null when there are no more."""

    namespaces: tuple[ListedNamespace, ...]
    next_after: str | None

    @classmethod
    def of(cls, page: NamespacesPage) -> "ListedNamespaces":
        """Convert a page."""
        return cls(namespaces=tuple(map(ListedNamespace.of, page.namespaces)), next_after=page.next_after)


class LoggedInvalidation(msgspec.Struct, frozen=True, kw_only=True):
    """One invalidation of the log. `sent_at` is the publisher's clock (RFC 3339): for people, never for order.

    `sequence` and `epoch` are null when it was published past the log; only GET /events shows such invalidations.
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
    """An entry of the log that is not a valid invalidation: replicas drop everything when they read it."""

    sequence: int
    unreadable: bool = True


class History(msgspec.Struct, frozen=True, kw_only=True):
    """A page of a namespace's log, the newest first. `next_before` is the next page's `before`; null on the last.

    `examined` is how many entries were read for it. With a filter, a page may have few or no results although the next
    page has some.
    """

    namespace: str
    # Not a union of the two: msgspec has no schema for a union of objects without a common tag.
    invalidations: tuple[Any, ...]
    next_before: int | None
    examined: int

    @classmethod
    def of(cls, namespace: str, page: HistoryPage) -> "History":
        """Convert a page of the log."""
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
    """Convert an invalidation; `sequence` is its place in the log."""
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
    except (OverflowError, ValueError, OSError):  # the sender's clock is beyond the year 9999
        return None
