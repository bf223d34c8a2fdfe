"""The preview: how many entries an invalidation would drop, and where, without dropping any."""

from collections.abc import Sequence
from typing import Self

import msgspec

from ...shared.question import ReplicaAnswer
from .questions import Answers

__all__ = ["Preview", "ReplicaPreview"]


class ReplicaPreview(msgspec.Struct, frozen=True, kw_only=True):
    """How many entries of one replica are named. An estimate is scaled up from a part of them."""

    replica: str
    entries: int
    is_estimate: bool


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """How many live replicas there are, and about how many of their entries the targets name. Nothing is dropped.

    Shape:  `replicas` counts those that are there, `entries` is the sum of those that answered, `by_replica` has each
            of these by name. `missing` are there and did not answer in time: their entries are not in the sum, which is
            an estimate then. Replicas of older versions never answer. `doubt` says why there may be replicas that were
            not asked: the sum is an estimate then, too.
    """

    namespace: str
    replicas: int
    entries: int
    is_estimate: bool
    by_replica: tuple[ReplicaPreview, ...]
    missing: tuple[str, ...]
    doubt: str | None

    @classmethod
    def of(cls, namespace: str, answers: Answers) -> Self:
        """Return what replicas have answered."""
        by_replica = tuple(_of_one(replica, parts) for replica, parts in answers.by_replica.items())
        return cls(
            namespace=namespace,
            replicas=len(by_replica) + len(answers.missing),
            entries=sum(each.entries for each in by_replica),
            is_estimate=bool(answers.missing or answers.doubt) or any(each.is_estimate for each in by_replica),
            by_replica=by_replica,
            missing=tuple(answers.missing),
            doubt=answers.doubt,
        )


def _of_one(replica: str, parts: Sequence[ReplicaAnswer]) -> ReplicaPreview:
    # An entry that several parts of a large request name is counted for each.
    is_estimate = len(parts) > 1 or any(part.is_estimate for part in parts)
    return ReplicaPreview(replica=replica, entries=sum(part.count for part in parts), is_estimate=is_estimate)
