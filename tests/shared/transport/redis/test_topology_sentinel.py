"""A primary that sentinels know, and what becomes of the promise when another one takes its place."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.receipts import position_of
from tests.support.replicas import FAST, FAST_START, fill, new_cache, reached
from tests.support.topologies import SERVICE, Watched, asked, sentinel, watched
from tests.support.waiting import until, wait_until

from broadcache.publisher import Publisher
from broadcache.shared import Keys, LinkLost
from broadcache.shared.transport.redis.address import RedisAddress
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.link import Link
from broadcache.shared.transport.redis.names import names_of
from broadcache.subscriber import Subscriber

pytestmark = pytest.mark.anyio

LOG = names_of("default").log


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Watched]:
    with watched(tmp_path) as running:
        yield running


async def test_the_primary_is_found_although_sentinels_are_away(servers: Watched) -> None:
    url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:2,127.0.0.1:{servers.sentinel_ports[2]}/{SERVICE}"
    cache = new_cache()
    async with Subscriber(url, caches={"default": cache}, **FAST) as subscriber, Publisher(url) as publisher:
        fill(cache, "key", "other")
        await reached(subscriber, await publisher.publish(Keys("key")))
        assert set(cache) == {"other"}
        assert asked(servers.primary.port, "XLEN", LOG) == 1


async def test_after_a_failover_everything_is_dropped_and_what_is_published_is_heard(servers: Watched) -> None:
    caches = [new_cache(), new_cache()]
    async with (
        Subscriber(servers.url, caches={"default": caches[0]}, **FAST) as first,
        Subscriber(servers.url, caches={"default": caches[1]}, **FAST) as second,
        Publisher(servers.url, timeout_seconds=30) as publisher,
    ):
        before = await publisher.publish(Keys("key"))
        for subscriber, cache in zip((first, second), caches, strict=True):
            await reached(subscriber, before)
            fill(cache, "key", "other")
        failing_over = asyncio.create_task(asyncio.to_thread(servers.fail_over))
        await until(lambda: not servers.primary.is_running)
        # Published while there is no primary: it is accepted by the next one.
        receipt = await publisher.publish(Keys("key"), id="order-7")
        await failing_over
        for subscriber, cache in zip((first, second), caches, strict=True):
            await reached(subscriber, receipt)
            assert set(cache) == set()
            assert cache.stats().clears["server changed"] == 1
            fill(cache, "key", "other")
        own = await first.invalidate(Keys("key"), namespace="default")
        for subscriber, cache in zip((first, second), caches, strict=True):
            await reached(subscriber, own)
            assert set(cache) == {"other"}
        assert (await publisher.publish(Keys("key"), id="order-7")).is_repeat


async def test_a_failover_that_loses_writes_leaves_no_replica_stale(servers: Watched) -> None:
    cache = new_cache()
    async with (
        Subscriber(servers.url, caches={"default": cache}, **FAST) as subscriber,
        Publisher(servers.url, timeout_seconds=30) as publisher,
    ):
        kept = await publisher.publish(Keys("kept"))
        wait_until(lambda: asked(servers.replica.port, "XLEN", LOG) == 1, "replication")
        servers.replica.pause()
        asked(servers.primary.port, "CLIENT", "KILL", "TYPE", "replica")
        lost = [await publisher.publish(Keys(f"lost {number}")) for number in range(2)]
        await reached(subscriber, lost[-1])
        fill(cache, "key", "other")
        servers.primary.kill()
        servers.replica.resume()
        await asyncio.to_thread(wait_until, lambda: asked(servers.replica.port, "ROLE")[0] == b"master", "a promotion")
        reused = [await publisher.publish(Keys(key)) for key in ("key", "something else")]
        # The same positions once more, with other targets: by sequence alone they are duplicates.
        assert [each.position for each in reused] == [each.position for each in lost]
        assert position_of(reused[0]).epoch == position_of(kept).epoch
        await reached(subscriber, reused[-1])
        assert set(cache) == set()
        assert cache.stats().clears["server changed"] == 1


async def test_a_planned_failover_is_followed_while_publishing(servers: Watched) -> None:
    cache = new_cache()
    async with (
        Subscriber(servers.url, caches={"default": cache}, **FAST) as subscriber,
        Publisher(servers.url, timeout_seconds=30) as publisher,
    ):
        receipts = [await publisher.publish(Keys("key"))]
        await reached(subscriber, receipts[0])
        asked(servers.sentinel_ports[0], "SENTINEL", "FAILOVER", SERVICE)
        while asked(servers.primary.port, "ROLE")[0] == b"master":
            receipts.append(await publisher.publish(Keys("key")))
        own = await subscriber.invalidate(Keys("key"), namespace="default", timeout_seconds=30)
        last = await publisher.publish(Keys("key"))
        assert position_of(last).sequence == position_of(own).sequence + 1
        await reached(subscriber, last)
        assert asked(servers.replica.port, "XLEN", LOG) == position_of(last).sequence


async def test_a_demoted_primary_is_asked_again_until_there_is_one(own_server: EmbeddedServer) -> None:
    cache = new_cache()
    async with (
        Subscriber(own_server.url, caches={"default": cache}, **FAST) as subscriber,
        Publisher(own_server.url, timeout_seconds=20) as publisher,
    ):
        await reached(subscriber, await publisher.publish(Keys("key")))
        asked(own_server.port, "REPLICAOF", "127.0.0.1", "1")
        await until(lambda: subscriber.stats().lost)
        publishing = asyncio.create_task(publisher.publish(Keys("key")))
        invalidating = asyncio.create_task(subscriber.invalidate(Keys("key"), namespace="default", timeout_seconds=20))
        await until(lambda: b"READONLY" in asked(own_server.port, "INFO", "errorstats"))
        assert not cache.is_coherent
        asked(own_server.port, "REPLICAOF", "NO", "ONE")
        receipts = await asyncio.gather(publishing, invalidating)
        assert sorted(position_of(receipt).sequence for receipt in receipts) == [2, 3]


async def test_a_named_primary_that_is_none_is_refused(own_server: EmbeddedServer, tmp_path: Path) -> None:
    with sentinel(tmp_path / "sentinel", own_server.port, down_after_ms=60_000) as port:
        asked(own_server.port, "REPLICAOF", "127.0.0.1", "1")
        address = RedisAddress(f"redis+sentinel://127.0.0.1:{port}/{SERVICE}")
        with pytest.raises(LinkLost, match=rf"to name a primary, got 127\.0\.0\.1:{own_server.port}, whose role is .+"):
            await Link.open(address, client_name="test", timeout_seconds=5)


async def test_sentinels_may_want_a_password_of_their_own(own_server: EmbeddedServer, tmp_path: Path) -> None:
    with sentinel(tmp_path / "sentinel", own_server.port, down_after_ms=60_000, password="swordfish") as port:
        url = f"redis+sentinel://127.0.0.1:{port}/{SERVICE}"
        async with Publisher(f"{url}?sentinel_password=swordfish") as publisher:
            assert position_of(await publisher.publish(Keys("key"))).sequence == 1
        async with Publisher(f"{url}?sentinel_password=hunter2", timeout_seconds=0.5) as publisher:
            with pytest.raises(
                LinkLost, match=r"the primary of 'orders', got: 127\.0\.0\.1:\d+ \(.*(WRONGPASS|invalid)"
            ) as refused:
                await publisher.publish(Keys("key"))
            assert "hunter2" not in str(refused.value)


async def test_a_service_that_no_sentinel_knows_bypasses_and_says_why(
    own_server: EmbeddedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with sentinel(tmp_path / "sentinel", own_server.port, down_after_ms=60_000) as port:
        url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{port}/invoices"
        cache = new_cache()
        with caplog.at_level(logging.WARNING, logger="broadcache"):
            async with Subscriber(url, caches={"default": cache}, **FAST_START) as subscriber:
                await until(lambda: subscriber.stats().lost)
                assert not cache.is_coherent
        assert "a sentinel to name the primary of 'invoices', got: 127.0.0.1:1 (" in caplog.text
        assert f"127.0.0.1:{port} (knows no primary)" in caplog.text
