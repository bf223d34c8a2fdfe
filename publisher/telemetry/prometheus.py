"""What a publisher tells Prometheus. What each metric means: docs/metrics.md."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol

from ...shared.telemetry.exposition import check_can_expose
from ...shared.telemetry.histogram import Histogram
from .metric import Metric as Number
from .observer import CalledAddress

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

__all__ = ["PublisherMetrics"]

_PUBLISH_OUTCOMES: Final = ("accepted", "repeat", "fanned out", "refused", "unreachable", "not delivered", "conflict")
_ADDRESS_RESULTS: Final = ("success", "status", "not applied", "refused", "timeout", "not tried", "failed")
# What publisher/exchange.py and broadcaster.py say when there is no answer.
_RESULT_OF_ERROR: Final = (
    ("connection refused", "refused"),
    ("no connection within", "timeout"),
    ("no answer within", "timeout"),
    ("not tried", "not tried"),
)


class HasMetrics(Protocol):
    """What yields numbers of its own, as an audit does."""

    def metrics(self) -> Iterable[Number]:
        """Yield every number, named for Prometheus."""
        ...


class PublisherMetrics:
    """Counts what a publisher, its fan-out and its HTTP API do: an `Observer`, and a collector for a registry.

    Shape:  `Publisher(url, observer=metrics)` and `Broadcaster(…, observer=metrics)` tell it; `registry` is what is
            scraped, one of its own when it is left out. `publisher` is asked for the length of its retry queue,
            `audits` for the counters of each audit.
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

    # --- what it is told ---------------------------------------------------------------------------------------------

    def published(self, namespace: str, outcome: str, seconds: float) -> None:
        """Count a publish."""
        if namespace not in self._publish_seconds:
            self._publishes.update({(namespace, each): 0 for each in _PUBLISH_OUTCOMES})
        self._publishes[namespace, outcome] += 1
        self._publish_seconds[namespace].observe(seconds)

    def broadcast(
        self, service: str, addresses: tuple[CalledAddress, ...], seconds: float, *, is_complete: bool
    ) -> None:
        """Count a broadcast, and what came of each address."""
        results = [_result_of(address) for address in addresses]
        is_whole = is_complete and all(result == "success" for result in results)
        self._add_service(service)
        self._broadcasts[service, "all" if is_whole else "not all"] += 1
        self._addresses.update((service, result) for result in results)
        self._broadcast_seconds[service].observe(seconds)

    def not_broadcast(self, service: str, why: str) -> None:
        """Count a broadcast that called nobody."""
        self._add_service(service)
        self._broadcasts[service, "nobody"] += 1

    def answered(self, method: str, route: str, status: int) -> None:
        """Count an HTTP request."""
        self._requests[method, route, str(status)] += 1

    def _add_service(self, service: str) -> None:
        """Begin all its series at once: one that appears with its first event has no rise that an alert could see."""
        if (service, "all") not in self._broadcasts:
            self._broadcasts.update({(service, each): 0 for each in ("all", "not all", "nobody")})
            self._addresses.update({(service, each): 0 for each in _ADDRESS_RESULTS})

    # --- what it tells -----------------------------------------------------------------------------------------------

    def describe(self) -> "Iterable[Metric]":
        """Name the metrics: for a registry that checks whether two have one name."""
        return self.collect()

    def collect(self) -> "Iterator[Metric]":
        """Return the metrics as they are now."""
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
    """Return the families of all audits: each family once, with the labels of every namespace."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for metric in (metric for stats in audits for metric in stats.metrics()):
        family = families.get(metric.name)
        if family is None:
            new = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = families[metric.name] = new(metric.name, metric.description, labels=list(metric.labels))
        family.add_metric(list(metric.labels.values()), metric.value)
    return families.values()


def _result_of(address: CalledAddress) -> str:
    if address.status_code is not None:
        if not 200 <= address.status_code < 300:
            return "status"
        return "success" if address.error is None else "not applied"
    error = address.error or ""
    return next((result for beginning, result in _RESULT_OF_ERROR if error.startswith(beginning)), "failed")
