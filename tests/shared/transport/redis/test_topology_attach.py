"""Several namespaces, several caches of one, and both coming and going while the subscriber runs."""

import asyncio
from typing import Any

import pytest
from cachetools import TTLCache
from fastapi import FastAPI
from httpx2 import ASGITransport, AsyncClient
from tests.support.redis_probe import redis_probe
from tests.support.replicas import FAST, fill, new_cache, reached
from tests.support.waiting import until

from broadcache.publisher import Publisher
from broadcache.shared import InvalidNamespace, InvalidSettings, Keys
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.subscriber import LocalCache, Subscriber
from broadcache.subscriber.endpoint.fastapi import router_of
from broadcache.subscriber.following import follower

pytestmark = pytest.mark.anyio


async def test_a_namespace_may_have_several_caches(redis_url: str) -> None:
    names, rights, products = new_cache(), new_cache(), new_cache()
    caches: dict[str, LocalCache | list[LocalCache]] = {"users": [names, rights], "products": products}
    async with Subscriber(redis_url, caches=caches, **FAST) as subscriber, Publisher(redis_url) as publisher:
        assert subscriber.caches == (names, rights, products)
        assert subscriber.caches_by_namespace == {"users": names, "products": products}
        for cache in subscriber.caches:
            fill(cache, "key", "other")
        await reached(subscriber, await publisher.publish(Keys("key"), namespace="users"))
        assert [set(cache) for cache in subscriber.caches] == [{"other"}, {"other"}, {"key", "other"}]
        assert subscriber.stats().received == {"applied": 1}


async def test_an_attached_namespace_is_coherent_when_attach_returns(redis_url: str) -> None:
    products, users = new_cache(), new_cache()
    async with (
        Subscriber(redis_url, caches={"products": products}, **FAST) as subscriber,
        Publisher(redis_url) as publisher,
    ):
        fill(products, "key")
        before = await publisher.publish(Keys("key"), namespace="users")
        assert await subscriber.attach("users", users)
        assert (subscriber.state, users.is_coherent) == ("coherent", True)
        assert subscriber.position("users") == before.position
        fill(users, "key", "other")
        await reached(subscriber, await publisher.publish(Keys("key"), namespace="users"))
        assert (set(users), set(products)) == ({"other"}, {"key"})
        # The link is the one that there was.
        assert subscriber.stats().subscriptions == 1
        assert products.stats().clears == {"subscribed": 1}


async def test_attaching_waits_for_no_echo_interval(redis_url: str) -> None:
    slow: dict[str, Any] = {**FAST, "echo_interval_seconds": 3600.0}
    products, users, names = (new_cache(max_staleness_seconds=7200.0) for _ in range(3))
    async with Subscriber(redis_url, caches={"products": products}, **slow) as subscriber:
        assert await subscriber.attach("users", users)
        assert await subscriber.attach("users", names)
        assert all(cache.is_coherent for cache in (products, users, names))


async def test_a_second_cache_of_a_namespace_begins_empty_and_coherent(redis_url: str) -> None:
    first, second = new_cache(), new_cache(when_incoherent="serve")
    fill(second, "key", "from before")
    async with Subscriber(redis_url, caches={"users": first}, **FAST) as subscriber, Publisher(redis_url) as publisher:
        fill(first, "key", "other")
        assert await subscriber.attach("users", second)
        assert (second.is_coherent, set(second)) == (True, set())
        assert set(first) == {"key", "other"}
        fill(second, "key", "other")
        await reached(subscriber, await publisher.publish(Keys("key"), namespace="users"))
        assert (set(first), set(second)) == ({"other"}, {"other"})


async def test_a_load_begun_before_attaching_is_not_stored(redis_url: str) -> None:
    cache = new_cache()
    token = cache.begin_load("key")
    async with Subscriber(redis_url, caches={"products": new_cache()}, **FAST) as subscriber:
        assert await subscriber.attach("users", cache)
        assert not cache.store(token, "old")


async def test_a_detached_namespace_is_bypassed_and_no_longer_heard(redis_url: str) -> None:
    products, users = new_cache(), new_cache()
    caches = {"products": products, "users": users}
    async with Subscriber(redis_url, caches=caches, **FAST) as subscriber, Publisher(redis_url) as publisher:
        await reached(subscriber, await publisher.publish(Keys("key"), namespace="products"))
        fill(users, "key", "other")
        # The first of them: the replica's probes come on another channel from now on.
        await subscriber.detach("products")
        assert (products.is_coherent, users.is_coherent, subscriber.state) == (False, True, "coherent")
        assert list(subscriber.caches_by_namespace) == ["users"]
        with pytest.raises(InvalidSettings, match="expected one of the namespaces users, got 'products'"):
            subscriber.position("products")
        with pytest.raises(InvalidSettings, match="got 'products'"):
            await subscriber.detach("products")
        async with redis_probe(redis_url) as probe:
            await until(lambda: subscriber.stats().echoes > 3)
            echoes = subscriber.stats().echoes
            await until(lambda: subscriber.stats().echoes > echoes + 2)
            channels = await probe.call("PUBSUB", "CHANNELS")
        assert channels == [channel for channel in channels if b"users" in channel]
        await reached(subscriber, await publisher.publish(Keys("key"), namespace="users"))
        assert (products.is_coherent, set(users)) == (False, {"other"})
        # What was counted stays counted.
        assert subscriber.stats().received == {"applied": 2}
        assert subscriber.stats().lost == 0


async def test_the_last_namespace_may_go_and_another_one_come(redis_url: str) -> None:
    cache = new_cache()
    async with (
        Subscriber(redis_url, caches={"products": cache}, **FAST) as subscriber,
        Publisher(redis_url) as publisher,
    ):
        await subscriber.detach("products")
        assert (subscriber.state, cache.is_coherent, subscriber.stats().subscriptions) == ("closed", False, 1)
        assert await subscriber.attach("products", cache)
        fill(cache, "key", "other")
        await reached(subscriber, await publisher.publish(Keys("key"), namespace="products"))
        assert set(cache) == {"other"}
        assert subscriber.stats().subscriptions == 2


async def test_a_detached_cache_is_bypassed_before_anything_is_awaited(own_server: EmbeddedServer) -> None:
    """Once the replica is not registered any more, it is not waited for."""
    cache = new_cache(max_staleness_seconds=60)
    async with Subscriber(own_server.url, caches={"products": cache}, **FAST) as subscriber:
        own_server.pause()  # the link cannot be closed in good order at once
        try:
            detaching = asyncio.create_task(subscriber.detach("products"))
            await asyncio.sleep(0)
            assert (detaching.done(), cache.is_coherent) == (False, False)
            detaching.cancel()
            await asyncio.wait([detaching])
            assert (detaching.cancelled(), cache.is_coherent) == (True, False)
        finally:
            own_server.resume()
        assert list(subscriber.caches_by_namespace) == []


@pytest.mark.parametrize("stage", ["read_head", "echo"])
async def test_the_first_namespace_may_go_while_another_one_comes(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The probe comes on a channel of the first namespace: of the one that was the first when it was subscribed to."""
    call, users, prices = getattr(follower, stage), new_cache(), new_cache()
    caches = {"products": new_cache(), "users": users}
    async with Subscriber(redis_url, caches=caches, **FAST) as subscriber, Publisher(redis_url) as publisher:

        async def detach_and_call(*arguments: Any, **options: Any) -> Any:
            if {"products", "prices"} <= subscriber.caches_by_namespace.keys():
                await subscriber.detach("products")
            return await call(*arguments, **options)

        monkeypatch.setattr(follower, stage, detach_and_call)
        assert await subscriber.attach("prices", prices)
        echoes = subscriber.stats().echoes
        await until(lambda: subscriber.stats().echoes > echoes + 2)
        assert list(subscriber.caches_by_namespace) == ["users", "prices"]
        for namespace, cache in subscriber.caches_by_namespace.items():
            fill(cache, "key", "other")
            await reached(subscriber, await publisher.publish(Keys("key"), namespace=namespace))
            assert set(cache) == {"other"}
        assert (subscriber.stats().lost, subscriber.stats().subscriptions) == (0, 1)
        monkeypatch.undo()


async def test_attaching_and_detaching_while_messages_flood_in_misses_nothing(redis_url: str) -> None:
    products = new_cache()
    async with (
        Subscriber(redis_url, caches={"products": products}, **FAST) as subscriber,
        Publisher(redis_url) as publisher,
    ):
        fill(products, *(f"key {number}" for number in range(400)))

        async def publish() -> None:
            for number in range(400):
                await publisher.publish(Keys(f"key {number}"), namespace="products")
                await publisher.publish(Keys(f"key {number}"), namespace="users")

        publishing = asyncio.create_task(publish())
        while not publishing.done():
            users = new_cache()
            assert await subscriber.attach("users", users)
            assert users.is_coherent
            await subscriber.detach("users")
        await publishing
        last = await publisher.publish(Keys("last"), namespace="products")
        await reached(subscriber, last)
        assert set(products) == set()
        assert products.stats().clears == {"subscribed": 1}


async def test_what_is_attached_while_redis_is_away_is_followed_when_it_is_back(own_server: EmbeddedServer) -> None:
    products, users = new_cache(), new_cache()
    options: dict[str, Any] = {**FAST, "start_timeout_seconds": 0.1}
    async with Subscriber(own_server.url, caches={"products": products}, **options) as subscriber:
        own_server.kill()
        await until(lambda: not products.is_coherent)
        assert not await subscriber.attach("users", users)
        assert not users.is_coherent
        await asyncio.to_thread(own_server.restart)
        await until(lambda: subscriber.state == "coherent")
        assert products.is_coherent
        assert users.is_coherent


async def test_what_is_attached_before_the_start_is_followed_from_the_start(redis_url: str) -> None:
    cache = new_cache()
    subscriber = Subscriber(redis_url, caches={"products": new_cache()}, **FAST)
    assert not await subscriber.attach("users", cache)
    async with subscriber:
        assert cache.is_coherent


async def test_the_status_route_shows_what_is_followed_now(redis_url: str) -> None:
    async with Subscriber(redis_url, caches={"products": new_cache()}, **FAST) as subscriber:
        app = FastAPI()
        app.include_router(router_of(subscriber))
        async with AsyncClient(transport=ASGITransport(app), base_url="http://replica") as client:
            await subscriber.attach("users", new_cache())
            await subscriber.detach("products")
            status = (await client.get("/cache-invalidation")).json()
            assert list(status["namespaces"]) == ["users"]
            assert status["namespaces"]["users"]["is_coherent"]
            assert (await client.get("/health/ready")).status_code == 200


async def test_what_cannot_be_attached_is_refused_and_changes_nothing(redis_url: str) -> None:
    cache = new_cache()
    async with Subscriber(redis_url, caches={"products": cache}, **FAST) as subscriber:
        with pytest.raises(InvalidNamespace):
            await subscriber.attach("no namespace", new_cache())
        with pytest.raises(InvalidSettings, match="expected a LocalCache for namespace 'users', got TTLCache"):
            await subscriber.attach("users", TTLCache(maxsize=1, ttl=1))  # type: ignore[arg-type]
        with pytest.raises(InvalidSettings, match="expected a cache that is not followed yet, got one that is"):
            await subscriber.attach("users", cache)
        assert list(subscriber.caches_by_namespace) == ["products"]
    with pytest.raises(InvalidSettings, match="at least one cache of each"):
        Subscriber(redis_url, caches={"products": list[LocalCache]()})


async def test_attaching_from_another_event_loop_is_refused(redis_url: str) -> None:
    with Subscriber(redis_url, caches={"products": new_cache()}, **FAST) as subscriber:
        with pytest.raises(InvalidSettings, match="on the subscriber's event loop"):
            await subscriber.attach("users", new_cache())
        with pytest.raises(InvalidSettings, match="on the subscriber's event loop"):
            await subscriber.detach("products")
        assert list(subscriber.caches_by_namespace) == ["products"]
