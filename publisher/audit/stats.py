"""The results of an audit: the shares of consistent invalidations, and the replicas that were not consistent."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final, Literal, TypeAlias, get_args

import msgspec

from ...shared.invalidation import Position
from ..telemetry.metric import Metric

__all__ = ["COUNTS", "AuditStats", "Inconsistency", "InconsistencyKind", "Within"]

InconsistencyKind: TypeAlias = Literal["missing", "behind", "differs"]
COUNTS: Final = ("seen", "sampled", "left_out", "undecided", "unasked", "failures", "source_failures")
"""The counters that do not depend on a timescale."""
_KINDS: Final[tuple[str, ...]] = get_args(InconsistencyKind)


class Inconsistency(msgspec.Struct, frozen=True, kw_only=True):
    """One replica that was not consistent with one invalidation, some time after it.

    Shape:  `kind` is `missing` if it did not answer, `behind` if it had not applied the invalidation, `differs` if it
            had, and would serve another value than `against`: the source, or the majority of the replicas. Without a
            majority `expected` is null, and each replica that disagrees is named. `position` is the invalidation's
            place in the log, `replica_position` the replica's. `key` is null where only positions can be compared.
    Units:  `within_seconds` is the timescale at which it was queried.
    """

    replica: str
    kind: InconsistencyKind
    key: str | None
    position: Position
    replica_position: Position | None = None
    within_seconds: float
    fingerprint: str | None = None
    expected: str | None = None
    against: Literal["source", "replicas"] | None = None

    def __str__(self) -> str:
        named = "" if self.key is None else f" of {self.key}"
        return (
            f"{self.replica}: {self._what}, {self.within_seconds:g} s after the invalidation{named} "
            f"at {self.position.sequence}"
        )

    @property
    def _what(self) -> str:
        at = "no position" if self.replica_position is None else str(self.replica_position.sequence)
        if self.kind == "missing":
            return "did not answer"
        if self.kind == "behind":
            return f"has not applied it: it is at {at}"
        serves = f"is at {at} and serves {self.fingerprint}"
        if self.expected is None:
            return f"{serves}, other replicas serve other values"
        return f"{serves}, {'the source has' if self.against == 'source' else 'most replicas serve'} {self.expected}"


class Within(msgspec.Struct, frozen=True, kw_only=True):
    """How many sampled invalidations all replicas were consistent with, at one timescale after them.

    Shape:  `inconsistencies` counts the replicas that were not, by kind: one for each invalidation.
    """

    seconds: float
    judged: int = 0
    consistent: int = 0
    inconsistencies: dict[str, int] = {}

    @property
    def share(self) -> float | None:
        """The share that was consistent; None when none was judged."""
        return self.consistent / self.judged if self.judged else None

    @property
    def nines(self) -> float | None:
        """The share as a number of nines: 3.0 is 99.9 %. None when none was inconsistent, or none judged."""
        if self.consistent == self.judged:
            return None
        return math.log10(self.judged / (self.judged - self.consistent))


class AuditStats(msgspec.Struct, frozen=True, kw_only=True):
    """The counters of one audit since it began.

    Shape:  `seen` counts invalidations in the log, `sampled` those that were chosen, `pending` those not yet checked at
            every timescale, `left_out` those chosen while too many were pending. `undecided` counts answers that could
            not be compared because of newer invalidations of the same key. `unasked` counts checks without a replica,
            or where one may not have been queried: a registry that is new or was lost may not list it. `failures`
            counts rounds that Redis did not answer, `source_failures` failed reads of the source.
    """

    namespace: str
    seen: int
    sampled: int
    pending: int
    left_out: int
    undecided: int
    unasked: int
    failures: int
    source_failures: int
    within: tuple[Within, ...]

    @property
    def inconsistencies(self) -> dict[str, int]:
        """How many replicas were found inconsistent, by kind, at all timescales together."""
        return dict(sum((Counter(each.inconsistencies) for each in self.within), Counter[str]()))

    @property
    def is_consistent(self) -> bool:
        """Whether nothing inconsistent has been found."""
        return all(each.judged == each.consistent for each in self.within)

    @property
    def has_judged(self) -> bool:
        """Whether at least one invalidation was judged: otherwise nothing is known."""
        return any(each.judged for each in self.within)

    @property
    def found_nobody(self) -> bool:
        """Whether every check was `unasked`: then nothing is known."""
        return self.unasked > 0 and not any(each.judged for each in self.within)

    def metrics(self) -> Iterator[Metric]:
        """Yield every metric, under its Prometheus name, including zeros; a share is left out until it is known."""
        of = {"namespace": self.namespace}
        for name in COUNTS:
            described = f"Audit: {name.replace('_', ' ')}"
            yield Metric(f"broadcache_audit_{name}_total", "counter", described, of, getattr(self, name))
        yield Metric("broadcache_audit_pending", "gauge", "Audit: sampled and not yet judged", of, self.pending)
        for each in self.within:
            yield from _metrics_within(each, {**of, "within": f"{each.seconds:g}"})


def _metrics_within(within: Within, labels: Mapping[str, str]) -> Iterator[Metric]:
    for name, value in (("judged", within.judged), ("consistent", within.consistent)):
        described = f"Audit: sampled invalidations that were {name} at a timescale in seconds"
        yield Metric(f"broadcache_audit_{name}_total", "counter", described, labels, value)
    # Nothing was judged: neither 1 nor 0 would be true.
    if within.share is not None:
        described = "Audit: the share that was consistent, of all that were judged"
        yield Metric("broadcache_audit_consistent_ratio", "gauge", described, labels, within.share)
    for kind in _KINDS:
        described, count = "Audit: replicas found inconsistent, by how", within.inconsistencies.get(kind, 0)
        yield Metric("broadcache_audit_inconsistencies_total", "counter", described, {**labels, "kind": kind}, count)
