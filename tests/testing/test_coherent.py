"""`coherent`: caches that serve in a test, without Redis, by a clock that the test ticks."""

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import pytest
from cachetools import TLRUCache, TTLCache
from fastapi import FastAPI
from fastapi.testclient import TestClient

from broadcache.shared import InvalidSettings, InvalidTarget, Keys, LinkLost, Prefixes
from broadcache.subscriber import CacheInvalidationMixin, LocalCache, Subscriber
from broadcache.testing import RecordingPublisher, coherent

pytestmark = pytest.mark.anyio

NOWHERE = "redis://127.0.0.1:1"


@pytest.fixture(autouse=True)
def no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection to Redis fails the test: coherent starts no link."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("something connects")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(asyncio, "open_connection", refuse)


def new_cache(**options: Any) -> LocalCache:
    return LocalCache(TTLCache(maxsize=100, ttl=300), **options)


class Products(CacheInvalidationMixin):
    namespace = "products"


# --- a cache ----------------------------------------------------------------------------------------------------------


def test_a_cache_serves_within_the_block_and_is_as_before_after_it(caplog: pytest.LogCaptureFixture) -> None:
    cache = new_cache()
    clock_before, on_bypass = cache.clock, cache.upkeep.on_bypass
    with coherent(cache):
        assert [cache.get_or_load_sync("a", lambda: 1) for _ in range(3)] == [1] * 3
        assert (cache.stats().hits, cache.stats().loads, cache.is_coherent) == (2, 1, True)
    assert (cache.is_coherent, cache.get("a"), len(cache), cache.stats().entries) == (False, None, 0, 0)
    assert cache.clock is clock_before
    assert "no subscriber was ever started" in caplog.text
    with coherent(cache):
        assert (cache.get("a"), cache.stats().hits, cache.stats().entries) == (None, 0, 0)
        cache["a"] = 1
    assert on_bypass is not None


@pytest.mark.parametrize(
    "cache",
    [
        new_cache(),
        LocalCache(TTLCache(maxsize=100, ttl=timedelta(seconds=300), timer=datetime.now)),
        LocalCache(TLRUCache(maxsize=100, ttu=lambda _, value, now: now + 300)),
        LocalCache(type("Own", (TTLCache,), {})(maxsize=100, ttl=300)),
        LocalCache({}),
    ],
    ids=["TTLCache", "datetime", "TLRUCache", "subclass", "ttl_seconds"],
)
def test_the_clock_of_the_block_expires_a_ttl_and_not_the_proof(cache: LocalCache) -> None:
    options: Any = {"ttl_seconds": 300} if cache.ttl is None and cache.maxsize is None else {}
    with coherent(cache) as clock:
        assert cache.get_or_load_sync("a", lambda: 1, **options) == 1
        clock.tick(299)
        assert (cache.get("a"), cache.is_coherent, cache.staleness_seconds) == (1, True, 0)
        clock.tick(timedelta(seconds=2))
        assert (cache.get("a"), cache.is_coherent) == (None, True)
        assert clock.elapsed_seconds == 301
        assert cache.get_or_load_sync("a", lambda: 2, **options) == 2
    with coherent(cache) as clock:
        cache.get_or_load_sync("a", lambda: 3, **options)
        clock.tick(1)
        assert cache.get("a") == 3


def test_the_timer_of_a_mapping_is_its_own_again_after_the_block() -> None:
    now = [50.0]
    mapping: TTLCache[str, Any] = TTLCache(maxsize=10, ttl=300, timer=lambda: now[0])
    cache = LocalCache(mapping)
    with coherent(cache) as clock:
        assert mapping.timer() == 50
        clock.tick(10)
        now[0] = 1_000
        assert mapping.timer() == 60
    assert mapping.timer() == 1_000


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "300"])
def test_time_goes_forward_only(seconds: Any) -> None:
    with coherent(new_cache()) as clock, pytest.raises(InvalidSettings, match="expected seconds to be a number"):
        clock.tick(seconds)


async def test_async_with_does_the_same_and_invalidations_apply() -> None:
    cache = new_cache()
    async with coherent(cache):
        assert await cache.get_or_load("a", lambda: 1) == 1
        cache.apply(Keys("a"))
        assert cache.get("a") is None


def test_threads_read_while_the_clock_ticks_and_find_no_gap() -> None:
    cache = new_cache(max_staleness_seconds=2)
    is_over = threading.Event()
    with coherent(cache) as clock:
        cache["a"] = 1

        def read() -> None:
            while not is_over.is_set():
                cache.get("a")

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        for _ in range(280):
            clock.tick(1)
        is_over.set()
        for reader in readers:
            reader.join()
        assert cache.stats().bypassed == 0


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_no_cache_and_what_is_kept_coherent_already_is_refused() -> None:
    anything: Any = {}
    with pytest.raises(InvalidSettings, match="expected a LocalCache, a Subscriber"):
        coherent(anything)
    with pytest.raises(InvalidSettings, match="got none"):
        coherent()
    cache = new_cache()
    cache.confirm_coherent(cache.clock())
    with pytest.raises(InvalidSettings, match="enter the block first"), coherent(cache):
        pytest.fail("entered")
    assert cache.is_coherent


async def test_a_running_subscriber_and_its_caches_are_refused_and_stay_as_they_are() -> None:
    cache, other = new_cache(), new_cache()
    subscriber = Subscriber(NOWHERE, caches={"products": cache}, start_timeout_seconds=0, backoff_seconds_max=60)
    with coherent(Subscriber(NOWHERE, caches={"products": other})):
        pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "open_connection", _never)
        async with subscriber:
            with pytest.raises(InvalidSettings, match="enter the block first"), coherent(subscriber):
                pytest.fail("entered")
            with pytest.raises(InvalidSettings, match="enter the block first"), coherent(other, cache):
                pytest.fail("entered")
            assert subscriber.is_running
    assert not other.is_coherent
    with coherent(subscriber, other):
        assert cache.is_coherent
        assert other.is_coherent


async def _never(*_: object, **__: object) -> None:
    await asyncio.Event().wait()


async def test_a_subscriber_of_a_cache_that_is_in_a_block_alone_is_not_started_beside_it() -> None:
    cache = new_cache()
    subscriber = Subscriber(NOWHERE, caches={"products": cache})
    with coherent(cache):
        with pytest.raises(InvalidSettings, match=r"hand the block the subscriber: coherent\(subscriber\)"):
            await subscriber.__aenter__()
        assert cache.is_coherent


async def test_a_subscriber_that_outlives_its_block_is_an_error_that_says_so() -> None:
    subscriber = Subscriber(NOWHERE, caches={"products": new_cache()})
    with pytest.raises(InvalidSettings, match="within the block"), coherent(subscriber):
        await subscriber.__aenter__()
    with pytest.raises(LinkLost):
        await subscriber.invalidate(Keys("a"), namespace="products")
    await subscriber.close()


# --- a subscriber -----------------------------------------------------------------------------------------------------


async def test_a_subscriber_runs_without_a_link_and_all_its_caches_serve() -> None:
    products, users = new_cache(), new_cache()
    subscriber = Subscriber(NOWHERE, caches={"products": products, "users": users}, start_timeout_seconds=60)
    with coherent(subscriber) as clock:
        assert (subscriber.state, products.is_coherent, users.is_coherent) == ("coherent", True, True)
        async with subscriber:
            assert subscriber.state == "coherent"
            assert await products.get_or_load("product:1", lambda: 1) == 1
            assert await subscriber.wait_coherent(60)
        clock.tick(100)
        assert (subscriber.state, products.get("product:1")) == ("coherent", 1)
    assert (subscriber.state, products.is_coherent, subscriber.position("products")) == ("closed", False, None)
    assert subscriber.stats().received == {}


def test_without_an_event_loop_it_runs_in_its_thread() -> None:
    cache = new_cache()
    subscriber = Subscriber(NOWHERE, caches={"products": cache})
    with coherent(subscriber), subscriber:
        assert cache.get_or_load_sync("a", lambda: 1) == 1
        receipt = subscriber.invalidate_sync(Keys("a"), namespace="products")
        assert (subscriber.position("products"), cache.get("a")) == (receipt.position, None)


async def test_an_invalidation_drops_here_and_is_recorded_whether_the_subscriber_runs_or_not() -> None:
    products, users, recorder = new_cache(), new_cache(), RecordingPublisher()
    subscriber = Subscriber(NOWHERE, caches={"products": products, "users": users}, replica_id="replica-1")
    with coherent(subscriber, publisher=recorder):
        for number, is_running in enumerate([False, True], start=1):
            products["a"] = users["a"] = 1
            if is_running:
                async with subscriber:
                    receipt = await subscriber.invalidate(Keys("a"), namespace="products", reason="sold")
            else:
                receipt = await subscriber.invalidate(Keys("a"), namespace="products", reason="sold")
            assert (receipt.position, receipt.is_logged) == (subscriber.position("products"), True)
            assert (receipt.position and receipt.position.sequence) == number
            assert (products.get("a"), users.get("a")) == (None, 1)
        with pytest.raises(InvalidTarget):
            await subscriber.invalidate(namespace="products")
        with pytest.raises(InvalidSettings, match="expected one of the namespaces products, users"):
            await subscriber.invalidate(Keys("a"), namespace="orders")
    assert [(each.keys, each.reason, each.source) for each in recorder.published] == [(("a",), "sold", "replica-1")] * 2
    with pytest.raises(LinkLost, match="not running"):
        await subscriber.invalidate(Keys("a"), namespace="products")


async def test_what_the_publisher_of_the_block_publishes_is_applied() -> None:
    products, users, recorder = new_cache(), new_cache(), RecordingPublisher()
    subscriber = Subscriber(NOWHERE, caches={"products": products, "users": users})
    with coherent(subscriber, publisher=recorder):
        products["a"] = users["a"] = 1
        receipt = await recorder.publish(Prefixes("a"), namespace="products")
        assert (products.get("a"), users.get("a")) == (None, 1)
        assert subscriber.position("products") == receipt.position
        assert (receipt.receivers, subscriber.stats().received) == (1, {"applied": 1})
        with pytest.raises(InvalidTarget):
            recorder.publish(namespace="products")
    recorder.publish(Keys("a"), namespace="products")
    assert len(recorder.published) == 2


async def test_a_namespace_that_is_attached_within_the_block_is_coherent_too() -> None:
    products, users = new_cache(), new_cache()
    subscriber = Subscriber(NOWHERE, caches={"products": products})
    with coherent(subscriber) as clock:
        async with subscriber:
            assert await subscriber.attach("users", users)
            users["a"] = 1
            clock.tick(301)
            assert (users.get("a"), users.is_coherent) == (None, True)
    assert (list(subscriber.sequencers), users.is_coherent) == (["products"], False)
    cached = users.cached("user:{user_id}")(lambda user_id: None)
    with pytest.raises(LinkLost, match="no subscriber follows the cache"):
        await asyncio.to_thread(cached.invalidate, 1)


async def test_a_cluster_has_one_stand_in_for_each_namespace() -> None:
    subscriber = Subscriber("redis+cluster://127.0.0.1:1", caches={"products": new_cache(), "users": new_cache()})
    with coherent(subscriber):
        async with subscriber:
            assert (await subscriber.invalidate(Keys("a"), namespace="users")).is_logged


# --- classes with the mixin, and blocks within blocks -----------------------------------------------------------------


async def test_an_object_with_the_mixin_stands_for_its_subscriber() -> None:
    products = Products(NOWHERE, cache=TTLCache(maxsize=10, ttl=300))
    with coherent(products) as clock:
        async with products:
            assert await products.get_or_load("a", lambda: 1) == 1
        assert (await products.invalidate(Keys("a"))).namespace == "products"
        assert products.cache.get("a") is None
        products.cache["a"] = 1
        clock.tick(301)
        assert products.cache.get("a") is None
    with pytest.raises(LinkLost):
        await products.invalidate(Keys("a"))


async def test_with_the_cache_alone_its_subscriber_invalidates_without_a_link() -> None:
    recorder = RecordingPublisher()
    subscriber = Subscriber(NOWHERE)
    products, users = Products(subscriber, cache={}), new_cache()
    subscriber.add("users", users)
    with coherent(products.cache, publisher=recorder):
        products.cache["a"] = 1
        recorder.publish(Keys("a"), namespace="users")
        assert products.cache.get("a") == 1
        assert (await products.invalidate(Keys("a"))).is_logged
        assert products.cache.get("a") is None
        products.cache["a"] = 1
        recorder.publish(Keys("a"), namespace="products")
        assert (products.cache.get("a"), users.is_coherent) == (None, False)
        with coherent(subscriber):
            async with subscriber:
                assert users.is_coherent
                assert (await products.invalidate(Keys("a"))).receivers == 1
        assert products.invalidate_sync(Keys("a")).is_logged
    assert [each.namespace for each in recorder.published] == ["users", *["products"] * 4]
    with pytest.raises(LinkLost, match="not running"):
        await products.invalidate(Keys("a"))


def test_a_shared_subscriber_counts_as_running_in_its_block() -> None:
    subscriber = Subscriber(NOWHERE)
    products = Products(subscriber, cache={})
    with coherent(products), products:
        assert products.get_or_load_sync("a", lambda: 1) == 1
        assert products.cache.get("a") == 1


def test_a_block_within_a_block_joins_it() -> None:
    products, users, orders = new_cache(), new_cache(), new_cache()
    subscriber = Subscriber(NOWHERE, caches={"products": products, "users": users})
    outer, inner = RecordingPublisher(), RecordingPublisher()
    with coherent(subscriber, publisher=outer) as clock:
        products["a"] = 1
        with coherent(products, orders, publisher=inner) as same:
            assert (same is clock, products.get("a"), orders.is_coherent) == (True, 1, True)
            subscriber.invalidate_sync(Keys("a"), namespace="products")
            orders["a"] = 1
            clock.tick(301)
            assert orders.get("a") is None
        assert (products.is_coherent, users.is_coherent, orders.is_coherent) == (True, True, False)
        products["a"] = 2
    assert not products.is_coherent
    assert [each.keys for each in outer.published] == [each.keys for each in inner.published] == [("a",)]


def test_blocks_may_end_in_any_order_and_two_clocks_for_one_block_are_refused() -> None:
    one, other = new_cache(), new_cache()
    first, second = coherent(one), coherent(one, other)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    still = one.is_coherent
    second.__exit__(None, None, None)
    assert (still, one.is_coherent) == (True, False)
    with coherent(one), coherent(other), pytest.raises(InvalidSettings, match="one clock"), coherent(one, other):
        pytest.fail("entered")
    assert not one.is_coherent


# --- the test of a user's application ---------------------------------------------------------------------------------


def test_a_users_own_test_with_testclient_needs_no_redis(caplog: pytest.LogCaptureFixture) -> None:
    prices = {1: 100}
    cache = new_cache()
    subscriber = Subscriber(NOWHERE, caches={"products": cache})

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        yield {"database": "open"}

    app = FastAPI(lifespan=subscriber.lifespan_with(lifespan))
    app.include_router(subscriber.router)

    @app.get("/prices/{product_id}")
    async def price(product_id: int) -> int:
        return await cache.get_or_load(f"product:{product_id}", lambda: prices[product_id])

    @app.put("/prices/{product_id}/{cents}")
    async def change(product_id: int, cents: int) -> None:
        prices[product_id] = cents
        await subscriber.invalidate(Keys(f"product:{product_id}"), namespace="products")

    with caplog.at_level(logging.WARNING), coherent(subscriber), TestClient(app) as client:
        assert client.get("/health/ready").json()["status"] == "ready"
        assert client.get("/prices/1").json() == 100
        prices[1] = 150
        assert client.get("/prices/1").json() == 100
        client.put("/prices/1/200")
        assert client.get("/prices/1").json() == 200
        assert (
            client.post("/cache-invalidation", content=b'{"namespace":"products","keys":["product:1"]}').json()[
                "outcome"
            ]
            == "applied"
        )
    assert caplog.messages == []
