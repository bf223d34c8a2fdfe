"""One subscriber for a process: from its environment, run by its application, with routes, shared by its classes."""

import inspect
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from cachetools import TTLCache
from fastapi import FastAPI, Request
from starlette.applications import Starlette
from starlette.requests import Request as StarletteRequest
from starlette.responses import JSONResponse
from starlette.routing import Route
from tests.support.waiting import until

from broadcache.publisher import Publisher
from broadcache.shared import InvalidSettings, Keys
from broadcache.subscriber import CacheInvalidationMixin, LocalCache, Subscriber
from broadcache.subscriber.following.settings import SubscriberOptions, SubscriberSettings
from broadcache.testing import coherent

pytestmark = pytest.mark.anyio

NOWHERE = "redis://127.0.0.1:1"


def new_cache() -> LocalCache:
    return LocalCache(TTLCache(maxsize=100, ttl=300))


@asynccontextmanager
async def running(app: Any, host: str = "127.0.0.1") -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=app, client=(host, 1234))
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
    ):
        yield client


class Products(CacheInvalidationMixin):
    namespace = "products"


class Users(CacheInvalidationMixin):
    namespace = "users"


# --- from the environment ---------------------------------------------------------------------------------------------


def test_each_option_of_a_subscriber_can_be_given_where_one_is_made_for_you() -> None:
    parameters = inspect.signature(Subscriber.__init__).parameters
    options = {name for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY} - {"caches"}
    assert options == set(SubscriberOptions.__annotations__)
    timing = set(SubscriberSettings.__struct_fields__) - {"redis_url"}
    assert timing <= options
    defaults = {name: parameters[name].default for name in timing}
    assert {name: getattr(SubscriberSettings(redis_url=NOWHERE), name) for name in timing} == defaults


async def test_the_environment_says_where_redis_is_and_an_argument_has_precedence(redis_url: str) -> None:
    cache = new_cache()
    environ = {"BROADCACHE_REDIS_URL": redis_url, "BROADCACHE_ECHO_INTERVAL_SECONDS": "4.5"}
    subscriber = Subscriber.from_env(caches={"products": cache}, environ=environ)
    async with subscriber:
        assert (subscriber.state, cache.is_coherent) == ("coherent", True)
    with pytest.raises(InvalidSettings, match="must exceed echo_interval_seconds"):
        Subscriber.from_env(
            caches={"products": LocalCache({}, max_staleness_seconds=2)},
            environ=environ,
        )
    Subscriber.from_env(
        caches={"products": LocalCache({}, max_staleness_seconds=2)}, environ=environ, echo_interval_seconds=1
    )


def test_a_given_environment_takes_the_place_of_the_own_one_for_each_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROADCACHE_PREFIX", "own")
    monkeypatch.setenv("BROADCACHE_REPLICA_ALLOW_OPEN", "true")
    environ = {
        "BROADCACHE_REDIS_URL": NOWHERE,
        "BROADCACHE_PREFIX": "staging",
        "BROADCACHE_REPLICA_TOKEN": "t" * 40,
        "BROADCACHE_REPLICA_ALLOW_OPEN": "",
    }
    given = Subscriber.from_env(environ=environ)
    assert "prefix=staging" in repr(given)
    assert (len(given._access.tokens), given._access.allow_open) == (1, False)
    bare = Subscriber.from_env(environ={"BROADCACHE_REDIS_URL": NOWHERE})
    assert "prefix" not in repr(bare)
    assert not bare._access.allow_open
    assert "prefix=mine" in repr(Subscriber.from_env(environ=environ, prefix="mine"))
    assert "prefix=url" in repr(
        Subscriber.from_env(environ={**environ, "BROADCACHE_REDIS_URL": f"{NOWHERE}?prefix=url"})
    )
    assert "prefix=own" in repr(Subscriber(NOWHERE))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "expected BROADCACHE_REDIS_URL, got none"),
        ({"BROADCACHE_REDIS_URL": " "}, "expected BROADCACHE_REDIS_URL, got none"),
        (
            {"BROADCACHE_REDIS_URL": NOWHERE, "BROADCACHE_ECHO_INTERVAL_SECONDS": "often"},
            "BROADCACHE_ECHO_INTERVAL_SECONDS: expected .*, got 'often'",
        ),
        ({"BROADCACHE_REDIS_URL": NOWHERE, "BROADCACHE_BACKOFF_SECONDS_MAX": "0"}, "BROADCACHE_BACKOFF_SECONDS_MAX"),
        ({"BROADCACHE_REDIS_URL": NOWHERE, "BROADCACHE_REPLICA_ALLOW_OPEN": "maybe"}, "expected true or false"),
        ({"BROADCACHE_REDIS_URL": NOWHERE, "BROADCACHE_REPLICA_TOKEN": "two words"}, "BROADCACHE_REPLICA_TOKEN"),
        ({"BROADCACHE_REDIS_URL": NOWHERE, "BROADCACHE_PREFIX": "a b{}"}, "prefix is not valid"),
    ],
)
def test_a_wrong_variable_is_refused_when_the_subscriber_is_made(environ: dict[str, str], expected: str) -> None:
    with pytest.raises(InvalidSettings, match=expected):
        Subscriber.from_env(caches={"products": new_cache()}, environ=environ)


def test_a_misspelt_variable_is_warned_of_and_one_of_a_publisher_is_not(caplog: pytest.LogCaptureFixture) -> None:
    environ = {
        "BROADCACHE_REDIS_URL": NOWHERE,
        "BROADCACHE_ECHO_INTERVAL": "1",
        "BROADCACHE_LISTEN_PORT": "8000",
        "BROADCACHE_PREFIX": "",
        "BROADCACHE_REPLICA_TOKEN": "",
    }
    with caplog.at_level(logging.WARNING, "broadcache.settings"):
        Subscriber.from_env(caches={"products": new_cache()}, environ=environ)
    [line] = caplog.messages
    assert "did you mean BROADCACHE_ECHO_INTERVAL_SECONDS?" in line


def test_a_misspelt_option_is_refused_when_it_is_called() -> None:
    options: Any = {"echo_intervall_seconds": 1}
    with pytest.raises(TypeError, match="echo_intervall_seconds"):
        Subscriber.from_env(caches={"products": new_cache()}, environ={"BROADCACHE_REDIS_URL": NOWHERE}, **options)
    with pytest.raises(TypeError, match="echo_intervall_seconds"):
        Products(NOWHERE, cache={}, **options)


# --- run by an application --------------------------------------------------------------------------------------------


async def test_an_application_runs_the_subscriber(redis_url: str) -> None:
    cache = new_cache()
    subscriber = Subscriber(redis_url, caches={"products": cache})
    app = FastAPI(lifespan=subscriber.lifespan)
    app.include_router(subscriber.router)
    async with running(app) as client, Publisher(redis_url) as publisher:
        assert (await client.get("/health/ready")).json()["status"] == "ready"
        assert await cache.get_or_load("product:1", lambda: 1) == 1
        receipt = await publisher.publish(Keys("product:1"), namespace="products")
        await until(lambda: subscriber.position("products") == receipt.position)
        assert "product:1" not in cache
    assert subscriber.state == "closed"


async def test_a_lifespan_of_the_applications_own_runs_within_the_subscribers(redis_url: str) -> None:
    cache = new_cache()
    subscriber = Subscriber(redis_url, caches={"products": cache})
    seen: list[bool] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        seen.append(cache.is_coherent)
        yield {"database": app.title}
        await subscriber.invalidate(Keys("product:1"), namespace="products")
        seen.append(cache.is_coherent)

    app = FastAPI(lifespan=subscriber.lifespan_with(lifespan), title="shop")

    @app.get("/")
    async def state(request: Request) -> str:
        database: str = request.state.database
        return database

    async with app.router.lifespan_context(app) as yielded:
        assert yielded == {"database": "shop"}
    assert (seen, subscriber.state) == ([True, True], "closed")


async def test_a_generator_without_its_decorator_is_refused_with_what_to_do() -> None:
    async def lifespan(app: object) -> AsyncIterator[None]:
        yield

    undecorated: Any = lifespan
    with pytest.raises(InvalidSettings, match=r"lifespan'; put @contextlib\.asynccontextmanager above it"):
        Subscriber(NOWHERE, caches={"products": new_cache()}).lifespan_with(undecorated)


async def test_starlette_has_the_same_routes_behind_its_own(redis_url: str) -> None:
    async def own(request: StarletteRequest) -> JSONResponse:
        return JSONResponse("own")

    subscriber = Subscriber(redis_url, caches={"products": new_cache()})
    app = Starlette(routes=[Route("/own", own), *subscriber.routes], lifespan=subscriber.lifespan)
    async with running(app) as client:
        assert (await client.get("/own")).json() == "own"
        assert (await client.get("/health/ready")).json()["status"] == "ready"
        assert (await client.post("/cache-invalidation", content=b"{}")).status_code == 200


@pytest.mark.parametrize(
    ("options", "host", "status"),
    [
        ({}, "127.0.0.1", 200),
        ({}, "10.0.0.7", 403),
        ({"allow_open": True}, "10.0.0.7", 200),
        ({"replica_token": "a-token-of-sixteen-characters"}, "127.0.0.1", 401),
    ],
)
async def test_a_post_from_beyond_this_machine_needs_a_token_or_an_open_door(
    options: dict[str, Any], host: str, status: int, redis_url: str
) -> None:
    subscriber = Subscriber(redis_url, caches={"products": new_cache()}, **options)
    app = FastAPI(lifespan=subscriber.lifespan)
    app.include_router(subscriber.router)
    async with running(app, host) as client:
        assert (await client.post("/cache-invalidation", content=b"")).status_code == status


# --- shared by classes ------------------------------------------------------------------------------------------------


async def test_several_classes_share_one_subscriber_and_one_link(redis_url: str) -> None:
    names = new_cache()
    subscriber = Subscriber(redis_url, caches={"users": names})
    products, users = Products(subscriber, cache=TTLCache(maxsize=10, ttl=60)), Users(subscriber)
    assert users.cache is names
    assert products.subscriber is users.subscriber is subscriber
    async with subscriber, Publisher(redis_url) as publisher:
        async with products, users:  # harmless: the subscriber runs
            assert await products.get_or_load("product:1", lambda: 1) == 1
        assert products.cache.is_coherent
        assert len(await publisher.replicas("products")) == len(await publisher.replicas("users")) == 1
        receipt = await products.invalidate(Keys("product:1"))
        assert (receipt.namespace, "product:1" in products.cache) == ("products", False)


async def test_a_shared_subscriber_is_never_started_by_a_class_and_the_error_says_what_to_start() -> None:
    subscriber = Subscriber(NOWHERE, caches={"products": new_cache()}, start_timeout_seconds=0)
    products = Products(subscriber)
    with pytest.raises(InvalidSettings, match="expected the shared subscriber of this Products to run"):
        await products.start()
    with pytest.raises(InvalidSettings, match=r"FastAPI\(lifespan=subscriber.lifespan\)"):
        async with products.lifespan(None):
            pytest.fail("entered")
    with pytest.raises(InvalidSettings, match="shared subscriber"), products:
        pytest.fail("entered")
    await products.stop()
    async with subscriber:
        await products.start()
        await products.stop()
        assert subscriber.state != "closed"


def test_what_a_shared_subscriber_decides_is_refused_beside_it() -> None:
    subscriber: Any = Subscriber(NOWHERE)
    with pytest.raises(InvalidSettings, match="expected no replica_id, allow_open beside a shared subscriber"):
        Products(subscriber, cache={}, replica_id="r", allow_open=True)
    with pytest.raises(InvalidSettings, match="for the namespace 'products', got a subscriber of none"):
        Products(subscriber)
    without_cache: Any = Products
    with pytest.raises(InvalidSettings, match="expected a cache, got none"):
        without_cache(NOWHERE)


async def test_a_subscriber_without_caches_is_refused_when_it_is_entered(redis_url: str) -> None:
    subscriber = Subscriber(redis_url)
    with pytest.raises(InvalidSettings, match="expected a subscriber with a cache"):
        await subscriber.__aenter__()
    subscriber.add("products", new_cache())
    async with subscriber:
        with pytest.raises(InvalidSettings, match="await attach"):
            subscriber.add("users", new_cache())


def test_the_other_bases_of_a_class_are_initialized() -> None:
    class Counted:
        def __init__(self) -> None:
            super().__init__()
            self.count = 7

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    class Shop(Products, Counted):
        pass

    class NamedShop(Named, Products):
        def __init__(self) -> None:
            Named.__init__(self, "shop")
            Products.__init__(self, NOWHERE, cache={})

    assert Shop(NOWHERE, cache={}).count == 7
    assert NamedShop().name == "shop"


@pytest.fixture
def catalogue(redis_url: str) -> Any:
    class Catalogue(CacheInvalidationMixin):
        """A class that has names of its own for what the mixin also has."""

        namespace = "products"

        def __init__(self) -> None:
            super().__init__(redis_url, cache=TTLCache(maxsize=10, ttl=60))
            self.namespace = "its own"  # type: ignore[misc]

        async def start(self) -> None:  # type: ignore[misc]
            pytest.fail("called by the mixin")

        stop = start  # type: ignore[misc]
        cache = subscriber = None  # type: ignore[assignment, misc]

    return Catalogue()


async def test_names_of_the_class_itself_do_not_disturb_the_mixin(catalogue: Any) -> None:
    async with catalogue:
        assert await catalogue.get_or_load("product:1", lambda: 1) == 1
        assert (await catalogue.invalidate(Keys("product:1"))).namespace == "products"


async def test_a_subscriber_that_outlived_its_block_connects_when_it_is_entered_again(redis_url: str) -> None:
    cache = new_cache()
    subscriber = Subscriber(redis_url, caches={"products": cache})
    with pytest.raises(InvalidSettings, match="within the block"), coherent(subscriber):
        await subscriber.__aenter__()
    await subscriber.close()
    async with subscriber, Publisher(redis_url) as publisher:
        cache["a"] = 1
        assert cache.is_coherent
        await publisher.publish(Keys("a"), namespace="products")
        await until(lambda: cache.get("a") is None)
