"""The second path with all its parts: DNS, the fan-out, real replicas behind a web server, and a Redis that is away."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from cachetools import TTLCache
from fastapi import FastAPI
from tests.support.dns_server import DnsServer
from tests.support.replicas import FAST, fill
from tests.support.waiting import until

from broadcache.publisher import Confirm, Fanout, Publisher
from broadcache.publisher.server import new_server
from broadcache.shared import Keys, LinkLost
from broadcache.shared.embedded import EmbeddedServer
from broadcache.subscriber import CacheInvalidationMixin

pytestmark = pytest.mark.anyio

HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
TOKEN = "swordfish"


class Replica(CacheInvalidationMixin):
    namespace = "products"

    def __init__(self, url: str, name: str) -> None:
        super().__init__(
            url,
            cache=TTLCache(maxsize=100, ttl=600),
            when_incoherent="serve",  # nothing but HTTP can tell it while Redis is away
            replica_id=name,
            replica_token=TOKEN,
            **FAST,
        )


@asynccontextmanager
async def serving(replica: Replica, host: str, port: int) -> AsyncIterator[None]:
    app = FastAPI(lifespan=replica.lifespan)
    app.include_router(replica.router)
    is_ready = asyncio.Event()
    with socket.create_server((host, port)) as listener:
        server = new_server(app, on_ready=is_ready.set)
        running = asyncio.create_task(server.serve([listener]))
        await is_ready.wait()
        try:
            yield
        finally:
            server.should_exit = True
            await running


@asynccontextmanager
async def fleet(url: str) -> AsyncIterator[tuple[list[Replica], Fanout]]:
    """Three replicas on one port, which DNS names, and what calls them."""
    async with AsyncExitStack() as stack:
        dns = await stack.enter_async_context(DnsServer())
        dns.a("web.test", *HOSTS)
        with socket.create_server((HOSTS[0], 0)) as free:
            port = free.getsockname()[1]
        replicas = [Replica(url, f"web-{number}") for number in range(len(HOSTS))]
        for replica, host in zip(replicas, HOSTS, strict=True):
            await stack.enter_async_context(serving(replica, host, port))
        await until(lambda: all(replica.subscriber.state == "coherent" for replica in replicas), "a coherent fleet")
        yield (
            replicas,
            Fanout("web.test", port, token=TOKEN, networks=["127.0.0.0/8"], nameservers=[dns.address]),
        )


def held(replicas: list[Replica], key: str) -> list[object]:
    return [replica.cache.get(key) for replica in replicas]


async def test_while_redis_is_away_every_replica_forgets_and_afterwards_nothing_is_lost_or_applied_twice(
    own_server: EmbeddedServer,
) -> None:
    async with (
        fleet(own_server.url) as (replicas, fanout),
        Publisher(own_server.url, timeout_seconds=0.5) as naive,
        Publisher(own_server.url, delivery="redis-then-fanout", fanout=fanout, timeout_seconds=1.0) as publisher,
    ):
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
            for replica in replicas:
                fill(replica.cache, "a")  # what is loaded from now on is new
            assert publisher.outbox_length == 1
        finally:
            own_server.resume()
        await until(lambda: publisher.outbox_length == 0, "an empty outbox")
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
            received = replica.subscriber.stats().received
            assert (received["http"], received["repeat"]) == (1, 1)
        # Applied a second time, it would have dropped what was loaded in between.
        assert held(replicas, "a") == ["old"] * 3


async def test_what_went_both_ways_is_applied_once_and_confirmed_by_every_replica(redis_url: str) -> None:
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
            received = replica.subscriber.stats().received
            assert received["applied"] + received["http"] - received["repeat"] == 1


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
