"""The Prometheus metrics of a publisher. What each metric means: docs/metrics.md."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol, get_args

from ...shared.telemetry.exposition import check_can_expose
from ...shared.telemetry.histogram import Histogram
from ...shared.transport.redis.registry import ReplicaCounts
from .metric import Metric as Number
from .observer import CalledAddress, CallResult

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

__all__ = ["PublisherMetrics"]

_PUBLISH_OUTCOMES: Final = ("accepted", "repeat", "fanned out", "refused", "unreachable", "not delivered", "conflict")
_CALL_RESULTS: Final[tuple[CallResult, ...]] = get_args(CallResult)


class HasMetrics(Protocol):
    """A source of further metrics, such as an audit."""

    def metrics(self) -> Iterable[Number]:
        """Yield every metric, under its Prometheus name."""
        ...


class PublisherMetrics:
    """Counts the publishes, broadcasts and HTTP requests of a publisher: an observer, and a collector for a registry.

    Shape:  `replicas` are the replicas of each namespace, as they were counted last: set it before each scrape.
            `Publisher(url, observer=metrics)` and `Broadcaster(…, observer=metrics)` report to it. `registry` is the
            one that is scraped; without it a new one is made. `publisher` gives the length of its retry queue, `audits`
            the counters of each audit.
    Raises: InvalidSettings when prometheus_client is not installed.
    """

    def __init__(
        self,
        registry: "CollectorRegistry | None" = None,
        *,
        publisher: object = None,
        audits: Callable[[], Iterable[HasMetrics]] = tuple,
    ) -> None:
        check_can_expose("the metrics of a publisher")
        from prometheus_client import CollectorRegistry, ProcessCollector

        self.replicas: Mapping[str, ReplicaCounts] = {}
        self._publisher = publisher
        self._audits = audits
        self._publishes: Counter[tuple[str, str]] = Counter()
        self._publish_seconds: defaultdict[str, Histogram] = defaultdict(Histogram)
        self._broadcasts: Counter[tuple[str, str]] = Counter()
        self._addresses: Counter[tuple[str, str]] = Counter()
        self._broadcast_seconds: defaultdict[str, Histogram] = defaultdict(Histogram)
        self._requests: Counter[tuple[str, str, str]] = Counter()
        self.registry: Final = CollectorRegistry() if registry is None else registry
        if registry is None:
            ProcessCollector(registry=self.registry)
        self.registry.register(self)

    # --- the observer ------------------------------------------------------------------------------------------------

    def published(self, namespace: str, outcome: str, seconds: float) -> None:
        """Count a publish."""
        if namespace not in self._publish_seconds:
            self._publishes.update({(namespace, each): 0 for each in _PUBLISH_OUTCOMES})
        self._publishes[namespace, outcome] += 1
        self._publish_seconds[namespace].observe(seconds)

    def broadcast(
        self, service: str, addresses: tuple[CalledAddress, ...], seconds: float, *, is_complete: bool
    ) -> None:
        """Count a broadcast, and the result of each address."""
        is_whole = is_complete and all(address.result == "success" for address in addresses)
        self._add_service(service)
        self._broadcasts[service, "all" if is_whole else "not all"] += 1
        self._addresses.update((service, address.result) for address in addresses)
        self._broadcast_seconds[service].observe(seconds)

    def not_broadcast(self, service: str, why: str) -> None:
        """Count a broadcast that called no address."""
        self._add_service(service)
        self._broadcasts[service, "nobody"] += 1

    def answered(self, method: str, route: str, status: int) -> None:
        """Count an HTTP request."""
        self._requests[method, route, str(status)] += 1

    def _add_service(self, service: str) -> None:
        """Start all series of a service at 0: an alert sees no increase in one that appears with its first event."""
        if (service, "all") not in self._broadcasts:
            self._broadcasts.update({(service, each): 0 for each in ("all", "not all", "nobody")})
            self._addresses.update({(service, each): 0 for each in _CALL_RESULTS})

    # --- the collector -----------------------------------------------------------------------------------------------

    def describe(self) -> "Iterable[Metric]":
        """Return the metrics, for a registry that checks for duplicate names."""
        return self.collect()

    def collect(self) -> "Iterator[Metric]":
        """Yield the metrics with their current values."""
        from prometheus_client.core import GaugeMetricFamily

        yield _counter("broadcache_publishes", "Publishes by outcome.", ["namespace", "outcome"], self._publishes)
        yield _histogram(
            "broadcache_publish_duration_seconds",
            "From the call to its outcome, with all attempts.",
            "namespace",
            self._publish_seconds,
        )
        yield _counter(
            "broadcache_http_requests",
            "HTTP requests by route and status.",
            ["method", "route", "status"],
            self._requests,
        )
        yield _counter(
            "broadcache_broadcasts", "Broadcasts by whom they reached.", ["service", "reached"], self._broadcasts
        )
        yield _counter(
            "broadcache_broadcast_addresses",
            "Addresses that were called, by result.",
            ["service", "result"],
            self._addresses,
        )
        yield _histogram(
            "broadcache_broadcast_duration_seconds",
            "From the look-up of a service to the last answer.",
            "service",
            self._broadcast_seconds,
        )
        yield GaugeMetricFamily(
            "broadcache_retry_queue_length",
            "Invalidations that wait for Redis to come back.",
            value=getattr(self._publisher, "retry_queue_length", 0) or 0,
        )
        replicas = GaugeMetricFamily(
            "broadcache_replicas",
            "Replicas that are registered, silent (serve nothing), and silent and may serve.",
            labels=["namespace", "state"],
        )
        for namespace, counts in self.replicas.items():
            for state, count in counts._asdict().items():
                replicas.add_metric([namespace, state.replace("_", " ")], count)
        yield replicas
        yield from _audited(self._audits())


def _counter(name: str, text: str, labels: list[str], counts: "Counter[Any]") -> "Metric":
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in counts.copy().items():
        family.add_metric(values, count)
    return family


def _histogram(name: str, text: str, label: str, histograms: dict[str, Histogram]) -> "Metric":
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(name, text, labels=[label])
    for value, histogram in histograms.copy().items():
        family.add_metric([value], histogram.buckets(), histogram.total)
    return family


def _audited(audits: Iterable[HasMetrics]) -> "Iterable[Metric]":
    """Return the metric families of all audits: each family once, with the labels of every namespace."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for metric in (metric for stats in audits for metric in stats.metrics()):
        family = families.get(metric.name)
        if family is None:
            new = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = families[metric.name] = new(metric.name, metric.description, labels=list(metric.labels))
        family.add_metric(list(metric.labels.values()), metric.value)
    return families.values()
