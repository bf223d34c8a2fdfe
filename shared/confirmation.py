"""Confirmation: the reports that replicas send after applying an invalidation, and the publisher's result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from .errors import InvalidSettings, MalformedFrame
from .question import ReplicaAnswer

__all__ = [
    "CONFIRM_SECONDS_MAX",
    "Confirm",
    "Confirmation",
    "ReplicaConfirmation",
    "Report",
    "Reports",
    "checked_confirm",
    "decode_reports",
    "encode_reports",
]

CONFIRM_SECONDS_MAX: Final = 60.0
"""The longest that a publish may wait for replicas."""


@dataclass(frozen=True, slots=True)
class Confirm:
    """Makes a publish wait until every registered replica has applied the invalidation.

    Units:  `timeout_seconds` counts from when the log has accepted the invalidation; above 0, at most 60.
    Raises: InvalidSettings.
    """

    timeout_seconds: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.timeout_seconds <= CONFIRM_SECONDS_MAX:
            raise InvalidSettings(
                f"expected timeout_seconds to be above 0 and at most {CONFIRM_SECONDS_MAX:g}, "
                f"got {self.timeout_seconds!r}"
            )


def checked_confirm(confirm: object) -> Confirm:
    """Return what makes a publish wait. Raises: InvalidSettings."""
    if not isinstance(confirm, Confirm):
        raise InvalidSettings(
            f"expected confirm to be Confirm(timeout_seconds=…) or None, got {type(confirm).__name__}: {confirm!r:.100}"
        )
    return confirm


class ReplicaConfirmation(msgspec.Struct, frozen=True, kw_only=True):
    """Whether one replica has confirmed one invalidation.

    Shape:  `outcome` is `missing` for an expected replica that has not confirmed; `silent` for one that is not
            expected, because its registration has ended and it then serves nothing; `not followed` for one that is
            not expected, and answered that no subscriber of its process follows the namespace. `is_expected` is false
            for a replica that was not registered at the time of the publish, nor silent and set to serve. `how` is
            `message` when the replica sent a report, `echo` when its proven position reaches the invalidation in the
            history of the log, `http` when it answered a fan-out request; null when it has not confirmed. `dropped` is
            the number of entries dropped; null where it is not known: prefixes and large tags are swept later.
    Units:  `latency_ms` is from before the call to the log until the publisher knew, on the publisher's clock.
            `silent_ms` is how long ago the registration of a silent replica ended, on the server's clock, and
            `seen_ms_ago` how long ago its last echo reached the server; both null for other replicas, the latter also
            when it is not known.
    """

    replica: str
    outcome: Literal["confirmed", "missing", "silent", "not followed"]
    is_expected: bool = True
    latency_ms: float | None = None
    dropped: int | None = None
    how: Literal["message", "echo", "http"] | None = None
    silent_ms: int | None = None
    seen_ms_ago: int | None = None


class Confirmation(msgspec.Struct, frozen=True, kw_only=True):
    """Which replicas have applied an invalidation.

    Shape:  `replicas` has the expected replicas, and others that confirmed, fell silent or do not follow the namespace,
            by name. `doubt` says why other replicas may exist, which were not expected and may serve old values; None
            when none can.
    """

    replicas: tuple[ReplicaConfirmation, ...]
    doubt: str | None = None

    @property
    def expected(self) -> tuple[str, ...]:
        """The replicas that could serve from their caches when the invalidation was published."""
        return tuple(each.replica for each in self.replicas if each.is_expected)

    @property
    def confirmed(self) -> tuple[str, ...]:
        """The replicas that have applied it."""
        return tuple(each.replica for each in self.replicas if each.outcome == "confirmed")

    @property
    def missing(self) -> tuple[str, ...]:
        """The expected replicas that have not confirmed: they may serve old values, up to their staleness bound.

        Without a bound if they are set to serve while incoherent.
        """
        return tuple(each.replica for each in self.replicas if each.outcome == "missing")

    @property
    def silent(self) -> tuple[str, ...]:
        """The replicas that fell silent, and serve nothing from their caches: they are not missing."""
        return tuple(each.replica for each in self.replicas if each.outcome == "silent")

    @property
    def not_followed(self) -> tuple[str, ...]:
        """The replicas that answered by HTTP that no subscriber of their process follows the namespace."""
        return tuple(each.replica for each in self.replicas if each.outcome == "not followed")

    @property
    def is_complete(self) -> bool:
        """Whether no replica is missing, and no unlisted replica can exist.

        When replicas answered that they do not follow the namespace, at least one other must have applied it.
        """
        return not self.missing and self.doubt is None and bool(self.confirmed or not self.not_followed)


class Report(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One invalidation, or one part of it, that a replica has applied.

    Shape:  `digest` is that of the whole frame: the report is about this frame and no other. Later versions may add
            values of `outcome`. `dropped` is null where it is not known.
    Units:  `lag_ms` is the replica's Unix clock minus the sender's: for people, and off by the clocks' difference.
    """

    id: str
    epoch: str | None = None
    seq: int | None = None
    digest: str | None = None
    outcome: str = "applied"
    dropped: int | None = None
    lag_ms: float | None = None


class Reports(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message on the confirmation channel: one replica's reports, in the order of applying, or its answers."""

    replica: str
    reports: tuple[Report, ...] = ()
    answers: tuple[ReplicaAnswer, ...] = ()


_decoder = msgspec.json.Decoder(Reports)


def encode_reports(replica_id: str, reports: Sequence[Report] = (), answers: Sequence[ReplicaAnswer] = ()) -> bytes:
    """Write one message for the channel `names_of(namespace).confirmed`."""
    return msgspec.json.encode(Reports(replica=replica_id, reports=tuple(reports), answers=tuple(answers)))


def decode_reports(frame: bytes) -> Reports:
    """Read one message of that channel.

    Shape:  UTF-8 JSON object; unknown fields are skipped.
    Raises: MalformedFrame and nothing else. The message then confirms nothing, and its sender stays missing.
    Source: docs/wire-format.md, Confirmations.
    """
    try:
        return _decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFrame(f"invalid confirmation: {error}; it begins {frame[:60]!r}") from error
