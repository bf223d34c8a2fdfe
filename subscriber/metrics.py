"""The Prometheus metrics of a replica, all read at the scrape. What each metric means: docs/metrics.md."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol, get_args
from weakref import WeakKeyDictionary

from ..shared.telemetry.exposition import check_can_expose
from .cache.local_cache import LocalCache
from .cache.stats import CacheStats
from .following.sequencer import Sequencer
from .following.state import STATES_WORST_FIRST, Lag, State, SubscriberStats

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

__all__ = ["Measurable", "ReplicaCollector", "register", "unregister"]

_STATES: Final[tuple[State, ...]] = get_args(State)
_TARGET_KINDS: Final = ("keys", "tags", "prefixes", "everything")
# Listed before they happen: a series that appears only with its first event shows no increase to an alert.
_OUTCOMES: Final = ("applied", "malformed", "duplicate", "foreign", "unsequenced", "unlogged", "http")
_REASONS: Final = (
    *("subscribed", "server changed", "epoch changed", "log lost", "log trimmed", "log went back"),
    *("another history", "digest unknown", "log unreadable", "fell behind"),
    *("malformed", "requested", "mapping failed", "invalidation", "clear"),
)
_OF_CACHES: Final = {
    "hits": "Reads that were served from the local cache.",
    "misses": "Reads that found nothing in the local cache.",
    "bypassed": "Reads that went to the source because the cache was not coherent.",
    "loads": "Loads from the source.",
    "shared_loads": "Reads that waited for a load that another read had begun.",
    "voided_fills": "Loaded values that were not stored: an invalidation arrived while they were loaded.",
    "refused_fills": "Loaded values that were not stored: they were too large for the cache.",
    "unnameable_fills": "Loaded values that were not stored: no invalidation could name their key or tags.",
    "dropped": "Entries that were dropped by invalidations and clears.",
    "mapping_errors": "Errors that the wrapped mapping raised.",
}


class Measurable(Protocol):
    """A subscriber, as far as its metrics need it."""

    @property
    def replica_id(self) -> str:
        """The id of the replica."""
        ...

    @property
    def state(self) -> State:
        """The state of the subscriber."""
        ...

    @property
    def sequencers(self) -> Mapping[str, Sequencer]:
        """Position, counters, lag and caches of each namespace."""
        ...

    def stats(self) -> SubscriberStats:
        """Return the counters."""
        ...

    def measure_lag(self) -> None:
        """From now on, measure how late each invalidation is applied."""
        ...


class ReplicaCollector:
    """Collects the metrics of some subscribers at each scrape.

    Shape:  the counters of several caches of one namespace are added up; staleness is the highest of them, the bound
            the lowest.
    """

    def __init__(self) -> None:
        self._subscribers: dict[int, Measurable] = {}

    def add(self, subscriber: Measurable) -> None:
        """Add a subscriber, and make it measure its lag from now on. Adding it twice is harmless."""
        subscriber.measure_lag()
        self._subscribers[id(subscriber)] = subscriber

    def remove(self, subscriber: Measurable) -> bool:
        """Remove a subscriber; return whether any are left."""
        self._subscribers.pop(id(subscriber), None)
        return bool(self._subscribers)

    def describe(self) -> "Iterable[Metric]":
        """List the metrics without values: a registry uses it to check for duplicate names."""
        return self._families({})

    def collect(self) -> "Iterable[Metric]":
        """Read the metrics."""
        subscribers = list(self._subscribers.values())
        return self._families({each: dict(each.sequencers) for each in subscribers})

    def _families(self, watched: "dict[Measurable, dict[str, Sequencer]]") -> "Iterator[Metric]":
        yield from _of_subscribers(watched)
        namespaces = [
            ((subscriber.replica_id, namespace), sequencer)
            for subscriber, sequencers in watched.items()
            for namespace, sequencer in sequencers.items()
        ]
        yield from _of_sequencers(namespaces)
        yield from _of_caches([(labels, sequencer.caches) for labels, sequencer in namespaces])


_collectors: "WeakKeyDictionary[CollectorRegistry, ReplicaCollector]" = WeakKeyDictionary()


def register(subscriber: Measurable, registry: "CollectorRegistry | None" = None) -> None:
    """Add the metrics of this subscriber to `registry`, by default the one of prometheus_client.

    Several subscribers may share a registry. Registering one twice is harmless.

    Raises: InvalidSettings when prometheus_client is not installed.
    """
    registry = _checked_registry(registry)
    collector = _collectors.get(registry)
    if collector is None:
        collector = _collectors[registry] = ReplicaCollector()
        registry.register(collector)
    collector.add(subscriber)


def unregister(subscriber: Measurable, registry: "CollectorRegistry | None" = None) -> None:
    """Remove the metrics of this subscriber from the registry. Harmless when it has none.

    Raises: InvalidSettings when prometheus_client is not installed.
    """
    registry = _checked_registry(registry)
    collector = _collectors.get(registry)
    if collector is not None and not collector.remove(subscriber):
        del _collectors[registry]
        registry.unregister(collector)


def _checked_registry(registry: "CollectorRegistry | None") -> "CollectorRegistry":
    check_can_expose("the metrics of a subscriber")
    from prometheus_client import REGISTRY

    return REGISTRY if registry is None else registry


# --- the families -----------------------------------------------------------------------------------------------------


def _of_subscribers(watched: "dict[Measurable, dict[str, Sequencer]]") -> "Iterator[Metric]":
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels = ["replica"]
    state = GaugeMetricFamily(
        "broadcache_state", "1 for the current state of the subscriber.", labels=["replica", "state"]
    )
    received = CounterMetricFamily("broadcache_received", "Messages by outcome.", labels=["replica", "outcome"])
    replayed = CounterMetricFamily("broadcache_replayed", "Messages that were read from the log.", labels=labels)
    echoes = CounterMetricFamily("broadcache_echoes", "Proofs that the link delivers.", labels=labels)
    subscriptions = CounterMetricFamily("broadcache_subscriptions", "Subscriptions that were begun.", labels=labels)
    lost = CounterMetricFamily("broadcache_lost", "Links that were lost or could not be opened.", labels=labels)
    for replica, subscribers in _by_replica(watched).items():
        stats = [each.stats() for each in subscribers]
        current = min((each.state for each in subscribers), key=STATES_WORST_FIRST.index)
        for each in _STATES:
            state.add_metric([replica, each], each == current)
        counts: Counter[str] = Counter(dict.fromkeys(_OUTCOMES, 0))
        for one in stats:
            counts.update(one.received)
        replayed.add_metric([replica], counts.pop("replayed", 0))
        for outcome, count in counts.items():
            received.add_metric([replica, outcome], count)
        echoes.add_metric([replica], sum(one.echoes for one in stats))
        subscriptions.add_metric([replica], sum(one.subscriptions for one in stats))
        lost.add_metric([replica], sum(one.lost for one in stats))
    yield from (state, received, replayed, echoes, subscriptions, lost)


def _by_replica(watched: "Iterable[Measurable]") -> dict[str, list[Measurable]]:
    """Group subscribers by the id of their replica: several of one process may have the same, and a series is one."""
    grouped: dict[str, list[Measurable]] = {}
    for each in watched:
        grouped.setdefault(each.replica_id, []).append(each)
    return grouped


def _of_sequencers(namespaces: list[tuple[tuple[str, str], Sequencer]]) -> "Iterator[Metric]":
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    labels = ["replica", "namespace"]
    gaps = CounterMetricFamily("broadcache_gaps", "How often invalidations were found to be missing.", labels=labels)
    sequence = GaugeMetricFamily(
        "broadcache_position_sequence", "The sequence of the last invalidation that was applied.", labels=labels
    )
    lag = HistogramMetricFamily(
        "broadcache_lag_seconds", "From the sending of an invalidation to its apply, by two wall clocks.", labels=labels
    )
    for names, sequencer in namespaces:
        gaps.add_metric(names, sequencer.counts["gaps"])
        sequence.add_metric(names, sequencer.sequence)
        measured = sequencer.lag or Lag()
        lag.add_metric(names, measured.buckets(), measured.total)
    yield from (gaps, sequence, lag)


def _of_caches(namespaces: list[tuple[tuple[str, str], tuple[LocalCache, ...]]]) -> "Iterator[Metric]":
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels = ["replica", "namespace"]
    counters: dict[str, Any] = {
        name: CounterMetricFamily(f"broadcache_{name}", text, labels=labels) for name, text in _OF_CACHES.items()
    }
    applied = CounterMetricFamily(
        "broadcache_applied", "Names that were applied, by the kind of target.", labels=[*labels, "kind"]
    )
    clears = CounterMetricFamily(
        "broadcache_clears", "How often everything was dropped, by reason.", labels=[*labels, "reason"]
    )
    entries = GaugeMetricFamily("broadcache_entries", "Entries in the cache.", labels=labels)
    coherent = GaugeMetricFamily("broadcache_coherent", "1 while the cache is coherent.", labels=labels)
    staleness = GaugeMetricFamily(
        "broadcache_staleness_seconds", "How stale a local value can be at most; +Inf: unknown.", labels=labels
    )
    bound = GaugeMetricFamily("broadcache_max_staleness_seconds", "The bound of staleness.", labels=labels)
    for names, caches in namespaces:
        stats = [cache.stats() for cache in caches]
        for name, counter in counters.items():
            counter.add_metric(names, sum(getattr(each, name) for each in stats))
        for kind, count in _summed("applied", stats, _TARGET_KINDS).items():
            applied.add_metric([*names, kind], count)
        for reason, count in _summed("clears", stats, _REASONS).items():
            clears.add_metric([*names, reason], count)
        entries.add_metric(names, sum(each.entries for each in stats))
        coherent.add_metric(names, all(cache.is_coherent for cache in caches))
        staleness.add_metric(names, max(_staleness_of(cache) for cache in caches))
        bound.add_metric(names, min(cache.max_staleness_seconds for cache in caches))
    yield from (*counters.values(), applied, clears, entries, coherent, staleness, bound)


def _summed(field: str, stats: list[CacheStats], known: tuple[str, ...]) -> dict[str, int]:
    total: Counter[str] = Counter(dict.fromkeys(known, 0))
    for each in stats:
        total.update(getattr(each, field))
    return dict(total)


def _staleness_of(cache: LocalCache) -> float:
    return math.inf if cache.staleness_seconds is None else cache.staleness_seconds
