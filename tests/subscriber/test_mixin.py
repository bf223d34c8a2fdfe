"""The mixin as a service uses it: a FastAPI application with a lifespan, a router and nothing else to wire."""

import asyncio
import copy
import pickle
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from cachetools import TTLCache
from fastapi import FastAPI
from tests.support.receipts import position_of
from tests.support.waiting import until

from broadcache.publisher import Publisher, SyncPublisher
from broadcache.shared import InvalidSettings, Keys, Tags
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.subscriber import CacheInvalidationMixin, LocalCache

pytestmark = pytest.mark.anyio

FAST: dict[str, Any] = {"echo_interval_seconds": 0.05, "echo_timeout_seconds": 0.3, "backoff_seconds_max": 0.1}


class Catalogue(CacheInvalidationMixin):
    namespace = "products"

    def __init__(self, redis_url: str | None = None, **options: Any) -> None:
        super().__init__(redis_url, cache=TTLCache(maxsize=10_000, ttl=300), **options)
        self.prices = {1: 100}
        self.loads = 0

    async def price(self, product_id: int) -> int:
        return await self.get_or_load(f"product:{product_id}", lambda: self.load(product_id), tags=("catalogue",))

    async def load(self, product_id: int) -> int:
        self.loads += 1
        return self.prices[product_id]


def app_of(catalogue: Catalogue) -> FastAPI:
    app = FastAPI(lifespan=catalogue.lifespan)
    app.include_router(catalogue.router)

    @app.get("/prices/{product_id}")
    async def price(product_id: int) -> int:
        return await catalogue.price(product_id)

    return app


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://replica") as client,
    ):
        yield client


async def test_a_service_of_a_few_lines_forgets_what_is_published(redis_url: str) -> None:
    catalogue = Catalogue(redis_url)
    async with running(app_of(catalogue)) as client, Publisher(redis_url) as publisher:
        assert [(await client.get("/prices/1")).json() for _ in range(3)] == [100] * 3
        assert catalogue.loads == 1
        catalogue.prices[1] = 200
        await publisher.publish(Keys("product:1"), namespace="products")
        await until(lambda: catalogue.cache.stats().dropped == 1)
        assert (await client.get("/prices/1")).json() == 200


async def test_a_replica_tells_every_other_one(redis_url: str) -> None:
    one, other = Catalogue(redis_url), Catalogue(redis_url)
    async with one, other:
        assert (await one.price(1), await other.price(1)) == (100, 100)
        one.prices[1] = other.prices[1] = 200
        receipt = await one.invalidate(Tags("catalogue"), reason="new prices")
        assert (await one.price(1), receipt.namespace) == (200, "products")
        await until(lambda: other.subscriber.position("products") == receipt.position)
        assert await other.price(1) == 200


async def test_readiness_tells_the_truth(own_server: EmbeddedServer) -> None:
    catalogue = Catalogue(own_server.url, replica_id="replica-1", **FAST)
    async with running(app_of(catalogue)) as client:
        ready = await client.get("/health/ready")
        assert (ready.status_code, ready.json()) == (
            200,
            {"status": "ready", "state": "coherent", "replicas": [{"replica": "replica-1", "state": "coherent"}]},
        )
        own_server.kill()
        await until(lambda: catalogue.subscriber.state != "coherent")
        ready = await client.get("/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "not ready")
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/prices/1")).json() == 100  # slower, and right


async def test_the_status_route_shows_position_staleness_and_counters(redis_url: str) -> None:
    catalogue = Catalogue(redis_url, replica_id="replica-1", max_staleness_seconds=3)
    async with running(app_of(catalogue)) as client, Publisher(redis_url) as publisher:
        await catalogue.price(1)
        await catalogue.price(1)
        receipt = await publisher.publish(Keys("product:1"), namespace="products")
        await until(lambda: catalogue.subscriber.position("products") == receipt.position)
        status = (await client.get("/cache-invalidation")).json()
    products = status["namespaces"]["products"]
    assert (status["replica"], status["state"], status["received"]) == ("replica-1", "coherent", {"applied": 1})
    assert products["position"] == {"epoch": position_of(receipt).epoch, "sequence": 1}
    assert products["is_coherent"] is True
    assert 0 <= products["staleness_seconds"] < products["max_staleness_seconds"] == 3
    assert {name: products["cache"][name] for name in ("hits", "misses", "loads", "dropped")} == {
        "hits": 1,
        "misses": 1,
        "loads": 1,
        "dropped": 1,
    }


async def test_the_routes_are_described_in_the_services_openapi_document(redis_url: str) -> None:
    async with running(app_of(Catalogue(redis_url))) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/health/live", "/health/ready", "/cache-invalidation"} <= set(paths)


async def test_start_and_stop_work_where_there_is_no_lifespan(redis_url: str) -> None:
    catalogue = Catalogue(redis_url)
    await catalogue.stop()
    await catalogue.start()
    assert catalogue.cache.is_coherent
    await catalogue.stop()
    await catalogue.stop()
    assert not catalogue.cache.is_coherent


async def test_a_service_without_an_event_loop_uses_with(redis_url: str) -> None:
    catalogue = Catalogue(redis_url)

    def serve() -> tuple[bool, int]:
        with catalogue:
            return catalogue.cache.is_coherent, catalogue.get_or_load_sync("product:1", lambda: 7)

    assert await asyncio.to_thread(serve) == (True, 7)


async def test_one_application_can_be_started_again_in_another_event_loop(redis_url: str) -> None:
    catalogue = Catalogue(redis_url)

    async def live() -> int:
        async with catalogue:
            return await catalogue.price(1)

    assert [await asyncio.to_thread(asyncio.run, live()) for _ in range(2)] == [100, 100]


async def test_the_url_comes_from_the_environment_when_it_is_left_out(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROADCACHE_REDIS_URL", redis_url)
    async with Catalogue() as catalogue:
        assert catalogue.cache.is_coherent
    monkeypatch.delenv("BROADCACHE_REDIS_URL")
    with pytest.raises(InvalidSettings, match="pass one, or set BROADCACHE_REDIS_URL"):
        Catalogue()


async def test_a_local_cache_with_options_of_its_own_is_taken_as_it_is(redis_url: str) -> None:
    cache = LocalCache(TTLCache(maxsize=10, ttl=10), negative_ttl_seconds=1, max_staleness_seconds=2)

    class Users(CacheInvalidationMixin):
        namespace = "users"

    assert Users(redis_url, cache=cache).cache is cache


async def test_the_mixin_leaves_one_private_attribute_in_the_class_it_is_mixed_into(redis_url: str) -> None:
    assert set(vars(Catalogue(redis_url))) == {"prices", "loads", "_CacheInvalidationMixin__parts"}


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused_with_what_to_do_instead(redis_url: str, duplicate: Callable[[object], object]) -> None:
    catalogue = Catalogue(redis_url)
    for thing in (catalogue, catalogue.cache, catalogue.subscriber, Publisher(redis_url), SyncPublisher(redis_url)):
        expected = f"expected a {type(thing).__name__} to stay in its process, .* construct another one there"
        with pytest.raises(TypeError, match=expected):
            duplicate(thing)


def test_a_class_may_say_itself_what_a_copy_of_it_is(redis_url: str) -> None:
    class Copied(Catalogue):
        def __reduce__(self) -> tuple[Callable[[], str], tuple[()]]:
            return str, ()

    class Restored(Catalogue):
        def __getstate__(self) -> dict[str, Any]:  # type: ignore[override]
            return {"prices": self.prices}

    duplicate: object = copy.copy(Copied(redis_url))
    assert duplicate == ""
    assert vars(copy.copy(Restored(redis_url))) == {"prices": {1: 100}}
