"""Several subscribers in one application: only the first route of a path is called, so it answers for all of them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2
import pytest
from cachetools import TTLCache
from fastapi import APIRouter, FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import BaseRoute, Host, Mount
from starlette.testclient import TestClient
from tests.support.replicas import FAST, fill
from tests.support.waiting import until
from tests.support.web_server import served, web_server

from broadcache.publisher import Confirm, Fanout, Publisher
from broadcache.shared import InvalidSettings, Keys, NotDelivered
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.subscriber import CacheInvalidationMixin
from broadcache.subscriber.endpoint import fastapi as endpoint

pytestmark = pytest.mark.anyio

PATH = "/cache-invalidation"
AWAY = "redis://127.0.0.1:1"
NAMESPACES = ("products", "users", "rights", "prices", "stocks", "shops")


class Named(CacheInvalidationMixin):
    """A cache of any namespace, with `old` at the keys a and b. Its replica id is that of the namespace."""

    def __init__(self, namespace: str, redis_url: str = AWAY, **options: Any) -> None:
        self.namespace = namespace  # type: ignore[misc]
        unproven = {"start_timeout_seconds": 0, "when_incoherent": "serve"} if redis_url == AWAY else {}
        options = {**FAST, **unproven, "replica_id": f"{namespace}-1", **options}
        super().__init__(redis_url, cache=TTLCache(maxsize=100, ttl=600), **options)

    @property
    def held(self) -> set[str]:
        return set(self.cache)


def app_with(*mixins: Named, prefixes: bool = False) -> FastAPI:
    """An application that runs these, and includes the router of each."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for each in mixins:
                await stack.enter_async_context(each)
                fill(each.cache, "a", "b")
            yield

    app = FastAPI(lifespan=lifespan)
    for each in mixins:
        app.include_router(each.router, prefix=f"/{each.namespace}" if prefixes else "")
    return app


def replicas_in(answer: httpx2.Response) -> dict[str, str]:
    assert answer.status_code == 200, answer.text
    return {each["replica"]: each["outcome"] for each in answer.json()["replicas"]}


# --- POST -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 6])
async def test_what_is_posted_reaches_each_of_several_mixins(count: int) -> None:
    mixins = [Named(namespace) for namespace in NAMESPACES[:count]]
    async with served(app_with(*mixins)) as client:
        for each in mixins:
            answer = await client.post(PATH, json={"namespace": each.namespace, "keys": ["a"], "id": "one"})
            document = answer.json()
            assert (document["replica"], document["outcome"], document["dropped"], document["id"]) == (
                f"{each.namespace}-1",
                "applied",
                1,
                "one",
            )
            assert replicas_in(answer) == {f"{each.namespace}-1": "applied"}
            assert each.held == {"b"}
        # Each counts only what concerns it.
        assert [each.subscriber.stats().received for each in mixins] == [{"http": 1, "applied": 1}] * count


async def test_a_message_without_a_namespace_and_an_unreadable_one_are_for_all() -> None:
    products, users = Named("products"), Named("users")
    async with served(app_with(products, users)) as client:
        answer = await client.post(PATH, json={"keys": ["a"]})
        assert replicas_in(answer) == {"products-1": "applied", "users-1": "applied"}
        assert (answer.json()["namespace"], answer.json()["dropped"]) == (None, 2)
        assert set(answer.json()["positions"]) == {"products", "users"}
        answer = await client.post(PATH)
        assert replicas_in(answer) == {"products-1": "cleared", "users-1": "cleared"}
        assert (answer.json()["outcome"], answer.json()["dropped"]) == ("cleared", 2)
        assert (products.held, users.held) == (set(), set())


async def test_a_namespace_that_none_follows_is_answered_for_all() -> None:
    async with served(app_with(Named("products"), Named("users"))) as client:
        answer = await client.post(PATH, json={"namespace": "orders", "everything": True})
        assert replicas_in(answer) == {"products-1": "not followed", "users-1": "not followed"}
        assert (answer.json()["outcome"], answer.json()["namespace"]) == ("not followed", "orders")


async def test_two_subscribers_of_one_namespace_both_drop_it() -> None:
    one, other = Named("products", replica_id="one"), Named("products", replica_id="other")
    async with served(app_with(one, other)) as client:
        answer = await client.post(PATH, json={"namespace": "products", "keys": ["a"]})
        assert replicas_in(answer) == {"one": "applied", "other": "applied"}
        assert (answer.json()["namespace"], answer.json()["dropped"]) == ("products", 2)
        assert (one.held, other.held) == ({"b"}, {"b"})


# --- what a publisher concludes ---------------------------------------------------------------------------------------


@asynccontextmanager
async def told_by_http(redis_url: str) -> AsyncIterator[tuple[Named, Named, Publisher]]:
    """Two mixins that are coherent, and a publisher that reaches them by HTTP alone."""
    products, users = Named("products", redis_url), Named("users", redis_url)
    app = app_with(products, users)
    async with web_server(app) as (port, _):
        fanout = Fanout("web", port, addresses=[f"127.0.0.1:{port}"], networks=["127.0.0.0/8"])
        async with Publisher(AWAY, delivery="fanout", fanout=fanout) as publisher:
            yield products, users, publisher


async def test_a_confirmation_names_the_replica_that_applied_it_not_the_first_of_its_process(redis_url: str) -> None:
    async with told_by_http(redis_url) as (products, users, publisher):
        for each in (users, products):
            receipt = await publisher.publish(Keys("a"), namespace=each.namespace, confirm=Confirm(timeout_seconds=5))
            assert receipt.confirmation is not None
            assert list(receipt.confirmation.confirmed) == [f"{each.namespace}-1"]
            assert receipt.confirmation.is_complete
            assert each.held == {"b"}


async def test_without_the_rule_the_second_mixin_would_keep_the_old_value(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: each route speaks for its own subscriber only."""
    monkeypatch.setattr(endpoint, "members_of", lambda app, member: (member,))
    monkeypatch.setattr(endpoint, "with_others", lambda subscribers, running, app: subscribers)
    async with told_by_http(redis_url) as (_, users, publisher):
        with pytest.raises(NotDelivered, match="not followed by any subscriber of the process"):
            await publisher.publish(Keys("a"), namespace="users", confirm=Confirm(timeout_seconds=5))
        assert (users.subscriber.state, users.held) == ("coherent", {"a", "b"})


async def test_each_replica_of_one_process_is_confirmed(redis_url: str) -> None:
    one, other = (Named("products", redis_url, replica_id=id) for id in ("one", "other"))
    async with web_server(app_with(one, other)) as (port, _):
        fanout = Fanout("web", port, addresses=[f"127.0.0.1:{port}"], networks=["127.0.0.0/8"])
        async with Publisher(AWAY, delivery="fanout", fanout=fanout) as publisher:
            receipt = await publisher.publish(Keys("a"), namespace="products", confirm=Confirm(timeout_seconds=5))
    assert receipt.confirmation is not None
    assert set(receipt.confirmation.confirmed) == {"one", "other"}
    assert receipt.fanout is not None
    [outcome] = receipt.fanout.outcomes
    assert (outcome.replica, outcome.replicas, outcome.dropped) == ("one", ("one", "other"), 2)


# --- the other routes -------------------------------------------------------------------------------------------------


async def test_a_process_is_ready_only_when_all_its_subscribers_are_coherent(own_server: EmbeddedServer) -> None:
    products, users = Named("products", own_server.url), Named("users", own_server.url)
    async with served(app_with(products, users)) as client:
        assert (await client.get("/health/ready")).json() == {
            "status": "ready",
            "state": "coherent",
            "replicas": [{"replica": "products-1", "state": "coherent"}, {"replica": "users-1", "state": "coherent"}],
        }
        await users.stop()
        ready = await client.get("/health/ready")
        assert (ready.status_code, ready.json()["state"]) == (503, "closed")
        assert [each["state"] for each in ready.json()["replicas"]] == ["coherent", "closed"]
        assert (await client.get("/health/live")).json() == {
            "status": "live",
            "replica": "products-1",
            "replicas": ["products-1", "users-1"],
        }


async def test_the_status_covers_all_subscribers(redis_url: str) -> None:
    products, users = Named("products", redis_url), Named("users", redis_url)
    async with served(app_with(products, users)) as client:
        await client.post(PATH, json={"keys": ["a"]})
        status = (await client.get(PATH)).json()
        assert (status["replica"], status["state"]) == ("products-1", "coherent")
        assert status["received"] == {"http": 2, "applied": 2}
        assert {name: each["is_coherent"] for name, each in status["namespaces"].items()} == {
            "products": True,
            "users": True,
        }
        assert [each["replica"] for each in status["replicas"]] == ["products-1", "users-1"]
        assert [list(each["namespaces"]) for each in status["replicas"]] == [["products"], ["users"]]


async def test_of_a_namespace_with_two_subscribers_the_status_shows_the_incoherent_one(redis_url: str) -> None:
    one, other = Named("products", redis_url, replica_id="one"), Named("products", redis_url, replica_id="other")
    for stopped in (one, other):
        async with served(app_with(one, other)) as client:
            await stopped.stop()
            assert (await client.get(PATH)).json()["namespaces"]["products"]["is_coherent"] is False


@pytest.mark.parametrize("ids", [("products-1", "users-1"), ("web-1", "web-1")], ids=["two ids", "one id"])
async def test_the_metrics_cover_all_subscribers_and_no_series_is_there_twice(ids: tuple[str, str]) -> None:
    products, users = Named("products", replica_id=ids[0]), Named("users", replica_id=ids[1])
    async with served(app_with(products, users)) as client:
        await client.post(PATH, json={"keys": ["a"]})
        for _ in range(2):
            text = (await client.get("/metrics")).text
            samples = [
                (sample.name, tuple(sorted(sample.labels.items())), sample.value)
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            ]
            assert len(samples) == len({sample[:2] for sample in samples})
            entries = {dict(labels)["namespace"]: value for name, labels, value in samples if name.endswith("_entries")}
            assert entries == {"products": 1, "users": 1}
            applied = [
                value
                for name, labels, value in samples
                if name == "broadcache_received_total" and ("outcome", "applied") in labels
            ]
            assert sum(applied) == 2


async def test_head_is_answered_like_get_without_a_body(redis_url: str) -> None:
    products = Named("products", redis_url)
    async with served(app_with(products)) as client:
        for path in ("/health/live", "/health/ready", PATH, "/metrics"):
            head = await client.head(path)
            assert (head.status_code, head.content) == (200, b""), path
        await products.stop()
        assert (await client.head("/health/ready")).status_code == 503
        assert "head" not in (await client.get("/openapi.json")).json()["paths"]["/health/ready"]


# --- how the routers are put into an application ----------------------------------------------------------------------


def nested(*mixins: Named) -> FastAPI:
    inner = APIRouter()
    for each in mixins:
        inner.include_router(each.router)
    outer = APIRouter()
    outer.include_router(inner)
    app = FastAPI()
    app.include_router(outer)
    return app


def mounted(*mixins: Named) -> Starlette:
    return Starlette(routes=[Mount("/", each.router) for each in mixins])


def below_a_fastapi(*mixins: Named) -> FastAPI:
    """The first at the root, the others in an application of their own below it."""
    below = FastAPI()
    app = FastAPI()
    app.include_router(mixins[0].router)
    for each in mixins[1:]:
        below.include_router(each.router)
    app.mount("/below", below)
    return app


def mounted_in_a_fastapi(*mixins: Named) -> FastAPI:
    app = FastAPI()
    for each in mixins:
        app.mount("/", each.router)
    return app


def by_host(*mixins: Named) -> Starlette:
    routes: list[BaseRoute] = [Host("127.0.0.1", mixins[0].router)]
    return Starlette(routes=[*routes, *(Host("other.example", each.router) for each in mixins[1:])])


def served_at_two_paths(*mixins: Named) -> FastAPI:
    app = app_with(*mixins)
    for each in mixins:
        app.include_router(each.router, prefix="/again")
    return app


@pytest.mark.parametrize(
    "composed", [nested, mounted, below_a_fastapi, mounted_in_a_fastapi, by_host, served_at_two_paths]
)
async def test_all_routers_of_an_application_are_found(composed: Any) -> None:
    mixins = [Named("products"), Named("users"), Named("rights")]
    for each in mixins:
        fill(each.cache, "a", "b")
    async with served(composed(*mixins)) as client:
        for each in mixins:
            answer = await client.post(PATH, json={"namespace": each.namespace, "keys": ["a"]})
            assert replicas_in(answer) == {f"{each.namespace}-1": "applied"}
        assert [each.held for each in mixins if "a" in each.held] == []
        assert len((await client.get("/health/live")).json()["replicas"]) == 3


async def test_whichever_prefix_is_called_all_are_reached() -> None:
    products, users = Named("products"), Named("users")
    async with served(app_with(products, users, prefixes=True)) as client:
        answer = await client.post(f"/products{PATH}", json={"namespace": "users", "keys": ["a"]})
        assert replicas_in(answer) == {"users-1": "applied"}
        answer = await client.post(f"/users{PATH}", json={"namespace": "products", "keys": ["a"]})
        assert replicas_in(answer) == {"products-1": "applied"}


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", PATH, "/metrics"])
async def test_a_router_mounted_in_plain_starlette_answers(redis_url: str, path: str) -> None:
    products = Named("products", redis_url)
    app = Starlette(routes=[Mount("/", products.router)], lifespan=products.lifespan)
    async with served(app) as client:  # type: ignore[arg-type]
        assert (await client.get(path)).status_code == 200
        assert (await client.post(PATH, json={"keys": ["a"]})).json()["outcome"] == "applied"
        assert (await client.get("/other")).status_code == 404


async def test_a_router_is_an_application_itself() -> None:
    transport = httpx2.ASGITransport(app=Named("products").router)
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        assert (await client.post(PATH)).json()["outcome"] == "cleared"


def behind_a_middleware(inner: FastAPI) -> Any:
    return GZipMiddleware(inner)


def behind_a_function(inner: FastAPI) -> Any:
    async def call(scope: Any, receive: Any, send: Any) -> None:
        await inner(scope, receive, send)

    return call


@pytest.mark.parametrize("hide", [behind_a_middleware, behind_a_function, None])
async def test_a_subscriber_whose_routes_cannot_be_seen_is_told_too(hide: Callable[[FastAPI], Any] | None) -> None:
    products, hidden = Named("products"), Named("products", replica_id="hidden")
    inner = FastAPI()
    inner.include_router(hidden.router)
    app = app_with(products)
    if hide is not None:
        app.mount("/inner", hide(inner))
    async with served(app) as client, hidden:
        fill(hidden.cache, "a")
        answer = await client.post(PATH, json={"namespace": "products", "keys": ["a"], "id": "one"})
        assert replicas_in(answer) == {"products-1": "applied", "hidden": "applied"}
        assert hidden.held == set()


async def test_two_applications_of_one_process_are_two_services() -> None:
    products, users = Named("products"), Named("users")
    async with served(app_with(products)) as one, served(app_with(users)) as other:
        assert replicas_in(await one.post(PATH)) == {"products-1": "cleared"}
        assert (products.held, users.held) == (set(), {"a", "b"})
        assert replicas_in(await other.post(PATH)) == {"users-1": "cleared"}


async def test_one_subscriber_whose_router_is_included_twice_drops_once() -> None:
    products = Named("products")
    app = app_with(products)
    app.include_router(products.router, prefix="/internal")
    async with served(app) as client:
        answer = await client.post(f"/internal{PATH}", json={"keys": ["a"]})
        assert (replicas_in(answer), answer.json()["dropped"]) == ({"products-1": "applied"}, 1)
        assert products.subscriber.stats().received == {"http": 1, "applied": 1}


# --- different tokens -------------------------------------------------------------------------------------------------

CONTRADICTIONS = [("one", "other"), ("one", None), ("one", "one,other")]


@pytest.mark.parametrize("tokens", CONTRADICTIONS, ids=str)
async def test_an_application_whose_mixins_expect_different_tokens_does_not_start(tokens: tuple[str, str]) -> None:
    products, users = (
        Named(name, replica_token=each) for name, each in zip(("products", "users"), tokens, strict=True)
    )
    app = app_with(products, users)
    with pytest.raises(
        InvalidSettings, match=r"^expected one replica_token for all .* products-1 .* users-1"
    ) as raised:
        async with app.router.lifespan_context(app):
            pass
    assert "one," not in str(raised.value)
    assert (products.subscriber.state, users.subscriber.state) == ("closed", "closed")


@pytest.mark.parametrize("tokens", CONTRADICTIONS, ids=str)
async def test_without_a_lifespan_their_first_post_is_refused(
    tokens: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    mixins = [Named(name, replica_token=each) for name, each in zip(("products", "users"), tokens, strict=True)]
    for each in mixins:
        fill(each.cache, "a")
    async with served(mounted(*mixins)) as client:  # type: ignore[arg-type]
        answer = await client.post(PATH, headers={"Authorization": "Bearer one"})
        assert (answer.status_code, answer.json()["type"]) == (500, "urn:broadcache:problem:tokens-differ")
        assert [each.held for each in mixins] == [{"a"}, {"a"}]
    assert "give both the same replica_token" in caplog.text


async def test_the_same_tokens_in_another_order_are_the_same() -> None:
    products, users = Named("products", replica_token="one,other"), Named("users", replica_token="other,one")
    async with served(app_with(products, users)) as client:
        assert (await client.post(PATH)).status_code == 401
        answer = await client.post(PATH, headers={"Authorization": "Bearer one"})
        assert replicas_in(answer) == {"products-1": "cleared", "users-1": "cleared"}


def test_the_test_client_of_a_user_reaches_all() -> None:
    products, users = Named("products"), Named("users")
    with TestClient(app_with(products, users)) as client:
        answer = client.post(PATH, json={"namespace": "users", "keys": ["a"]})
        assert [each["replica"] for each in answer.json()["replicas"]] == ["users-1"]
        assert users.held == {"b"}


async def test_posts_of_many_clients_at_once_reach_all(redis_url: str) -> None:
    mixins = [Named(namespace, redis_url) for namespace in NAMESPACES]
    async with served(app_with(*mixins)) as client:
        await asyncio.gather(*(client.post(PATH, json={"keys": [key]}) for key in "ab" for _ in range(10)))
        await until(lambda: all(each.held == set() for each in mixins))
