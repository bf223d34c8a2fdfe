"""The preview: how many entries of which replica an invalidation would drop. Nothing is dropped."""

from collections.abc import Sequence
from typing import Self

import msgspec

from ...shared.question import ReplicaAnswer
from .questions import Answers

__all__ = ["Preview", "ReplicaPreview"]


class ReplicaPreview(msgspec.Struct, frozen=True, kw_only=True):
    """How many entries of one replica the targets name. An estimate is extrapolated from a sample."""

    replica: str
    entries: int
    is_estimate: bool


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """How many live replicas there are, and about how many of their entries the targets name. Nothing is dropped.

    Shape:  `replicas` counts the replicas that are registered or answered, `entries` is the sum over those that
            answered, and `by_replica` lists these by name. `missing` are registered, or silent and set to serve, and
            did not answer in time: the sum lacks their entries, and is an estimate. Replicas of older versions never
            answer. `doubt` says why there may be replicas that were not queried: then, too, the sum is an estimate.
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
        """Sum up the answers of replicas."""
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
    # An entry that several parts of a large request name is counted once for each part.
    is_estimate = len(parts) > 1 or any(part.is_estimate for part in parts)
    return ReplicaPreview(replica=replica, entries=sum(part.count for part in parts), is_estimate=is_estimate)
