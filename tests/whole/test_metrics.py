"""What Prometheus is told: scraped from real processes' applications, and held against the documents that name it."""

import asyncio
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import httpx2
import pytest
import yaml
from cachetools import TTLCache
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics_families
from prometheus_client.parser import text_string_to_metric_families
from tests.support.liars import RevivingCache
from tests.support.paths import ROOT
from tests.support.pods import Pods, answers, as_replica, hangs, resets
from tests.support.redis_probe import redis_probe
from tests.support.registry import make_registry_old
from tests.support.replicas import FAST, fill, new_cache, reached
from tests.support.source import source_over_http
from tests.support.waiting import PATIENCE_SECONDS, until
from tests.support.web_server import served

from broadcache.publisher import Auditor, Publisher
from broadcache.publisher.api.app import create_app, create_fanout_app
from broadcache.publisher.api.settings import ApiSettings, FanoutSettings
from broadcache.publisher.fanout.broadcaster import Broadcaster, Limits, Request
from broadcache.publisher.fanout.discovery import ListDiscovery
from broadcache.publisher.fanout.policy import FanoutPolicy
from broadcache.publisher.fanout.response import NoResponse
from broadcache.publisher.telemetry.prometheus import PublisherMetrics
from broadcache.shared import Everything, Keys, LinkLost, LogRefused, Prefixes, Tags
from broadcache.shared.confirmation import Confirm
from broadcache.shared.telemetry.histogram import Histogram
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.log import names_of
from broadcache.subscriber import CacheInvalidationMixin, LocalCache, Subscriber
from broadcache.subscriber.following.state import Lag
from broadcache.subscriber.metrics import register, unregister

pytestmark = pytest.mark.anyio

PAGE = (ROOT / "docs" / "metrics.md").read_text()
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
ALERTS: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "alerts.yaml").read_text())

AUDIT = "broadcache_audit_"

Labels = frozenset[tuple[str, str]]


class Scrape:
    """One scrape, read by Prometheus' own parser."""

    def __init__(self, text: str, *, is_open_metrics: bool = False) -> None:
        self.families = list((open_metrics_families if is_open_metrics else text_string_to_metric_families)(text))
        samples = [sample for family in self.families for sample in family.samples]
        self.names = {sample.name for sample in samples}
        self._values = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
        assert len(self._values) == len(samples), "two samples have one name and the same labels"

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that have these labels; at least one does."""
        found = [value for (each, has), value in self._values.items() if each == name and labels.items() <= set(has)]
        assert found, f"no sample {name}{labels}"
        return math.fsum(found)

    def is_one(self, name: str, label: str) -> set[str]:
        """The values of `label` for which a sample of this name is 1."""
        return {dict(has)[label] for (each, has), value in self._values.items() if each == name and value == 1}


def scrape_of(registry: CollectorRegistry) -> Scrape:
    return Scrape(generate_latest(registry).decode())


class Catalogue(CacheInvalidationMixin):
    namespace = "products"

    def __init__(self, redis_url: str, **options: Any) -> None:
        super().__init__(redis_url, cache=TTLCache(maxsize=1_000, ttl=300), **{**FAST, **options})


@asynccontextmanager
async def replica(redis_url: str, **options: Any) -> AsyncIterator[tuple[Catalogue, httpx2.AsyncClient]]:
    catalogue = Catalogue(redis_url, replica_id="replica-1", **options)
    app = FastAPI(lifespan=catalogue.lifespan)
    app.include_router(catalogue.router)
    async with served(app) as client:
        yield catalogue, client


async def scraped(client: httpx2.AsyncClient, **headers: str) -> Scrape:
    answer = await client.get("/metrics", headers=headers)
    assert answer.status_code == 200, answer.text
    media_type = answer.headers["content-type"]
    assert media_type.startswith(("text/plain; version=", "application/openmetrics-text"))
    return Scrape(answer.text, is_open_metrics=media_type.startswith("application/openmetrics-text"))


# --- a replica -------------------------------------------------------------------------------------------------------


async def test_reads_and_loads_are_counted(redis_url: str) -> None:
    async with replica(redis_url) as (catalogue, client):
        for _ in range(3):
            await catalogue.get_or_load("product:1", lambda: 7)
        scrape = await scraped(client)
        counted = {
            name: scrape.value(f"broadcache_{name}_total", replica="replica-1", namespace="products")
            for name in ("hits", "misses", "loads", "bypassed", "shared_loads", "dropped")
        }
        assert counted == {"hits": 2, "misses": 1, "loads": 1, "bypassed": 0, "shared_loads": 0, "dropped": 0}
        assert scrape.value("broadcache_entries", namespace="products") == 1


async def test_what_is_applied_is_counted_by_the_kind_of_its_target(redis_url: str) -> None:
    async with replica(redis_url) as (catalogue, client), Publisher(redis_url) as publisher:
        fill(catalogue.cache, "product:1", "product:2")
        before = await scraped(client)
        assert before.value("broadcache_applied_total", kind="keys") == 0
        assert before.value("broadcache_lag_seconds_count") == 0
        for target in (Keys("product:1", "product:9"), Tags("t"), Prefixes("p")):
            await publisher.publish(target, namespace="products")
        receipt = await publisher.publish(Everything(), namespace="products")
        await reached(catalogue.subscriber, receipt)
        after = await scraped(client)
    applied = {kind: after.value("broadcache_applied_total", kind=kind) for kind in ("keys", "tags", "prefixes")}
    assert applied == {"keys": 2, "tags": 1, "prefixes": 1}
    # One came over the channel, the other was the clear of the first subscription.
    assert after.value("broadcache_applied_total", kind="everything") == 2
    assert after.value("broadcache_clears_total", reason="invalidation") == 1
    assert after.value("broadcache_clears_total", reason="subscribed") == 1
    assert after.value("broadcache_received_total", outcome="applied") == 4
    assert after.value("broadcache_position_sequence", namespace="products") == 4
    assert after.value("broadcache_lag_seconds_count", namespace="products") == 4
    assert after.value("broadcache_lag_seconds_bucket", le="+Inf") == 4
    assert 0 <= after.value("broadcache_lag_seconds_sum") < 60


async def test_a_malformed_message_is_counted_with_the_clear_it_causes(redis_url: str) -> None:
    async with replica(redis_url) as (catalogue, client), redis_probe(redis_url) as probe:
        before = await scraped(client)
        assert before.value("broadcache_received_total", outcome="malformed") == 0
        assert before.value("broadcache_clears_total", reason="malformed") == 0
        await probe.call("PUBLISH", names_of("products").channel, "now")
        await until(lambda: catalogue.subscriber.stats().received.get("malformed") == 1)
        after = await scraped(client)
        assert after.value("broadcache_received_total", outcome="malformed") == 1
        assert after.value("broadcache_clears_total", reason="malformed") == 1


async def test_a_gap_and_its_replay_are_counted(redis_url: str) -> None:
    async with (
        replica(redis_url) as (catalogue, client),
        Publisher(redis_url) as publisher,
        redis_probe(redis_url) as probe,
    ):
        receipt = await publisher.publish(Keys("a"), namespace="products")
        await reached(catalogue.subscriber, receipt)
        assert receipt.position is not None
        # Logged, and never published: the next echo finds it missing.
        frame = {"v": 1, "epoch": receipt.position.epoch, "seq": 2, "namespace": "products", "keys": ["b"]}
        names = names_of("products")
        await probe.call("MULTI")
        await probe.call("XADD", names.log, "2-0", "f", json.dumps(frame))
        await probe.call("HSET", names.head, "seq", "2")
        await probe.call("EXEC")
        await until(lambda: catalogue.subscriber.stats().received.get("replayed") == 1)
        scrape = await scraped(client)
    assert scrape.value("broadcache_gaps_total", namespace="products") == 1
    assert scrape.value("broadcache_replayed_total") == 1
    assert scrape.value("broadcache_position_sequence") == 2
    assert "replayed" not in scrape.is_one("broadcache_received_total", "outcome")


async def test_the_state_follows_an_outage_and_its_end(own_server: EmbeddedServer) -> None:
    async with replica(own_server.url, max_staleness_seconds=2) as (catalogue, client):
        before = await scraped(client)
        assert before.is_one("broadcache_state", "state") == {"coherent"}
        assert before.value("broadcache_coherent", namespace="products") == 1
        assert 0 <= before.value("broadcache_staleness_seconds") < 2
        assert before.value("broadcache_max_staleness_seconds") == 2
        own_server.kill()
        await until(lambda: catalogue.subscriber.state != "coherent")
        await catalogue.get_or_load("product:1", lambda: 7)
        during = await scraped(client)
        assert len(during.is_one("broadcache_state", "state")) == 1
        assert during.is_one("broadcache_state", "state") & {"lost", "connecting"}
        assert during.value("broadcache_coherent", namespace="products") == 0
        assert during.value("broadcache_lost_total") >= 1
        assert during.value("broadcache_bypassed_total") >= 1
        own_server.start()
        await until(lambda: catalogue.subscriber.state == "coherent")
        after = await scraped(client)
        assert after.is_one("broadcache_state", "state") == {"coherent"}
        assert after.value("broadcache_subscriptions_total") == 2
        assert after.value("broadcache_echoes_total") > before.value("broadcache_echoes_total")
        assert after.value("broadcache_clears_total", reason="server changed") == 1


async def test_staleness_is_unknown_before_the_first_proof() -> None:
    registry = CollectorRegistry()
    register(Subscriber("redis://127.0.0.1:1", caches={"products": new_cache()}), registry)
    scrape = scrape_of(registry)
    assert scrape.value("broadcache_staleness_seconds") == math.inf
    assert scrape.is_one("broadcache_state", "state") == {"closed"}


async def test_several_caches_of_a_namespace_are_added_up(redis_url: str) -> None:
    names, rights = new_cache(max_staleness_seconds=5), new_cache(max_staleness_seconds=3)
    registry = CollectorRegistry()
    async with Subscriber(redis_url, caches={"users": [names, rights]}, **FAST) as subscriber:
        register(subscriber, registry)
        fill(names, "1", "2")
        fill(rights, "1")
        scrape = scrape_of(registry)
        assert scrape.value("broadcache_entries", namespace="users") == 3
        assert scrape.value("broadcache_max_staleness_seconds", namespace="users") == 3


async def test_a_namespace_that_comes_later_is_told_of_with_its_lag(redis_url: str) -> None:
    registry = CollectorRegistry()
    async with Subscriber(redis_url, caches={"products": new_cache()}, **FAST) as subscriber:
        register(subscriber, registry)
        await subscriber.attach("users", new_cache())
        async with Publisher(redis_url) as publisher:
            await reached(subscriber, await publisher.publish(Keys("1"), namespace="users"))
        assert scrape_of(registry).value("broadcache_lag_seconds_count", namespace="users") == 1
        await subscriber.detach("users")
        with pytest.raises(AssertionError, match="no sample"):
            scrape_of(registry).value("broadcache_entries", namespace="users")


async def test_lag_is_not_measured_until_somebody_collects_it(redis_url: str) -> None:
    async with Subscriber(redis_url, caches={"products": new_cache()}, **FAST) as subscriber:
        assert subscriber.sequencers["products"].lag is None
        register(subscriber, CollectorRegistry())
        assert subscriber.sequencers["products"].lag is not None


async def test_several_subscribers_share_a_registry_and_leave_it_one_by_one() -> None:
    registry = CollectorRegistry(auto_describe=True)
    one, other = (
        Subscriber("redis://127.0.0.1:1", caches={"products": new_cache()}, replica_id=name) for name in ("a", "b")
    )
    for subscriber in (one, other, one):
        register(subscriber, registry)
    assert scrape_of(registry).is_one("broadcache_state", "replica") == {"a", "b"}
    unregister(one, registry)
    assert scrape_of(registry).is_one("broadcache_state", "replica") == {"b"}
    unregister(other, registry)
    unregister(other, registry)
    assert scrape_of(registry).families == []
    register(one, registry)
    assert scrape_of(registry).is_one("broadcache_state", "replica") == {"a"}


def test_a_clock_that_is_ahead_is_no_lag_at_all() -> None:
    lag = Lag()
    lag.record(None)
    lag.record(2**53 - 1)
    assert (lag.buckets()[0], lag.total) == (("0.001", 1.0), 0.0)


def test_a_histogram_counts_each_value_in_every_bucket_it_is_not_above() -> None:
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(value)
    assert histogram.buckets() == [("0.1", 2.0), ("1.0", 3.0), ("+Inf", 4.0)]
    assert histogram.total == pytest.approx(7.65)


async def test_a_scraper_that_asks_for_open_metrics_gets_it(redis_url: str) -> None:
    async with replica(redis_url) as (_, client):
        scrape = await scraped(client, Accept="application/openmetrics-text; version=1.0.0")
        assert scrape.is_one("broadcache_state", "state") == {"coherent"}


WITHOUT = """
import sys
sys.modules["prometheus_client"] = None  # what an import of it finds is an ImportError
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "prometheus_client" else find_spec(name)
import logging
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from broadcache.publisher.api.app import create_app
from broadcache.publisher.api.settings import ApiSettings
from broadcache.subscriber import LocalCache, Subscriber
from broadcache.subscriber.metrics import register
from broadcache.subscriber.endpoint.fastapi import router_of
subscriber = Subscriber("redis://127.0.0.1:1", caches={"products": LocalCache({})}, replica_id="r")
print("/metrics" in [route.path for route in router_of(subscriber).routes])
print("/metrics" in [route.path for route in create_app(ApiSettings()).routes])
try:
    register(subscriber)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_without_the_library_there_is_no_route_and_it_is_said_what_to_install() -> None:
    ran = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("False\n") == 2
    for said in (
        "replica r has no GET /metrics",
        "the publisher has no GET /metrics",
        "MissingPackage the metrics of",
    ):
        assert said in ran.stdout
    assert ran.stdout.count("pip install 'broadcache[metrics]'") == 3


# --- a publisher -----------------------------------------------------------------------------------------------------


async def test_publishes_are_counted_by_outcome(redis_url: str) -> None:
    async with served(create_app(ApiSettings(redis_url=redis_url))) as client:
        headers = {"Idempotency-Key": "1"}
        for body in ({"keys": ["a"]}, {"keys": ["a"]}, {"keys": ["b"]}):
            await client.post("/invalidations", json=body, headers=headers)
        await client.post("/invalidations", json={"keys": []})
        scrape = await scraped(client)
    outcomes = {
        outcome: scrape.value("broadcache_publishes_total", namespace="default", outcome=outcome)
        for outcome in ("accepted", "repeat", "conflict", "refused", "unreachable", "not delivered")
    }
    assert outcomes == {
        "accepted": 1,
        "repeat": 1,
        "conflict": 1,
        "refused": 0,
        "unreachable": 0,
        "not delivered": 0,
    }
    assert scrape.value("broadcache_publish_duration_seconds_count") == 3
    assert scrape.value("broadcache_retry_queue_length") == 0


async def test_a_publish_that_redis_refuses_or_does_not_answer_is_counted_as_that(own_server: EmbeddedServer) -> None:
    registry = CollectorRegistry()
    metrics = PublisherMetrics(registry)
    async with (
        Publisher(own_server.url, timeout_seconds=0.5, observer=metrics) as publisher,
        redis_probe(own_server.url) as probe,
    ):
        await probe.call("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(LogRefused, match="OOM"):
            await publisher.publish(Keys("a"), namespace="taken")
        own_server.kill()
        with pytest.raises(LinkLost):
            await publisher.publish(Keys("a"), namespace="products")
    scrape = scrape_of(registry)
    assert scrape.value("broadcache_publishes_total", namespace="taken", outcome="refused") == 1
    assert scrape.value("broadcache_publishes_total", namespace="products", outcome="unreachable") == 1
    assert scrape.value("broadcache_publishes_total") == 2


async def test_requests_are_counted_by_route_and_status_and_no_client_can_make_up_series(redis_url: str) -> None:
    settings = ApiSettings(redis_url=redis_url, tokens=("rw:swordfish",), fanout_allow=("web:80",))
    async with served(create_app(settings)) as client:
        token = {"Authorization": "Bearer swordfish"}
        await client.post("/invalidations", json={"keys": ["a"]}, headers=token)
        await client.post("/invalidations", json={"keys": ["a"]})
        await client.delete("/invalidations", headers=token)
        for path in ("/a", "/b", "/c"):
            await client.get(path, headers=token)
        for path in ("/other/80/x", "/another/80/y"):
            await client.request("BREW", path, headers=token)
        scrape = Scrape((await client.get("/metrics", headers=token)).text)
    name = "broadcache_http_requests_total"
    assert scrape.value(name, route="/invalidations", method="POST", status="200") == 1
    assert scrape.value(name, route="/invalidations", method="DELETE", status="405") == 1
    assert scrape.value(name, route="none", method="POST", status="401") == 1
    assert scrape.value(name, route="none", method="GET", status="404") == 3
    assert scrape.value(name, route="/{service}/{port}/{rest}", method="other", status="403") == 2
    assert scrape.value(name) == 8


async def test_a_token_that_may_only_read_may_scrape_and_a_stranger_may_not(redis_url: str) -> None:
    settings = ApiSettings(redis_url=redis_url, tokens=("rw:swordfish", "ro:sesame"))
    async with served(create_app(settings)) as client:
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/metrics", headers={"Authorization": "Bearer sesame"})).status_code == 200
        answer = await client.post("/metrics", headers={"Authorization": "Bearer sesame"})
        assert answer.status_code == 403


async def test_the_length_of_an_outbox_is_told_where_there_is_one(redis_url: str) -> None:
    class WithOutbox(Publisher):
        @property
        def retry_queue_length(self) -> int:
            return 3

    app = create_app(ApiSettings(redis_url=redis_url), publisher=WithOutbox(redis_url))
    async with served(app) as client:
        assert (await scraped(client)).value("broadcache_retry_queue_length") == 3


@pytest.mark.parametrize("text", [None, "", "connection refused", "no answer within 1 s", "not tried", "anything else"])
async def test_the_result_of_each_address_of_a_broadcast_is_counted_whatever_the_error_texts(
    text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        monkeypatch.setattr(NoResponse, "__str__", lambda _: text)
    registry = CollectorRegistry()
    async with Pods(7) as pods:
        behaviours = (answers(), answers(204), answers(500), hangs, resets, answers(200, b"no replica"))
        for pod, behaviour in zip(pods.all, behaviours, strict=False):
            pod.behaviour = behaviour
        await pods.remove(pods[6].host)
        addresses = tuple(f"{host}:{pods.port}" for host in pods.hosts)
        broadcaster = Broadcaster(
            ListDiscovery({"web": addresses}),
            FanoutPolicy(["web:80"]),
            limits=Limits(timeout_seconds=0.5),
            observer=PublisherMetrics(registry),
        )
        async with broadcaster:
            destination = FanoutPolicy(["web:80"]).check("POST", "web", "80")
            objection = "not a replica" if text is None else text
            broadcast = await broadcaster.broadcast(
                Request(
                    method="POST",
                    destination=destination,
                    objection_to=lambda response: objection if response.body == b"no replica" else None,
                )
            )
    scrape = scrape_of(registry)
    results = {
        result: scrape.value("broadcache_broadcast_addresses_total", service="web", result=result)
        for result in ("success", "status", "refused", "timeout", "failed", "not tried", "not applied")
    }
    expected = {"success": 2, "status": 1, "refused": 1, "timeout": 1, "failed": 1, "not tried": 0, "not applied": 1}
    assert results == expected
    assert [each.result for each in broadcast.outcomes if each.is_success] == ["success", "success"]
    assert scrape.value("broadcache_broadcasts_total", service="web", reached="not all") == 1
    assert scrape.value("broadcache_broadcasts_total", service="web", reached="all") == 0
    assert scrape.value("broadcache_broadcast_duration_seconds_count", service="web") == 1


async def test_an_address_that_no_time_is_left_for_is_counted_as_not_tried() -> None:
    registry = CollectorRegistry()
    async with Pods(2) as pods:
        pods[0].behaviour = hangs
        broadcaster = Broadcaster(
            ListDiscovery({"web": tuple(f"{host}:{pods.port}" for host in pods.hosts)}),
            FanoutPolicy(["web:80"]),
            limits=Limits(timeout_seconds=0.3, deadline_seconds=0.3, concurrency=1),
            observer=PublisherMetrics(registry),
        )
        async with broadcaster:
            await broadcaster.broadcast(
                Request(method="POST", destination=FanoutPolicy(["web:80"]).check("POST", "web", "80"))
            )
    scrape = scrape_of(registry)
    counted = {
        result: scrape.value("broadcache_broadcast_addresses_total", service="web", result=result)
        for result in ("timeout", "not tried", "failed")
    }
    assert counted == {"timeout": 1, "not tried": 1, "failed": 0}


async def test_a_publish_that_only_the_second_path_delivers_is_counted_with_its_broadcast_and_waits(
    own_server: EmbeddedServer,
) -> None:
    async with Pods(2) as pods:
        for pod in pods.all:
            pod.behaviour = as_replica()
        settings = ApiSettings(
            redis_url=own_server.url,
            delivery="redis-then-fanout",
            fanout_service="web:80",
            fanout_lists=("web=" + "|".join(f"{host}:{pods.port}" for host in pods.hosts),),
        )
        own_server.kill()
        async with served(create_app(settings)) as client:
            assert (await client.post("/invalidations", json={"keys": ["a"]})).status_code in (200, 202)
            scrape = await scraped(client)
            own_server.start()
    assert scrape.value("broadcache_publishes_total", outcome="fanned out") == 1
    assert scrape.value("broadcache_broadcast_addresses_total", service="web", result="success") == 2
    assert scrape.value("broadcache_retry_queue_length") == 1


async def test_an_invalidation_that_is_to_be_confirmed_has_a_lag_too(redis_url: str) -> None:
    async with replica(redis_url) as (_, client), Publisher(redis_url) as publisher:
        confirm = Confirm(timeout_seconds=10)
        receipt = await publisher.publish(Keys("a"), namespace="products", confirm=confirm)
        assert receipt.confirmation is not None
        assert receipt.confirmation.confirmed
        assert (await scraped(client)).value("broadcache_lag_seconds_count", namespace="products") == 1


async def test_the_fan_out_alone_tells_of_its_broadcasts() -> None:
    async with Pods(2) as pods:
        listed = "|".join(f"{host}:{pods.port}" for host in pods.hosts)
        settings = FanoutSettings(
            fanout_allow=("web:80", "nowhere:80"), fanout_lists=(f"web={listed}",), fanout_nameservers=("127.0.0.1:1",)
        )
        async with served(create_fanout_app(settings)) as client:
            assert (await client.post("/web/80/x")).status_code == 200
            assert (await client.post("/nowhere/80/x")).status_code in (502, 504)
            scrape = await scraped(client)
    name = "broadcache_broadcasts_total"
    assert (scrape.value(name, service="web", reached="all"), scrape.value(name, reached="nobody")) == (1, 1)
    assert scrape.value("broadcache_http_requests_total", route="/{service}/{port}/{rest}", status="200") == 1


# --- audits ----------------------------------------------------------------------------------------------------------


async def scraped_until(client: httpx2.AsyncClient, is_enough: Callable[[Scrape], object]) -> Scrape:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not is_enough(scrape := await scraped(client)):
            pass
        return scrape


async def published_until(client: httpx2.AsyncClient, is_enough: Callable[[Scrape], object]) -> Scrape:
    """Publish invalidations of what no replica has, for an audit to see, until it has seen enough."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            await client.post("/invalidations", json={"namespace": "products", "keys": ["a"]})
            if is_enough(scrape := await scraped(client)):
                return scrape


def _lacks(cache: LocalCache, key: str) -> bool:
    return key not in cache


@asynccontextmanager
async def audited_fleet(redis_url: str, **kinds: type[LocalCache]) -> AsyncIterator[httpx2.AsyncClient]:
    """Replicas that had a value before it was changed and published, and the API that audits them."""
    values = {"product:42": "old"}
    async with AsyncExitStack() as stack:
        caches = {name: kind(TTLCache(maxsize=100, ttl=300)) for name, kind in kinds.items()}
        for name, cache in caches.items():
            options = {**FAST, "echo_timeout_seconds": 20.0}
            await stack.enter_async_context(
                Subscriber(redis_url, caches={"products": cache}, replica_id=name, **options)
            )
            fill(cache, "product:42")
        await make_registry_old(redis_url)
        settings = ApiSettings(
            redis_url=redis_url,
            audit_namespaces=("products", "users"),
            audit_sample=1,
            audit_source_url=stack.enter_context(source_over_http(values)),
        )
        client = await stack.enter_async_context(served(create_app(settings)))
        await published_until(client, lambda scrape: scrape.value(f"{AUDIT}seen_total", namespace="products"))
        values["product:42"] = "new"
        await client.post("/invalidations", json={"namespace": "products", "keys": ["product:42"]})
        for cache in caches.values():
            if type(cache) is LocalCache:
                await until(partial(_lacks, cache, "product:42"))
                cache.store(cache.begin_load("product:42"), "new")
        yield client


async def test_an_audit_beside_the_api_counts_the_replica_that_lies_and_logs_who_it_is(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    def differs(scrape: Scrape, within: str = "1") -> float:
        return scrape.value(f"{AUDIT}inconsistencies_total", namespace="products", kind="differs", within=within)

    async with audited_fleet(redis_url, honest=LocalCache, liar=RevivingCache) as client:
        scrape = await scraped_until(client, differs)
    of = {"namespace": "products", "within": "1"}
    judged, consistent = (scrape.value(f"{AUDIT}{name}_total", **of) for name in ("judged", "consistent"))
    assert scrape.value(f"{AUDIT}consistent_ratio", **of) == consistent / judged < 1
    assert [scrape.value(f"{AUDIT}inconsistencies_total", kind=kind) for kind in ("missing", "behind")] == [0, 0]
    assert differs(scrape, "10") == 0
    [told] = [record.message for record in caplog.records if "the audit of" in record.message]
    assert re.match(
        r"the audit of products found 'liar: is at \d+ and serves \w+, the source has \w+, 1 s after ", told
    )


async def test_a_fleet_that_keeps_its_promise_is_wholly_consistent(redis_url: str) -> None:
    of = {"namespace": "products", "within": "1"}
    async with audited_fleet(redis_url, one=LocalCache, two=LocalCache) as client:
        before = await scraped(client)
        scrape = await scraped_until(
            client,
            lambda scrape: (
                scrape.value(f"{AUDIT}judged_total", **of)
                == scrape.value(f"{AUDIT}sampled_total", namespace="products")
                == scrape.value(f"{AUDIT}seen_total", namespace="products")
                > 1
            ),
        )
    assert scrape.value(f"{AUDIT}consistent_ratio", **of) == 1
    assert scrape.value(f"{AUDIT}inconsistencies_total") == 0
    assert scrape.value(f"{AUDIT}failures_total") == scrape.value(f"{AUDIT}source_failures_total") == 0
    # All series of all audits are there before anything has happened, each family once.
    for name in ("judged_total", "consistent_total", "inconsistencies_total"):
        assert before.value(f"{AUDIT}{name}", namespace="users", within="60") == 0
    assert len({family.name for family in scrape.families}) == len(scrape.families)
    with pytest.raises(AssertionError, match="no sample"):
        scrape.value(f"{AUDIT}consistent_ratio", namespace="users")


async def test_nothing_is_audited_unless_it_is_asked_for(redis_url: str) -> None:
    async with served(create_app(ApiSettings(redis_url=redis_url))) as client:
        await client.post("/invalidations", json={"keys": ["a"]})
        assert not [name for name in (await scraped(client)).names if name.startswith(AUDIT)]


async def test_an_audit_outlives_a_redis_that_is_away(own_server: EmbeddedServer) -> None:
    settings = ApiSettings(
        redis_url=own_server.url, audit_namespaces=("products",), audit_sample=1, publish_timeout_seconds=0.3
    )
    async with replica(own_server.url), served(create_app(settings)) as client:
        own_server.kill()
        await published_until(client, lambda scrape: scrape.value(f"{AUDIT}failures_total") > 0)
        assert (await client.get("/health/live")).status_code == 200
        own_server.start()
        await published_until(client, lambda scrape: scrape.value(f"{AUDIT}judged_total", within="1") > 0)


async def test_an_audit_that_fails_takes_nothing_else_down(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = Auditor.step

    async def failing(auditor: Auditor) -> None:
        if auditor.namespace == "users":
            raise RuntimeError("a mistake of ours")
        await step(auditor)

    monkeypatch.setattr(Auditor, "step", failing)
    settings = ApiSettings(redis_url=redis_url, audit_namespaces=("users", "products"), audit_sample=1)
    async with replica(redis_url), served(create_app(settings)) as client:
        await published_until(client, lambda scrape: scrape.value(f"{AUDIT}judged_total", namespace="products") > 0)
        assert (await client.post("/invalidations", json={"keys": ["a"]})).status_code == 200
    [failed] = [record for record in caplog.records if record.exc_info]
    assert failed.message.startswith("the audit of users failed")


# --- what names the metrics ------------------------------------------------------------------------------------------

_FUNCTIONS_AND_WORDS = {
    *(
        "sum",
        "rate",
        "increase",
        "max",
        "min",
        "by",
        "histogram_quantile",
        "le",
        "or",
        "and",
        "on",
        "clamp_min",
        "unless",
    ),
    *("group_left", "ignoring", "without", "count", "avg", "vector", "label_values", "changes", "up", "bool"),
}


async def all_metrics(redis_url: str) -> set[str]:
    """The name of every sample that a replica and a publisher expose, once each has had something to tell."""
    async with Pods(1) as pods:
        settings = ApiSettings(
            redis_url=redis_url,
            fanout_allow=("web:80",),
            fanout_lists=(f"web={pods.hosts[0]}:{pods.port}",),
            audit_namespaces=("products",),
            audit_sample=1,
        )
        async with replica(redis_url) as (_, of_replica), served(create_app(settings)) as of_publisher:
            await of_publisher.post("/web/80/x")
            await of_publisher.get("/replicas?namespace=products")
            of_audit = await published_until(
                of_publisher, lambda scrape: "broadcache_audit_consistent_ratio" in scrape.names
            )
            return (await scraped(of_replica)).names | of_audit.names


def names_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression names."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|on|without|ignoring|group_left)\s*\([^)]*\)", " ", bare)
    return set(re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", bare)) - _FUNCTIONS_AND_WORDS


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


def expressions() -> Iterable[str]:
    yield from (target["expr"] for panel in panels() for target in panel["targets"])
    yield from (rule["expr"] for rule in rules())


async def test_every_metric_that_the_dashboard_and_the_alerts_name_is_exposed(redis_url: str) -> None:
    named = set().union(*map(names_in, expressions()))
    assert len(named) > 15
    assert named - await all_metrics(redis_url) == set()


async def test_every_metric_that_is_exposed_is_documented_and_no_other(redis_url: str) -> None:
    exposed = {name for name in await all_metrics(redis_url) if not name.startswith("process_")}
    exposed = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exposed}
    assert set(re.findall(r"^\| `(broadcache_\w+)` \|", PAGE, re.MULTILINE)) == exposed


def test_the_names_of_a_query_are_found() -> None:
    query = 'sum by (replica) (rate(a_total{x="b_total"}[5m])) / on (replica) group_left (y) max(c_seconds) > 0.5'
    assert names_in(query) == {"a_total", "c_seconds"}


def test_the_dashboard_can_be_imported_anywhere() -> None:
    text = json.dumps(DASHBOARD)
    assert DASHBOARD["id"] is None
    assert DASHBOARD["uid"]
    assert DASHBOARD["schemaVersion"] >= 36
    variables = {each["name"]: each["type"] for each in DASHBOARD["templating"]["list"]}
    assert variables["datasource"] == "datasource"
    assert re.findall(r"\b\w+://|\b\d+\.\d+\.\d+\.\d+|localhost", text) == []
    for name in re.findall(r"\$\{?(\w+)", text):
        assert name in variables or name.startswith("__"), name


def test_every_panel_has_an_id_a_title_a_unit_a_place_and_a_query() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies over another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        letters = [target["refId"] for target in panel["targets"]]
        assert letters
        assert len(set(letters)) == len(letters)
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]


def test_every_alert_says_what_is_wrong_what_it_means_and_what_to_do() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) >= 8
    for rule in rules():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "0m"))
        assert set(rule["annotations"]) == {"summary", "description", "action", "runbook"}
        assert all(text.strip() for text in rule["annotations"].values())
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (ROOT / page).exists()
        assert f"### {rule['alert']}".lower() in PAGE.lower(), anchor
        assert anchor == rule["alert"].lower()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_own_tool_takes_the_alert_rules() -> None:
    checked = subprocess.run(
        ["promtool", "check", "rules", str(ROOT / "deploy" / "alerts.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"SUCCESS: {len(rules())} rules found" in checked.stdout


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_prometheus_own_tool_takes_what_is_exposed(redis_url: str) -> None:
    async with replica(redis_url) as (_, of_replica), served(create_app(ApiSettings(redis_url=redis_url))) as publisher:
        await publisher.post("/invalidations", json={"namespace": "products", "keys": ["a"]})
        for client in (of_replica, publisher):
            text = (await client.get("/metrics")).content
            checked = await asyncio.to_thread(
                subprocess.run, ["promtool", "check", "metrics"], input=text, capture_output=True, check=False
            )
            assert checked.returncode == 0, checked.stdout + checked.stderr
