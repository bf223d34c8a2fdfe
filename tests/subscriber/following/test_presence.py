"""Who is there: replicas appear with their first echo, and disappear by themselves."""

import asyncio
import logging
import os
import signal
import socket
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest
from tests.support.child_replica import child_replica
from tests.support.redis_probe import redis_probe
from tests.support.replicas import FAST, fill, new_cache, reached
from tests.support.topologies import asked, cluster_of_three
from tests.support.waiting import until

from broadcache import __version__
from broadcache.publisher import Publisher
from broadcache.shared import Keys, Position, ReplicaPresence
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.names import names_of
from broadcache.subscriber import Subscriber

QUICK: dict[str, Any] = {**FAST, "echo_interval_seconds": 0.2}

pytestmark = pytest.mark.anyio


async def seen(publisher: Publisher, namespace: str, state: str = "coherent") -> ReplicaPresence:
    """The only replica, once it is in `state`."""
    while True:
        replicas = await publisher.replicas(namespace)
        if len(replicas) == 1 and replicas[0].state == state:
            return replicas[0]
        await asyncio.sleep(0.01)


async def names_seen(publisher: Publisher, namespace: str, names: list[str]) -> None:
    """Wait until exactly these replicas are registered."""
    while [each.replica for each in await publisher.replicas(namespace) if not each.is_silent] != names:
        await asyncio.sleep(0.01)


async def test_a_replica_says_who_it_is_and_how_it_fares(redis_url: str) -> None:
    cache, others = new_cache(), new_cache(max_staleness_seconds=3.0)
    async with Publisher(redis_url) as publisher:
        assert await publisher.replicas("products") == []
        async with Subscriber(
            redis_url, caches={"products": cache, "users": [new_cache(), others]}, replica_id="web-1", **FAST
        ) as subscriber:
            fill(cache, "one", "two")
            assert cache.get("one") == "old"
            assert cache.get("three") is None
            await reached(subscriber, await publisher.publish(Keys("two"), namespace="products"))
            echoes = subscriber.stats().echoes
            await until(lambda: subscriber.stats().echoes > echoes + 1)
            replica = await seen(publisher, "products")
            assert (replica.replica, replica.namespace, replica.namespaces) == (
                "web-1",
                "products",
                ("products", "users"),
            )
            assert (replica.host, replica.pid, replica.version) == (socket.gethostname(), os.getpid(), __version__)
            assert replica.position == subscriber.position("products") == await publisher.head("products")
            assert (replica.behind, replica.is_coherent, replica.when_incoherent) == (0, True, "bypass")
            assert (replica.entries, replica.hits, replica.misses) == (1, 1, 1)
            assert replica.hit_ratio == 0.5
            assert (replica.clears, replica.clears_total, replica.replays) == ({"subscribed": 1}, 1, 0)
            assert replica.max_staleness_seconds == 5.0
            assert replica.staleness_seconds is not None
            assert replica.seen_ms_ago is not None
            assert replica.staleness_seconds * 1_000 >= replica.seen_ms_ago >= 0
            [second] = await publisher.replicas("users")
            assert (second.max_staleness_seconds, second.behind) == (3.0, 0)
            assert second.position == subscriber.position("users")
            assert second.position is not None
            assert second.position.sequence == 0  # its head was begun by the first echo
            assert await publisher.replicas("orders") == []


async def test_a_replica_that_closes_is_gone_at_once(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher, redis_probe(redis_url) as probe:
        async with Subscriber(redis_url, caches={"products": new_cache(), "users": new_cache()}, replica_id="web-1"):
            await names_seen(publisher, "users", ["web-1"])
        for namespace in ("products", "users"):
            assert await publisher.replicas(namespace) == []
            assert await probe.call("EXISTS", names_of(namespace).presence_prefix + "web-1") == 0


async def test_a_replica_in_a_thread_that_closes_is_gone_at_once(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        subscriber = Subscriber(redis_url, caches={"products": new_cache()}, replica_id="web-1")
        await asyncio.to_thread(subscriber.__enter__)
        try:
            await names_seen(publisher, "products", ["web-1"])
        finally:
            await asyncio.to_thread(subscriber.__exit__, None, None, None)
        assert await publisher.replicas("products") == []


async def test_a_replica_that_detaches_a_namespace_is_gone_from_it_and_stays_in_the_others(redis_url: str) -> None:
    # Nothing disappears by itself before the test has ended.
    caches = {name: new_cache(max_staleness_seconds=600) for name in ("products", "users")}
    async with (
        Publisher(redis_url) as publisher,
        Subscriber(redis_url, caches=caches, replica_id="web-1", **FAST) as subscriber,
    ):
        await names_seen(publisher, "products", ["web-1"])
        await subscriber.detach("products")
        await names_seen(publisher, "products", [])
        while [each.namespaces for each in await publisher.replicas("users")] != [("users",)]:
            await asyncio.sleep(0.01)


async def test_a_replica_whose_redis_is_frozen_closes_all_the_same(own_server: EmbeddedServer) -> None:
    async with Subscriber(own_server.url, caches={"products": new_cache()}, replica_id="web-1", **FAST):
        own_server.pause()
    own_server.resume()
    async with Publisher(own_server.url) as publisher:
        await names_seen(publisher, "products", [])


async def test_a_replica_that_is_killed_is_registered_as_long_as_it_might_have_served_and_then_silent(
    redis_url: str,
) -> None:
    async with Publisher(redis_url) as publisher:
        async with child_replica(redis_url, "products", "doomed", max_staleness_seconds=1.0, **FAST) as child:
            replica = await seen(publisher, "products")
            assert (replica.replica, replica.pid) == ("doomed", child.pid)
            child.kill(signal.SIGKILL)
            # Nobody has told: it is still there, and its age grows.
            [after] = await publisher.replicas("products")
            assert after.replica == "doomed"
        await names_seen(publisher, "products", [])
        [silent] = await publisher.replicas("products")
        assert (silent.replica, silent.is_silent, silent.is_coherent) == ("doomed", True, False)
        assert silent.seen_ms_ago is not None
        assert silent.seen_ms_ago >= 1_000


async def test_a_replica_is_listed_at_least_as_long_as_its_proof_may_be_used(redis_url: str) -> None:
    caches = {"products": new_cache(max_staleness_seconds=90.0), "users": new_cache(max_staleness_seconds=7.0)}
    async with Subscriber(redis_url, caches=caches, replica_id="web-1", **FAST), redis_probe(redis_url) as probe:
        for namespace in caches:
            assert await probe.call("PTTL", names_of(namespace).presence_prefix + "web-1") > 80_000


async def test_fifty_replicas_are_all_listed(redis_url: str) -> None:
    names = sorted(f"replica-{number}" for number in range(50))
    async with AsyncExitStack() as stack:
        publisher = await stack.enter_async_context(Publisher(redis_url))
        await asyncio.gather(
            *[
                stack.enter_async_context(Subscriber(redis_url, caches={"products": new_cache()}, replica_id=name))
                for name in names
            ]
        )
        await names_seen(publisher, "products", names)
        while not all(each.is_coherent for each in await publisher.replicas("products")):
            await asyncio.sleep(0.05)
    async with Publisher(redis_url) as publisher:
        assert await publisher.replicas("products") == []


async def test_a_replica_that_is_behind_says_how_far(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher, redis_probe(redis_url) as probe:
        await publisher.publish(Keys("a"), namespace="products")
        async with Subscriber(redis_url, caches={"products": new_cache()}, replica_id="web-1", echo_interval_seconds=2):
            presence = names_of("products").presence_prefix + "web-1"
            said = msgspec.json.decode(await probe.call("GET", presence))
            epoch = said["position"][0]
            for theirs, behind in (([epoch, 1], 2), ([epoch, 9], 0), (["another", 3], None), (None, None)):
                await probe.call("SET", presence, msgspec.json.encode({**said, "position": theirs}), "PX", 9_000)
                while await publisher.head("products") != Position(epoch, 3):
                    await publisher.publish(Keys("a"), namespace="products")
                [replica] = await publisher.replicas("products")
                assert replica.behind == behind


@pytest.mark.parametrize(
    ("said", "state"),
    [
        (b'{"replica":"old","state":"coherent","positions":{"products":["e",1]}}', "coherent"),
        (b'{"replica":"new","state":"dreaming","mood":[1,{"a":2}]}', "dreaming"),
        (b'{"entries":"many"}', "unknown"),
        (b"\xff", "unknown"),
        (b"", "unknown"),
        (b"[" * 10_000, "unknown"),
    ],
)
async def test_what_another_version_says_is_read_as_far_as_it_can_be(redis_url: str, said: bytes, state: str) -> None:
    async with Publisher(redis_url) as publisher, redis_probe(redis_url) as probe:
        await probe.call("ZADD", names_of("products").registry, 9_999_999_999_999, "web-1")
        await probe.call("SET", names_of("products").presence_prefix + "web-1", said)
        [replica] = await publisher.replicas("products")
        assert (replica.replica, replica.state, replica.is_coherent) == ("web-1", state, False)
        assert replica.seen_ms_ago is None


async def test_that_a_replica_cannot_be_listed_costs_it_nothing_else(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = new_cache()
    async with redis_probe(redis_url) as probe, Publisher(redis_url) as publisher:
        await probe.call("SET", names_of("products").registry, "somebody else's")
        with caplog.at_level(logging.WARNING, logger="broadcache"):
            async with Subscriber(redis_url, caches={"products": cache}, replica_id="web-1", **FAST) as subscriber:
                await until(lambda: subscriber.stats().echoes > 2)
                await reached(subscriber, await publisher.publish(Keys("a"), namespace="products"))
                assert subscriber.stats().lost == 0
        assert caplog.text.count("expected Redis to list replica web-1") == 1


async def test_each_namespace_of_a_cluster_lists_its_replicas() -> None:
    with cluster_of_three() as cluster:
        namespaces = cluster.namespaces()
        caches = {namespace: new_cache() for namespace in namespaces}
        async with Publisher(cluster.url) as publisher:
            async with Subscriber(cluster.url, caches=caches, replica_id="web-1", **FAST):
                for namespace, node in zip(namespaces, cluster.nodes, strict=True):
                    await names_seen(publisher, namespace, ["web-1"])
                    registry = asked(node.port, "ZRANGE", names_of(namespace).registry, 0, -1)
                    assert [each for each in registry if not each.startswith(b" since=")] == [b"web-1"]
            for namespace in namespaces:
                assert await publisher.replicas(namespace) == []


# --- many namespaces --------------------------------------------------------------------------------------------------


async def cost_of_echoes(count: int) -> tuple[float, float]:
    """The bytes and the scripts that one echo of a replica with this many idle namespaces sends, on average."""
    caches = {f"tenant-{number}": new_cache() for number in range(count)}
    options = {**FAST, "echo_interval_seconds": 0.3}
    with EmbeddedServer() as server:
        async with Subscriber(server.url, caches=caches, **options) as subscriber, redis_probe(server.url) as probe:
            # The first echoes publish the state of the start.
            await until(lambda: subscriber.stats().echoes >= 10)
            await probe.call("CONFIG", "RESETSTAT")
            begun = subscriber.stats().echoes
            await until(lambda: subscriber.stats().echoes >= begun + 16)
            stats = {
                name: int(value)
                for line in (await probe.call("INFO", "stats")).decode().splitlines()
                for name, _, value in [line.partition(":")]
                if name == "total_net_input_bytes"
            }
            calls = (await probe.call("INFO", "commandstats")).decode().partition("cmdstat_evalsha:calls=")[2]
            echoes = subscriber.stats().echoes - begun
            return stats["total_net_input_bytes"] / echoes, int(calls.partition(",")[0]) / echoes


async def test_echoes_grow_with_the_number_of_namespaces_and_not_with_its_square() -> None:
    few_bytes, few_scripts = await cost_of_echoes(16)
    many_bytes, many_scripts = await cost_of_echoes(256)
    assert many_bytes < few_bytes * 256 / 16
    # One script holds the server for at most 64 namespaces. The counts are taken while echoes are under way.
    assert round(few_scripts, 1) == pytest.approx(1, abs=0.2)
    assert round(many_scripts, 1) == pytest.approx(4, abs=0.5)


async def test_among_many_namespaces_what_others_decide_by_is_published_with_the_next_echo(redis_url: str) -> None:
    caches = {f"tenant-{number}": new_cache(max_staleness_seconds=30) for number in range(150)}
    async with (
        Publisher(redis_url) as publisher,
        Subscriber(redis_url, caches=caches, replica_id="web-1", **QUICK) as subscriber,
    ):
        await until(lambda: subscriber.stats().echoes >= 10)
        for namespace in ("tenant-0", "tenant-70", "tenant-149"):
            receipt = await publisher.publish(Keys("a"), namespace=namespace)
            await reached(subscriber, receipt)
            wanted = subscriber.stats().echoes + 2
            while subscriber.stats().echoes < wanted:
                await asyncio.sleep(0.01)
            replica = await seen(publisher, namespace)
            assert replica.position == receipt.position
            assert (len(replica.namespaces), replica.namespaces_count) == (16, 150)


async def test_among_many_namespaces_counters_are_published_within_eight_echoes(redis_url: str) -> None:
    caches = {f"tenant-{number}": new_cache(max_staleness_seconds=30) for number in range(150)}
    async with (
        Publisher(redis_url) as publisher,
        Subscriber(redis_url, caches=caches, replica_id="web-1", **FAST) as subscriber,
    ):
        for cache in caches.values():
            fill(cache, "one")
        echoes = subscriber.stats().echoes
        await until(lambda: subscriber.stats().echoes >= echoes + 10)
        assert {(await seen(publisher, namespace)).entries for namespace in caches} == {1}


async def test_a_presence_that_redis_has_lost_is_published_anew(redis_url: str) -> None:
    caches = {f"tenant-{number}": new_cache(max_staleness_seconds=30) for number in range(40)}
    async with (
        Publisher(redis_url) as publisher,
        redis_probe(redis_url) as probe,
        Subscriber(redis_url, caches=caches, replica_id="web-1", **FAST) as subscriber,
    ):
        await until(lambda: subscriber.stats().echoes >= 10)
        for namespace in ("tenant-0", "tenant-39"):
            await probe.call("DEL", names_of(namespace).presence_prefix + "web-1")
            assert (await seen(publisher, namespace)).state == "coherent"
        assert subscriber.stats().lost == 0


async def test_a_presence_that_is_not_published_again_lasts_as_long_as_the_replica_does(redis_url: str) -> None:
    caches = {f"tenant-{number}": new_cache(max_staleness_seconds=0.6) for number in range(40)}
    async with (
        Publisher(redis_url) as publisher,
        Subscriber(redis_url, caches=caches, replica_id="web-1", **FAST) as subscriber,
    ):
        echoes = subscriber.stats().echoes
        while subscriber.stats().echoes < echoes + 30:
            assert [each.replica for each in await publisher.replicas("tenant-39")] == ["web-1"]
            await asyncio.sleep(0.02)
