"""Confirmation: what replicas report when they have applied an invalidation, and what a publisher makes of it."""

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
    "decode_reports",
    "encode_reports",
]

CONFIRM_SECONDS_MAX: Final = 60.0
"""The longest that a publish may wait for replicas."""


@dataclass(frozen=True, slots=True)
class Confirm:
    """Have a publish wait until every replica that is there has applied it.

    Units:  `timeout_seconds` counts from when the log has accepted it; above 0, at most 60.
    Raises: InvalidSettings.
    """

    timeout_seconds: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.timeout_seconds <= CONFIRM_SECONDS_MAX:
            raise InvalidSettings(
                f"expected timeout_seconds to be above 0 and at most {CONFIRM_SECONDS_MAX:g}, "
                f"got {self.timeout_seconds!r}"
            )


class ReplicaConfirmation(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one replica and one invalidation.

    Shape:  `is_expected` is false for a replica that was not registered when it was published, and confirmed all the
            same. `how` is `message` when it reported, `echo` when its proven position reaches it in the history of the
            log, `http` when it answered to a fan-out; null when it is missing.
            `dropped` counts entries dropped; null where that is not known: prefixes and large tags are swept later.
    Units:  `latency_ms` is from before the log was asked until the publisher knew, on the publisher's clock.
    """

    replica: str
    outcome: Literal["confirmed", "missing"]
    is_expected: bool = True
    latency_ms: float | None = None
    dropped: int | None = None
    how: Literal["message", "echo", "http"] | None = None


class Confirmation(msgspec.Struct, frozen=True, kw_only=True):
    """Which replicas have applied an invalidation, each by its own report.

    Shape:  `replicas` has those that were expected and those that confirmed unasked, by name. `doubt` says why there
            may be others, which were not expected and may serve what is to be dropped; None when there are none.
    """

    replicas: tuple[ReplicaConfirmation, ...]
    doubt: str | None = None

    @property
    def expected(self) -> tuple[str, ...]:
        """The replicas that were registered when it was published."""
        return tuple(each.replica for each in self.replicas if each.is_expected)

    @property
    def confirmed(self) -> tuple[str, ...]:
        """The replicas that have applied it."""
        return tuple(each.replica for each in self.replicas if each.outcome == "confirmed")

    @property
    def missing(self) -> tuple[str, ...]:
        """The replicas of which that is not known: they may serve what they were told to drop, up to their bound."""
        return tuple(each.replica for each in self.replicas if each.outcome == "missing")

    @property
    def is_complete(self) -> bool:
        """Whether no replica is missing, and there is no doubt about which ones there are."""
        return not self.missing and self.doubt is None


class Report(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One invalidation, or one part of it, that a replica has applied.

    Shape:  `digest` is that of the whole frame: the report speaks of this frame, and of no other. `outcome` is a text
            that later versions may add to; `dropped` is null where it is not known.
    Units:  `lag_ms` is the replica's Unix clock less the sender's: for people, and wrong by what the clocks differ.
    """

    id: str
    epoch: str | None = None
    seq: int | None = None
    digest: str | None = None
    outcome: str = "applied"
    dropped: int | None = None
    lag_ms: float | None = None


class Reports(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message on the channel for confirmations: what one replica has applied, in that order, or what it answers."""

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
    Raises: MalformedFrame and nothing else. It proves nothing then, and nothing is lost: who reported stays missing.
    Source: docs/wire-format.md, Confirmations.
    """
    try:
        return _decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFrame(f"invalid confirmation: {error}; it begins {frame[:60]!r}") from error
