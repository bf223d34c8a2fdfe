"""POST /cache-invalidation: a replica forgets although Redis is away, and forgets once what Redis tells it too."""

import asyncio
import itertools
import json
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import msgspec
import pytest
from cachetools import TTLCache
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.receipts import position_of
from tests.support.redis_probe import redis_probe
from tests.support.replicas import FAST, fill, new_cache, reached
from tests.support.waiting import until
from tests.support.web_server import served

from broadcache.publisher import Publisher
from broadcache.shared import Invalidation, InvalidSettings, Keys, MalformedFrame, Prefixes, Tags
from broadcache.shared.invalidation import invalidation_of
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.log import append, names_of, read_newest
from broadcache.shared.wire import FRAME_BYTES_MAX, decode, encode
from broadcache.subscriber import CacheInvalidationMixin, Subscriber
from broadcache.subscriber.endpoint.fastapi import router_of

pytestmark = pytest.mark.anyio

PATH = "/cache-invalidation"
AWAY = "redis://127.0.0.1:1"
KEYS = ("a", "b", "c")
SELDOM: dict[str, Any] = {"echo_interval_seconds": 60}
"""An echo would wake up the sweep as well."""
REPRODUCIBLE = settings(derandomize=True, database=None, deadline=None, max_examples=300)


class Catalogue(CacheInvalidationMixin):
    namespace = "products"

    def __init__(self, redis_url: str, **options: Any) -> None:
        super().__init__(redis_url, cache=TTLCache(maxsize=1_000, ttl=600), **{**FAST, **options})

    @property
    def held(self) -> str:
        return "".join(sorted(self.cache))

    @property
    def received(self) -> dict[str, int]:
        return self.subscriber.stats().received


@asynccontextmanager
async def replica(redis_url: str, **options: Any) -> AsyncIterator[tuple[Catalogue, httpx2.AsyncClient]]:
    """A service with a, b and c in its cache, behind a real web server."""
    catalogue = Catalogue(redis_url, **options)
    app = FastAPI(lifespan=catalogue.lifespan)
    app.include_router(catalogue.router)
    async with served(app) as client:
        fill(catalogue.cache, *KEYS)
        yield catalogue, client


@asynccontextmanager
async def lonely_replica(**options: Any) -> AsyncIterator[tuple[Catalogue, httpx2.AsyncClient]]:
    """The same without a Redis, which serves all the same."""
    async with replica(AWAY, start_timeout_seconds=0, when_incoherent="serve", **options) as (catalogue, client):
        yield catalogue, client


async def post(client: httpx2.AsyncClient, body: bytes | dict[str, Any] = b"", **headers: str) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await client.post(PATH, content=content, headers=headers)
    assert answer.status_code == 200, answer.text
    applied: dict[str, Any] = answer.json()
    return applied


def problem_of(answer: httpx2.Response, status: int, kind: str) -> dict[str, Any]:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    problem: dict[str, Any] = answer.json()
    assert (problem["status"], problem["type"]) == (status, f"urn:broadcache:problem:{kind}")
    assert problem["title"]
    assert problem["detail"].startswith("expected ")
    return problem


def epoch_of(catalogue: Catalogue) -> str:
    position = catalogue.subscriber.position("products")
    assert position is not None
    return position.epoch


# --- what it forgets -------------------------------------------------------------------------------------------------


async def test_what_is_posted_is_forgotten_and_the_answer_says_what_became_of_it(redis_url: str) -> None:
    async with replica(redis_url, replica_id="replica-1") as (catalogue, client):
        answer = await post(client, {"namespace": "products", "id": "one", "keys": ["a", "b", "not there"]})
        what_became = {
            "replica": "replica-1",
            "state": "coherent",
            "outcome": "applied",
            "namespace": "products",
            "dropped": 2,
            "positions": {"products": {"epoch": epoch_of(catalogue), "sequence": 0}},
        }
        process = {"pid": os.getpid(), "outcome": "applied", "dropped": 2, "replicas": ["replica-1"], "error": None}
        more = {"id": "one", "replicas": [what_became], "processes": [process], "doubt": None}
        assert answer == {**what_became, **more}
        assert catalogue.held == "c"


@pytest.mark.parametrize(
    ("targets", "held", "dropped"),
    [
        ({"keys": ["a"]}, {"b", "c"}, 1),
        ({"tags": ["vowel"]}, {"b", "c"}, 1),
        ({"prefixes": ["b"]}, {"a", "c"}, 0),
        ({"everything": True}, set(), 3),
        ({"keys": ["a"], "tags": ["vowel"], "prefixes": ["c"]}, {"b"}, 1),
    ],
    ids=["keys", "tags", "prefixes", "everything", "several"],
)
async def test_every_target_can_be_posted(targets: dict[str, Any], held: set[str], dropped: int) -> None:
    async with lonely_replica() as (catalogue, client):
        cache = catalogue.cache
        assert cache.store(cache.begin_load("a"), "old", tags=("vowel",))
        answer = await post(client, targets)
        assert (answer["outcome"], answer["dropped"], set(cache)) == ("applied", dropped, held)


async def test_a_load_that_is_under_way_is_not_stored() -> None:
    async with lonely_replica() as (catalogue, client):
        token = catalogue.cache.begin_load("a")
        await post(client, {"keys": ["a"]})
        assert not catalogue.cache.store(token, "old")


async def test_what_a_prefix_names_is_swept_although_nobody_reads(redis_url: str) -> None:
    async with replica(redis_url, **SELDOM, max_staleness_seconds=120) as (catalogue, client):
        await post(client, {"prefixes": ["a"]})
        await until(lambda: catalogue.cache.stats().entries == 2)


async def test_a_namespace_that_is_not_followed_here_changes_nothing() -> None:
    async with lonely_replica() as (catalogue, client):
        answer = await post(client, {"namespace": "users", "everything": True})
        assert (answer["outcome"], answer["namespace"], answer["dropped"]) == ("not followed", "users", 0)
        assert (catalogue.held, answer["positions"]) == ("abc", {})
        assert catalogue.received == {"http": 1, "not followed": 1}


async def test_without_a_namespace_the_only_one_is_meant_and_of_several_all() -> None:
    products, users = new_cache(when_incoherent="serve"), new_cache(when_incoherent="serve")
    one = Subscriber(AWAY, caches={"products": products})
    both = Subscriber(AWAY, caches={"products": new_cache(), "users": [users, new_cache()]})
    fill(products, *KEYS)
    fill(users, *KEYS)
    applied = one.apply(b'{"keys":["a"]}')
    assert (applied.namespace, applied.dropped, set(products)) == ("products", 1, {"b", "c"})
    applied = both.apply(b'{"keys":["a"]}')
    assert (applied.namespace, applied.dropped, set(users)) == (None, 1, {"b", "c"})
    assert set(applied.positions) == {"products", "users"}
    applied = both.apply(b'{"keys":["b"],"namespace":"users"}')
    assert (applied.namespace, set(users), set(products)) == ("users", {"c"}, {"b", "c"})


# --- everything ------------------------------------------------------------------------------------------------------

UNREADABLE: dict[str, bytes] = {
    "no JSON": b"now",
    "white space": b" ",
    "no target": b"{}",
    "half an object": b'{"keys":["a"',
    "not UTF-8": b"\xff\xfe",
    "another version": b'{"v":2,"keys":["a"]}',
    "a wrong type": b'{"keys":"a"}',
    "half a position": b'{"keys":["a"],"seq":1}',
    "a form": b"keys=a",
    "too deep": b'{"x":' + b"[" * 30_000,
    "too long": b'{"keys":["a"],"reason":"' + b"x" * FRAME_BYTES_MAX + b'"}',
}


@pytest.mark.parametrize("what", UNREADABLE)
async def test_what_cannot_be_read_means_everything(what: str, caplog: pytest.LogCaptureFixture) -> None:
    async with lonely_replica() as (catalogue, client):
        answer = await post(client, UNREADABLE[what])
        assert (answer["outcome"], answer["id"], answer["namespace"], answer["dropped"]) == ("cleared", None, None, 3)
        assert catalogue.held == ""
        assert catalogue.received == {"http": 1, "malformed": 1}
        assert catalogue.cache.stats().clears == {"malformed": 1}
    assert "cleared namespace products: invalid frame: " in caplog.text
    assert "posted over HTTP" in caplog.text


async def test_an_empty_body_means_everything(caplog: pytest.LogCaptureFixture) -> None:
    async with lonely_replica() as (catalogue, client):
        answer = await client.post(PATH)  # as `curl -X POST` does: no body, no Content-Type
        assert (answer.status_code, answer.json()["outcome"], answer.json()["dropped"]) == (200, "cleared", 3)
        assert (catalogue.held, catalogue.received) == ("", {"http": 1, "requested": 1})
        assert catalogue.cache.stats().clears == {"requested": 1}
    assert "cleared namespace products: an empty body was posted" in caplog.text


async def test_everything_that_is_meant_by_mistake_is_everything_of_all_namespaces() -> None:
    products, users = new_cache(when_incoherent="serve"), new_cache(when_incoherent="serve")
    subscriber = Subscriber(AWAY, caches={"products": products, "users": users})
    for body in (b"", b"now"):
        fill(products, *KEYS)
        fill(users, *KEYS)
        assert subscriber.apply(body).dropped == 6
        assert (set(products), set(users)) == (set(), set())
    assert subscriber.stats().received == {"http": 2, "requested": 1, "malformed": 1}


@pytest.mark.parametrize("size_bytes", [FRAME_BYTES_MAX, FRAME_BYTES_MAX + 1])
async def test_a_body_of_64_kib_is_read_and_a_longer_one_is_everything(size_bytes: int) -> None:
    frame = b'{"keys":["a"],"reason":"%s"}'
    body = frame % (b"x" * (size_bytes - len(frame % b"")))
    async with lonely_replica() as (catalogue, client):
        answer = await post(client, body)
        assert (answer["outcome"], catalogue.held) == (
            ("applied", "bc") if size_bytes == FRAME_BYTES_MAX else ("cleared", "")
        )


async def test_no_more_of_a_body_is_read_than_tells_that_it_is_too_long() -> None:
    async with lonely_replica() as (catalogue, client):
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n" % PATH.encode())
        writer.write(b"x" * (FRAME_BYTES_MAX + 1))
        status = await reader.readline()  # although the rest never comes
        assert (status, catalogue.held) == (b"HTTP/1.1 200 OK\r\n", "")
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("sent", [b"", b'{"keys":["a"', b'{"keys":["a"]}'], ids=["nothing", "half", "all but the end"])
async def test_half_a_body_whose_sender_has_gone_changes_nothing(sent: bytes) -> None:
    async with lonely_replica() as (catalogue, client):
        _, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n" % PATH.encode() + sent)
        await writer.drain()
        await post(client, {"keys": ["b"]})  # by now the first one is being answered
        writer.close()
        await writer.wait_closed()
        await post(client, {"keys": ["c"]})
        assert (catalogue.held, catalogue.received) == ("a", {"http": 2, "applied": 2})


@REPRODUCIBLE
@given(
    st.binary(max_size=200)
    | st.builds(lambda text: json.dumps(text).encode(), st.dictionaries(st.text(), st.none() | st.lists(st.text())))
    | st.builds(
        lambda names, field: json.dumps({field: names}).encode(),
        st.lists(st.text() | st.integers(), max_size=3),
        st.sampled_from(["keys", "tags", "prefixes", "everything", "v", "id", "namespace"]),
    )
)
def test_whatever_is_posted_is_applied_or_means_everything(body: bytes) -> None:
    cache = new_cache(when_incoherent="serve")
    fill(cache, *KEYS)
    applied = Subscriber(AWAY, caches={"products": cache}).apply(body)
    json.dumps(applied.as_dict())
    try:
        invalidation = decode(body, None)
    except MalformedFrame:
        assert (applied.outcome, set(cache)) == ("cleared", set())
    else:
        assert applied.outcome == ("applied" if invalidation.namespace in {"", "products"} else "not followed")


async def test_the_web_server_answers_200_to_whatever_bytes_are_posted() -> None:
    async with lonely_replica() as (catalogue, client):
        bodies = [*UNREADABLE.values(), *(bytes([byte]) * 3 for byte in range(0, 256, 5))]
        for body in bodies:
            fill(catalogue.cache, "d")
            assert (await post(client, body))["outcome"] == "cleared"
            assert catalogue.held == ""


# --- who may ---------------------------------------------------------------------------------------------------------


async def test_where_a_token_is_set_it_is_needed_to_post_and_not_to_look() -> None:
    async with lonely_replica(replica_token="good, newer") as (catalogue, client):
        for value in (
            None,
            "good",
            "Bearer",
            "Bearer bad",
            "Bearer good,newer",
            "Basic good",
            "bearer gooD",
        ):
            answer = await client.post(PATH, headers={"Authorization": value} if value else {})
            problem_of(answer, 401, "token-invalid")
            assert answer.headers["www-authenticate"] == 'Bearer realm="broadcache"'
            assert "good" not in answer.text
        twice = [("Authorization", "Bearer good"), ("Authorization", "Bearer good")]
        problem_of(await client.post(PATH, headers=twice), 401, "token-invalid")
        assert (catalogue.held, catalogue.received) == ("abc", {})
        for key, value in (("a", "Bearer good"), ("b", "bearer newer")):
            answer = await client.post(PATH, json={"keys": [key]}, headers={"Authorization": value})
            assert answer.status_code == 200
        assert catalogue.held == "c"
        assert [(await client.get(path)).status_code for path in (PATH, "/health/live")] == [200, 200]


async def test_the_token_comes_from_the_environment_when_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROADCACHE_REPLICA_TOKEN", "good")
    async with lonely_replica() as (_, client):
        problem_of(await client.post(PATH), 401, "token-invalid")
        await post(client, Authorization="Bearer good")
    async with lonely_replica(replica_token="argument") as (_, client):
        problem_of(await client.post(PATH, headers={"Authorization": "Bearer good"}), 401, "token-invalid")
        await post(client, Authorization="Bearer argument")
    app = FastAPI()
    app.include_router(router_of(Subscriber(AWAY, caches={"products": new_cache()})))
    async with served(app) as client:
        problem_of(await client.post(PATH), 401, "token-invalid")
    monkeypatch.setenv("BROADCACHE_REPLICA_TOKEN", "")
    async with lonely_replica() as (_, client):
        await post(client)


@pytest.mark.parametrize("token", ["two words", "a,,b", "ro:secret", "secret,secret", "sécret", ","])
def test_a_token_that_nobody_could_send_is_refused_at_once_and_never_shown(token: str) -> None:
    with pytest.raises(InvalidSettings, match=r"^BROADCACHE_REPLICA_TOKEN: expected ") as raised:
        Catalogue(AWAY, replica_token=token)
    assert "secret" not in str(raised.value).replace("it is secret", "")
    assert "words" not in str(raised.value)


def test_a_token_is_shown_nowhere() -> None:
    catalogue = Catalogue(AWAY, replica_token="swordfish")
    assert "swordfish" not in repr([vars(catalogue), catalogue.subscriber, catalogue.router])


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "something new"},
        {"Sec-Fetch-Site": ""},
        {"Origin": "http://elsewhere.example"},
        {"Origin": "null"},
        {"Origin": "http://[elsewhere"},
    ],
    ids=str,
)
async def test_a_web_page_of_another_site_empties_no_cache(headers: dict[str, str]) -> None:
    async with lonely_replica() as (catalogue, client):
        problem_of(await client.post(PATH, headers=headers), 403, "cross-site")
        assert (catalogue.held, catalogue.received) == ("abc", {})


@pytest.mark.parametrize("site", ["same-origin", "none", None])
async def test_a_page_of_the_service_itself_may(site: str | None) -> None:
    async with lonely_replica() as (catalogue, client):
        origin = f"http://{client.base_url.host}:{client.base_url.port}"
        answer = await client.post(PATH, headers={"Origin": origin, **({"Sec-Fetch-Site": site} if site else {})})
        assert answer.status_code == 200
        assert catalogue.held == ""


async def test_the_route_is_described_in_the_services_openapi_document() -> None:
    async with lonely_replica() as (_, client):
        described = (await client.get("/openapi.json")).json()["paths"][PATH]["post"]
    assert set(described["responses"]) == {"200", "401", "403", "500"}
    assert described["requestBody"]["required"] is False


# --- both ways --------------------------------------------------------------------------------------------------------


async def published(url: str, invalidation: Invalidation) -> None:
    async with redis_probe(url) as link:
        await append(link, invalidation)


async def applied(catalogue: Catalogue, count: int, what: str = "applied") -> None:
    await until(lambda: catalogue.received.get(what, 0) == count, f"{count} {what}, got {catalogue.received}")


async def test_what_came_over_redis_and_is_posted_then_is_applied_again(redis_url: str) -> None:
    async with replica(redis_url) as (catalogue, client), Publisher(redis_url) as publisher:
        receipt = await publisher.publish(Keys("a"), Tags("t"), namespace="products")
        await reached(catalogue.subscriber, receipt)
        fill(catalogue.cache, "a")
        async with redis_probe(redis_url) as link:
            [entry] = await read_newest(link, "products", count=1)
        assert entry.invalidation is not None
        answer = await post(client, encode(entry.invalidation))
        assert (answer["outcome"], answer["id"], answer["dropped"]) == ("applied", receipt.id, 1)
        assert answer["positions"] == {"products": {"epoch": position_of(receipt).epoch, "sequence": 1}}
        assert (catalogue.held, catalogue.received) == ("bc", {"applied": 2, "http": 1})


@pytest.mark.parametrize("has_time", [True, False])
async def test_what_is_posted_in_advance_voids_nothing_that_is_logged_later(redis_url: str, has_time: bool) -> None:
    """An id can be foreseen, from an Idempotency-Key for example. The old value was loaded after the POST."""
    invalidation = invalidation_of([Keys("a"), Prefixes("b")], namespace="products", id="foreseen")
    posted = invalidation if has_time else msgspec.structs.replace(invalidation, sent_at_ms=None)
    async with replica(redis_url) as (catalogue, client):
        assert (await post(client, encode(posted)))["outcome"] == "applied"
        fill(catalogue.cache, "a", "b")
        await published(redis_url, invalidation)
        await applied(catalogue, 2)
        assert (catalogue.held, catalogue.received) == ("c", {"applied": 2, "http": 1})
        assert catalogue.subscriber.position("products") == (epoch_of(catalogue), 1)


async def test_an_id_that_is_used_again_for_other_targets_is_applied_either_way(redis_url: str) -> None:
    async with replica(redis_url) as (catalogue, client), Publisher(redis_url) as publisher:
        await post(client, {"id": "same", "keys": ["a"]})
        async with redis_probe(redis_url) as link:
            await link.call("PUBLISH", names_of("products").channel, b'{"id":"same","keys":["b"]}')
        await applied(catalogue, 2)
        assert (await post(client, {"id": "same", "keys": ["c"]}))["outcome"] == "applied"
        assert catalogue.held == ""
        await reached(catalogue.subscriber, await publisher.publish(Keys("x"), namespace="products"))


async def test_a_position_that_is_posted_hides_no_gap(redis_url: str) -> None:
    async with replica(redis_url) as (catalogue, client), Publisher(redis_url) as publisher:
        first = await publisher.publish(Keys("x"), namespace="products")
        await reached(catalogue.subscriber, first)
        epoch = position_of(first).epoch
        for body in ({"keys": ["x"], "epoch": epoch, "seq": 2}, {"keys": ["x"], "epoch": "another", "seq": 9}):
            assert (await post(client, body))["positions"]["products"] == {"epoch": epoch, "sequence": 1}
        await reached(catalogue.subscriber, await publisher.publish(Keys("a"), namespace="products"))
        assert (catalogue.held, catalogue.received) == ("bc", {"applied": 4, "http": 2})
        assert catalogue.cache.stats().clears == {"subscribed": 1}


# --- without Redis ---------------------------------------------------------------------------------------------------


async def test_a_replica_that_serves_on_forgets_what_is_posted_while_redis_is_frozen(
    own_server: EmbeddedServer,
) -> None:
    """The negative control: what is not posted is served on."""
    posted = invalidation_of([Keys("a")], namespace="products")
    async with replica(own_server.url, when_incoherent="serve") as (catalogue, client):
        await published(own_server.url, invalidation_of([Keys("x")], namespace="products"))
        await applied(catalogue, 1)
        own_server.pause()
        await until(lambda: catalogue.subscriber.state != "coherent")
        publishing = asyncio.create_task(published(own_server.url, posted))
        assert (catalogue.cache.get("a"), catalogue.cache.get("b")) == ("old", "old")
        answer = await post(client, encode(posted))
        assert (answer["outcome"], answer["dropped"], answer["state"] == "coherent") == ("applied", 1, False)
        assert (catalogue.cache.get("a"), catalogue.cache.get("b")) == (None, "old")
        own_server.resume()
        await publishing
        await until(
            lambda: (
                catalogue.subscriber.state == "coherent"
                and catalogue.subscriber.position("products") == (epoch_of(catalogue), 2)
            )
        )
        assert catalogue.held == "bc"
        assert catalogue.cache.stats().clears == {"subscribed": 1}


async def test_what_is_posted_lets_no_cache_serve_longer() -> None:
    catalogue = Catalogue(AWAY, start_timeout_seconds=0)
    async with catalogue:
        as_of = catalogue.cache.coherent_as_of
        assert catalogue.subscriber.apply(b'{"keys":["a"]}').state != "coherent"
        assert (catalogue.cache.coherent_as_of, catalogue.cache.is_coherent) == (as_of, False)


async def test_a_subscriber_in_a_thread_of_its_own_is_told_from_any_thread(redis_url: str) -> None:
    cache = new_cache(max_staleness_seconds=120)
    invalidations = [invalidation_of([Keys(str(number))], namespace="products") for number in range(200)]

    def serve() -> tuple[dict[str, int], set[str]]:
        with Subscriber(redis_url, caches={"products": cache}, **{**FAST, **SELDOM}) as subscriber:
            fill(cache, *map(str, range(200)), "prefix:1", "kept")
            bodies = [*map(encode, invalidations), b'{"prefixes":["prefix:"],"namespace":"products"}']
            threads = [
                threading.Thread(target=lambda part: [*map(subscriber.apply, part)], args=[bodies[number::4]])
                for number in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            held = set(cache)
            for _ in itertools.takewhile(lambda _: cache.has_sweep_work, range(5_000)):
                threading.Event().wait(0.002)
            return subscriber.stats().received, held

    received, held = await asyncio.to_thread(serve)
    assert (received, held) == ({"http": 201, "applied": 201}, {"kept"})
    assert cache.stats().entries == 1


async def test_the_status_route_shows_what_was_posted() -> None:
    async with lonely_replica() as (_, client):
        for body in (b'{"id":"x","keys":["a"]}', b'{"id":"x","keys":["a"]}', b"", b"now"):
            await post(client, body)
        received = (await client.get(PATH)).json()["received"]
    assert received == {"http": 4, "applied": 2, "requested": 1, "malformed": 1}


async def test_what_is_posted_to_a_namespace_that_has_come_and_gone_is_counted_still(redis_url: str) -> None:
    users = new_cache()
    async with Subscriber(redis_url, caches={"products": new_cache()}, **FAST) as subscriber:
        await subscriber.attach("users", users)
        fill(users, *KEYS)
        assert subscriber.apply(b'{"namespace":"users","keys":["a"]}').outcome == "applied"
        await subscriber.detach("users")
        assert subscriber.apply(b'{"namespace":"users","keys":["b"]}').outcome == "not followed"
        assert subscriber.stats().received == {"http": 2, "applied": 1, "not followed": 1}
