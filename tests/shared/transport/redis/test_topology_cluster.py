"""A cluster: each namespace at the server that has its slot, and what becomes of the promise when the slot moves."""

import asyncio
import re
from collections.abc import Iterator

import pytest
from tests.support.receipts import position_of
from tests.support.redis_probe import redis_probe
from tests.support.replicas import FAST, fill, new_cache, reached
from tests.support.topologies import ClusterOfThree, asked, cluster_of_three
from tests.support.waiting import until

from broadcache.publisher import Publisher
from broadcache.shared import Keys, LinkLost, LogRefused
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.names import names_of
from broadcache.subscriber import Subscriber

pytestmark = pytest.mark.anyio


def refusals_of(node: EmbeddedServer) -> set[bytes]:
    """The first words of the errors that a server has answered with."""
    return set(re.findall(rb"errorstat_(\w+)", asked(node.port, "INFO", "errorstats")))


@pytest.fixture
def cluster() -> Iterator[ClusterOfThree]:
    with cluster_of_three() as running:
        yield running


async def test_namespaces_on_different_servers_are_followed_and_published_to(cluster: ClusterOfThree) -> None:
    namespaces = cluster.namespaces()
    caches = {namespace: new_cache() for namespace in namespaces}
    async with Subscriber(cluster.url, caches=caches, **FAST) as subscriber, Publisher(cluster.url) as publisher:
        for namespace, node in zip(namespaces, cluster.nodes, strict=True):
            fill(caches[namespace], "key", "own key", "other")
            receipt = await publisher.publish(Keys("key"), namespace=namespace)
            assert receipt.receivers == 1
            await reached(subscriber, receipt)
            own = await subscriber.invalidate(Keys("own key"), namespace=namespace)
            await reached(subscriber, own)
            assert asked(node.port, "XLEN", names_of(namespace).log) == 2
            assert (await publisher.head(namespace), len(await publisher.history(namespace))) == (own.position, 2)
        assert [set(cache) for cache in caches.values()] == [{"other"}] * 3
        assert subscriber.stats().received == {"applied": 6}
        assert subscriber.stats().subscriptions == 3


async def test_messages_go_to_one_server_of_the_cluster_and_not_to_all(cluster: ClusterOfThree) -> None:
    namespace = cluster.namespaces()[0]
    async with Subscriber(cluster.url, caches={namespace: new_cache()}, **FAST):
        channels = [asked(node.port, "PUBSUB", "SHARDCHANNELS", "*cache-invalidation*") for node in cluster.nodes]
        assert [len(each) for each in channels] == [3, 0, 0]
        assert not any(asked(node.port, "PUBSUB", "CHANNELS") for node in cluster.nodes)


async def test_one_seed_that_answers_is_enough(cluster: ClusterOfThree) -> None:
    first, _, last = cluster.namespaces()
    url = f"redis+cluster://127.0.0.1:1,127.0.0.1:{cluster.nodes[1].port}"
    caches = {first: new_cache(), last: new_cache()}
    async with Subscriber(url, caches=caches, **FAST) as subscriber, Publisher(url) as publisher:
        for namespace in caches:
            await reached(subscriber, await publisher.publish(Keys("key"), namespace=namespace))


async def test_a_slot_that_moves_while_publishing_loses_nothing(cluster: ClusterOfThree) -> None:
    namespace, neighbour, _ = cluster.namespaces()
    caches = {namespace: new_cache(), neighbour: new_cache()}
    async with (
        Subscriber(cluster.url, caches=caches, **FAST) as subscriber,
        Publisher(cluster.url, timeout_seconds=20) as publisher,
    ):
        receipts = [await publisher.publish(Keys("first"), namespace=namespace)]
        await reached(subscriber, receipts[0])
        fill(caches[neighbour], "key")
        fill(caches[namespace], "key", "other")
        is_moved = False

        async def publish_meanwhile() -> None:
            while not is_moved or len(receipts) < 10:
                receipts.append(await publisher.publish(Keys("key"), namespace=namespace))

        publishing = asyncio.create_task(publish_meanwhile())
        await until(lambda: len(receipts) >= 3)
        with cluster.migrating(namespace, cluster.nodes[1]):
            # Neither server takes it while its keys are split between them: it is tried again until one does.
            publishing_then = asyncio.create_task(publisher.publish(Keys("then"), namespace=namespace))
            await until(lambda: {b"TRYAGAIN", b"ASK"} & refusals_of(cluster.nodes[0]))
        is_moved = True
        receipts.append(await publishing_then)
        await publishing
        await reached(subscriber, max(receipts, key=lambda receipt: position_of(receipt).sequence))
        assert sorted(position_of(receipt).sequence for receipt in receipts) == list(range(1, len(receipts) + 1))
        assert len({position_of(receipt).epoch for receipt in receipts}) == 1
        assert asked(cluster.nodes[1].port, "XLEN", names_of(namespace).log) == len(receipts)
        # Another server may not have everything that was accepted: it is not trusted, and the namespace is cleared.
        assert caches[namespace].stats().clears["server changed"] >= 1
        assert set(caches[namespace]) == set()
        assert set(caches[neighbour]) == {"key"}
        fill(caches[namespace], "key", "other")
        await reached(subscriber, await publisher.publish(Keys("key"), namespace=namespace))
        assert set(caches[namespace]) == {"other"}


async def test_a_server_that_dies_bypasses_its_own_namespaces_alone(cluster: ClusterOfThree) -> None:
    gone, there, _ = cluster.namespaces()
    caches = {gone: new_cache(), there: new_cache()}
    async with (
        Subscriber(cluster.url, caches=caches, **FAST) as subscriber,
        Publisher(cluster.url, timeout_seconds=1) as publisher,
    ):
        fill(caches[gone], "key")
        fill(caches[there], "key", "other")
        cluster.nodes[0].kill()
        await until(lambda: not caches[gone].is_coherent)
        assert subscriber.state != "coherent"
        receipt = await publisher.publish(Keys("key"), namespace=there)
        await until(lambda: subscriber.position(there) == receipt.position)
        assert set(caches[there]) == {"other"}
        with pytest.raises((LinkLost, LogRefused)):
            await publisher.publish(Keys("key"), namespace=gone)
        await asyncio.to_thread(cluster.nodes[0].restart)
        await until(lambda: subscriber.state == "coherent")
        assert caches[gone].stats().clears["server changed"] == 1
        fill(caches[gone], "key", "other")
        await reached(subscriber, await publisher.publish(Keys("key"), namespace=gone))
        assert set(caches[gone]) == {"other"}


async def test_a_publisher_that_addresses_the_right_server_directly_is_heard(cluster: ClusterOfThree) -> None:
    namespace, elsewhere, _ = cluster.namespaces()
    async with (
        Subscriber(cluster.url, caches={namespace: new_cache()}, **FAST) as subscriber,
        Publisher(cluster.nodes[0].url, timeout_seconds=0.5) as publisher,
    ):
        await reached(subscriber, await publisher.publish(Keys("key"), namespace=namespace))
        assert subscriber.stats().received == {"applied": 1}
        with pytest.raises(LogRefused, match="MOVED"):
            await publisher.publish(Keys("key"), namespace=elsewhere)


async def test_namespaces_come_and_go_in_a_cluster(cluster: ClusterOfThree) -> None:
    first, second, _ = cluster.namespaces()
    caches = {namespace: new_cache() for namespace in (first, second)}
    async with (
        Subscriber(cluster.url, caches={first: caches[first]}, **FAST) as subscriber,
        Publisher(cluster.url) as publisher,
    ):
        assert await subscriber.attach(second, caches[second])
        await reached(subscriber, await publisher.publish(Keys("key"), namespace=second))
        await subscriber.detach(first)
        assert (subscriber.state, caches[first].is_coherent, caches[second].is_coherent) == ("coherent", False, True)
        async with redis_probe(cluster.nodes[0].url) as probe:
            assert b"name=broadcache:" + subscriber.replica_id.encode() not in await probe.call("CLIENT", "LIST")


async def test_any_number_of_namespaces_is_published_at_once_over_one_connection_to_each_primary(
    cluster: ClusterOfThree,
) -> None:
    namespaces = [f"tenant-{number}" for number in range(300)]

    def connections() -> int:
        stats = [asked(node.port, "INFO", "stats") for node in cluster.nodes]
        return sum(int(each.partition(b"total_connections_received:")[2].split()[0]) for each in stats)

    async with Publisher(cluster.url) as publisher:
        before = connections()
        receipts = await asyncio.gather(*[publisher.publish(Keys("a"), namespace=each) for each in namespaces])
        assert [receipt.namespace for receipt in receipts] == namespaces
        # One to each primary, and one that finds them; these counts take one each as well.
        assert connections() - before <= 4 + 3
