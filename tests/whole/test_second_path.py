"""The second path with all its parts: DNS, the fan-out, real replicas behind a web server, and a Redis that is away."""

from typing import Any

import msgspec
import pytest
from tests.support.called_replicas import Replica, fleet
from tests.support.replicas import FAST, fill, new_cache
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import until

from broadcache.publisher import Confirm, Fanout, Publisher
from broadcache.publisher.publishing.backlog import Pending
from broadcache.shared import AddressOutcome, FanoutReport, Keys, LinkLost, Receipt
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.subscriber import Subscriber
from broadcache.subscriber.endpoint.processes.own_socket import own_socket

pytestmark = pytest.mark.anyio


def held(replicas: list[Replica], key: str) -> list[object]:
    return [replica.cache.get(key) for replica in replicas]


async def test_while_redis_is_away_every_replica_forgets_and_afterwards_nothing_is_lost(
    own_server: EmbeddedServer,
) -> None:
    async with (
        fleet(own_server.url) as (replicas, fanout),
        Publisher(own_server.url, timeout_seconds=0.5) as naive,
        Publisher(own_server.url, delivery="redis-then-fanout", fanout=fanout, timeout_seconds=1.0) as publisher,
    ):
        # A log that begins during the outage is of an epoch that nobody knows: replicas clear, and repeat nothing.
        first = await publisher.publish(Keys("first"), namespace="products")
        await until(
            lambda: all(replica.subscriber.position("products") == first.position for replica in replicas),
            "replicas that know the log",
        )
        for replica in replicas:
            fill(replica.cache, "a", "b")
        own_server.pause()
        try:
            # The negative control: without the second path nobody hears of it, and the old value is served.
            with pytest.raises(LinkLost):
                await naive.publish(Keys("b"), namespace="products", id="never-sent-again")
            assert held(replicas, "b") == ["old"] * 3

            receipt = await publisher.publish(Keys("a"), namespace="products")
            assert (receipt.is_logged, receipt.pending) == (False, True)
            assert receipt.fanout is not None
            assert sorted(outcome.replica or "" for outcome in receipt.fanout.outcomes) == ["web-0", "web-1", "web-2"]
            assert [outcome.dropped for outcome in receipt.fanout.outcomes] == [1, 1, 1]
            assert held(replicas, "a") == [None] * 3
            assert publisher.retry_queue_length == 1
        finally:
            own_server.resume()
        await until(lambda: publisher.retry_queue_length == 0, "an empty retry queue")
        after = await publisher.publish(Keys("c"), namespace="products")
        assert after.is_logged
        await until(
            lambda: all(
                replica.subscriber.state == "coherent" and replica.subscriber.position("products") == after.position
                for replica in replicas
            ),
            "a coherent fleet",
        )
        assert [entry.invalidation and entry.invalidation.id for entry in await publisher.history("products")][:2] == [
            after.id,
            receipt.id,
        ]
        for replica in replicas:
            assert replica.subscriber.stats().received["http"] == 1
            assert replica.cache.stats().clears == {"subscribed": 1}
        assert (held(replicas, "a"), held(replicas, "b")) == ([None] * 3, ["old"] * 3)


async def test_what_went_both_ways_is_confirmed_by_every_replica(redis_url: str) -> None:
    async with (
        fleet(redis_url) as (replicas, fanout),
        Publisher(redis_url, delivery="both", fanout=fanout) as publisher,
    ):
        for replica in replicas:
            fill(replica.cache, "a")
        receipt = await publisher.publish(Keys("a"), namespace="products", confirm=Confirm(timeout_seconds=20))
        assert receipt.is_logged
        assert receipt.fanout is not None
        assert receipt.fanout.is_delivered
        assert receipt.confirmation is not None
        assert receipt.confirmation.confirmed == ("web-0", "web-1", "web-2")
        assert held(replicas, "a") == [None] * 3
        for replica in replicas:
            assert replica.subscriber.stats().received["http"] == 1


async def test_a_listed_replica_that_the_fan_out_does_not_call_is_missing(own_server: EmbeddedServer) -> None:
    """Only the publisher is cut off: what it has no address of hears nothing, and is coherent all the same."""
    url = own_server.url
    async with (
        fleet(url) as (replicas, fanout),
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        Publisher(proxy.url, delivery="redis-then-fanout", fanout=fanout, timeout_seconds=1.0) as publisher,
    ):
        other = new_cache()
        async with Subscriber(url, caches={"products": other}, replica_id="of-another-service", **FAST) as elsewhere:
            own_socket.leave(elsewhere)  # as if it ran in another process: this one tells all that run in it
            await publisher.publish(Keys("first"), namespace="products", confirm=Confirm(timeout_seconds=20))
            for cache in (other, *(replica.cache for replica in replicas)):
                fill(cache, "a")
            await proxy.refuse()
            await proxy.cut()
            receipt = await publisher.publish(Keys("a"), namespace="products", confirm=Confirm())
            assert receipt.confirmation is not None
            assert receipt.fanout is not None
            assert (receipt.is_logged, receipt.fanout.is_delivered) == (False, True)
            assert (other.get("a"), other.is_coherent, held(replicas, "a")) == ("old", True, [None] * 3)
            assert receipt.confirmation.missing == ("of-another-service",)
            assert receipt.confirmation.confirmed == ("web-0", "web-1", "web-2")
            await proxy.accept()
            await until(lambda: other.get("a") is None, "the invalidation, logged later")


async def test_without_a_log_the_replicas_confirm_by_http(redis_url: str) -> None:
    async with (
        fleet(redis_url) as (replicas, fanout),
        Publisher(None, delivery="fanout", fanout=fanout) as publisher,
    ):
        for replica in replicas:
            fill(replica.cache, "a")
        receipt = await publisher.publish(Keys("a"), namespace="products", confirm=Confirm())
        assert receipt.confirmation is not None
        assert [(each.replica, each.how) for each in receipt.confirmation.replicas] == [
            ("web-0", "http"),
            ("web-1", "http"),
            ("web-2", "http"),
        ]
        assert held(replicas, "a") == [None] * 3
        assert (receipt.confirmation.doubt, receipt.confirmation.is_complete) == (None, True)


@pytest.mark.parametrize(
    ("changes", "doubt"),
    [
        ({"complete": False}, "discovery may not have named"),
        ({"total": 0, "succeeded": 0, "outcomes": ()}, "found no replica"),
        ({"problem": "the name server does not answer"}, "the name server does not answer"),
        ({}, None),
    ],
)
async def test_a_fan_out_that_may_not_have_called_every_replica_confirms_nothing_for_certain(
    changes: dict[str, Any], doubt: str | None
) -> None:
    outcome = AddressOutcome(
        address="http://10.0.0.7:8889/", status_code=200, error=None, latency_ms=1.0, attempts=1, replica="web-0"
    )
    report = FanoutReport(
        service="web.test",
        total=1,
        succeeded=1,
        failed=0,
        complete=True,
        discovery="dns",
        elapsed_ms=1.0,
        outcomes=(outcome,),
    )

    class Believing(Publisher):
        """Delivers by HTTP whatever the fan-out reports."""

        async def _deliver(self, pending: Pending) -> Receipt:
            fanout = msgspec.structs.replace(report, **changes)
            return Receipt(pending.invalidation.id, "products", None, 0, fanout=fanout)

    async with Believing(None, delivery="fanout", fanout=Fanout("web.test", 8889)) as publisher:
        receipt = await publisher.publish(Keys("a"), namespace="products", confirm=Confirm())
    assert receipt.confirmation is not None
    assert receipt.confirmation.missing == ()
    assert receipt.confirmation.is_complete == (doubt is None)
    assert doubt is None or doubt in (receipt.confirmation.doubt or "")
