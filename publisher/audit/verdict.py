"""The verdict on a sampled invalidation: which replicas are not consistent with it. Pure functions, no I/O."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ...shared.invalidation import Position
from ...shared.question import Question, ReplicaAnswer
from .stats import Inconsistency

__all__ = ["Observation", "ServedEntries", "Signature", "inconsistencies", "served_entries", "signature_of"]

Signature: TypeAlias = frozenset[tuple[str, str | None, str | None]]


class ServedEntries(NamedTuple):
    """The position of a replica, and the fingerprints, one of each cache, that it would serve under each key."""

    position: Position | None
    fingerprints: Mapping[str, Sequence[str | None]]


@dataclass(frozen=True, slots=True)
class Observation:
    """One observation of the fleet.

    Shape:  in the order in which it is made: `newest` is the sequence of the newest invalidation of each key, `source`
            the fingerprints of the source's values, `replicas` the answers, by replica. `missing` are registered
            replicas that did not answer. `doubt` says why an unregistered replica may not have been queried.
    """

    newest: Mapping[str, int]
    source: Mapping[str, str]
    replicas: Mapping[str, ServedEntries]
    missing: Sequence[str]
    doubt: str | None

    @property
    def is_conclusive(self) -> bool:
        """Whether finding no inconsistency proves consistency: replicas answered, and none may have been left out."""
        return self.doubt is None and bool(self.replicas)


def served_entries(questions: Sequence[Question], answers: Sequence[ReplicaAnswer]) -> ServedEntries:
    """Combine one replica's answers to all questions of an observation."""
    fingerprints = {
        key: of_caches
        for question, answer in zip(questions, answers, strict=True)
        for key, of_caches in zip(question.entries, answer.fingerprints, strict=False)
    }
    # The position of the first answer: later answers are not older.
    return ServedEntries(answers[0].position, fingerprints)


def inconsistencies(
    observation: Observation, key: str | None, position: Position, within_seconds: float
) -> Iterator[Inconsistency]:
    """Yield the replicas that were not consistent with the invalidation of `key` at `position`."""
    for replica in observation.missing:
        yield Inconsistency(replica=replica, kind="missing", key=key, position=position, within_seconds=within_seconds)
    for replica, served in observation.replicas.items():
        if not _reaches(served.position, position):
            yield Inconsistency(
                replica=replica,
                kind="behind",
                key=key,
                position=position,
                replica_position=served.position,
                within_seconds=within_seconds,
            )
    if key is not None:
        yield from _differing(observation, key, position, within_seconds)


def _differing(
    observation: Observation, key: str, position: Position, within_seconds: float
) -> Iterator[Inconsistency]:
    """Yield the replicas that serve another value than the source, or than the majority of the up-to-date replicas.

    A replica is up to date if it has applied every invalidation of the key.
    """
    up_to_date = Position(position.epoch, max(observation.newest[key], position.sequence))
    by_cache: dict[int, dict[str, str]] = {}
    for replica, served in observation.replicas.items():
        if _reaches(served.position, up_to_date):
            for cache, fingerprint in enumerate(served.fingerprints.get(key, ())):
                if fingerprint:
                    by_cache.setdefault(cache, {})[replica] = fingerprint
    of_source = observation.source.get(key)
    for of_replicas in by_cache.values():
        expected = of_source or _majority(list(of_replicas.values()))
        for replica, fingerprint in of_replicas.items():
            if fingerprint != expected:
                yield Inconsistency(
                    replica=replica,
                    kind="differs",
                    key=key,
                    position=position,
                    replica_position=observation.replicas[replica].position,
                    within_seconds=within_seconds,
                    fingerprint=fingerprint,
                    expected=expected,
                    against="source" if of_source else "replicas",
                )


def signature_of(found: Sequence[Inconsistency]) -> Signature:
    """Return the differing values: the same ones must be seen again a little later before they prove anything."""
    return frozenset((each.replica, each.fingerprint, each.expected) for each in found if each.kind == "differs")


def _reaches(position: Position | None, other: Position) -> bool:
    return position is not None and position.reaches(other)


def _majority(fingerprints: Sequence[str]) -> str | None:
    """Return the most common fingerprint; None on a tie."""
    [(first, count), *others] = Counter(fingerprints).most_common(2)
    return None if others and others[0][1] == count else first
