"""The publisher's HTTP API: a real server behind it, and in front of it clients that make every mistake."""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import jsonschema
import pytest
from tests.support.child_replica import child_replica
from tests.support.redis_probe import redis_probe
from tests.support.registry import make_registry_old
from tests.support.replicas import FAST
from tests.support.tcp_proxy import TcpProxy
from tests.support.web_server import served

from broadcache import __version__
from broadcache.publisher import Publisher
from broadcache.publisher.api.app import create_app
from broadcache.publisher.api.fanout_gate import FanoutGate
from broadcache.publisher.api.idempotency import id_of
from broadcache.publisher.api.settings import ApiSettings
from broadcache.shared import Everything, InvalidSettings
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.log import names_of
from broadcache.subscriber import LocalCache, Subscriber

pytestmark = pytest.mark.anyio

PATH = "/invalidations"
JSON = {"Content-Type": "application/json"}


@asynccontextmanager
async def client_of(settings: ApiSettings, publisher: Publisher | None = None) -> AsyncIterator[httpx2.AsyncClient]:
    """The application alone, without a web server in front of it."""
    app = create_app(settings, publisher=publisher)
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://publisher", timeout=30) as client,
    ):
        yield client


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(ApiSettings(redis_url=redis_url)) as client:
        yield client


def problem_of(response: httpx2.Response, status: int, kind: str) -> dict[str, Any]:
    """The problem document of `response`, which must be a whole one of this status and kind."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["type"] == f"urn:broadcache:problem:{kind}"
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    return problem


async def log_length_of(url: str, namespace: str = "default") -> int:
    async with redis_probe(url) as probe:
        length = await probe.call("XLEN", names_of(namespace).log)
        assert isinstance(length, int)
        return length


# Publishing


async def test_a_publish_answers_where_the_log_holds_it(client: httpx2.AsyncClient) -> None:
    body = {
        "namespace": "products",
        "keys": ["product:42"],
        "tags": [],
        "prefixes": [],
        "everything": False,
        "reason": "price change",
    }
    first = await client.post(PATH, json=body)
    second = await client.post(PATH, json=body)
    assert first.status_code == second.status_code == 200
    assert first.headers["content-type"] == "application/json"
    assert list(first.json()) == ["id", "namespace", "epoch", "sequence", "receivers", "logged", "pending", "fanout"]
    assert (first.json()["namespace"], first.json()["sequence"], first.json()["receivers"]) == ("products", 1, 0)
    assert [first.json()[name] for name in ("logged", "pending", "fanout")] == [True, False, None]
    assert second.json()["sequence"] == 2
    assert second.json()["id"] != first.json()["id"]


async def test_receivers_counts_who_listens(client: httpx2.AsyncClient, redis_url: str) -> None:
    async with redis_probe(redis_url) as listener:
        await listener.subscribe(names_of("products").channel)
        answer = await client.post(PATH, json={"namespace": "products", "everything": True})
    assert answer.json()["receivers"] == 1


async def test_a_namespace_that_is_left_out_is_the_default_one(client: httpx2.AsyncClient, redis_url: str) -> None:
    assert (await client.post(PATH, json={"everything": True})).json()["namespace"] == "default"
    assert await log_length_of(redis_url) == 1


async def test_json_may_be_said_with_its_charset(client: httpx2.AsyncClient) -> None:
    for media_type in ("application/json; charset=utf-8", "Application/JSON", 'application/json;charset="UTF-8"'):
        answer = await client.post(PATH, content=b'{"keys":["k"]}', headers={"Content-Type": media_type})
        assert answer.status_code == 200


async def test_a_hundred_concurrent_publishes_share_one_connection_and_get_a_sequence_each(
    client: httpx2.AsyncClient, redis_url: str
) -> None:
    answers = await asyncio.gather(*[client.post(PATH, json={"keys": [f"k{number}"]}) for number in range(100)])
    assert sorted(answer.json()["sequence"] for answer in answers) == list(range(1, 101))
    async with redis_probe(redis_url) as probe:
        clients: bytes = await probe.call("CLIENT", "LIST")
    assert clients.count(b"name=broadcache:publisher ") == 1


# Bad input

LONG = "x" * 1_025
DEEP = b"[" * 100_000
BAD_BODIES: dict[str, tuple[bytes, int, str | None, str]] = {
    # what it is: (the body, the status, where its pointer points, what its detail says)
    "empty": (b"", 400, None, "(0 bytes)"),
    "half an object": (b'{"keys":["a"', 400, None, "one JSON object"),
    "half a string": (b'{"keys":["a', 400, None, "one JSON object"),
    "two objects": (b'{"keys":["a"]}{"keys":["b"]}', 400, None, "trailing characters"),
    "not UTF-8": (b'{"keys":["\xff"]}', 400, None, "utf-8"),
    "not UTF-8 at all": (b"\xff\xfe\x00", 400, None, "invalid character"),
    "a lone surrogate": (b'{"keys":["\\ud800"]}', 400, None, "one JSON object"),
    "a control character": (b'{"keys":["a\x01"]}', 400, None, "invalid character"),
    "a form": (b"keys=a", 400, None, "one JSON object"),
    "NaN": (b"NaN", 400, None, "one JSON object"),
    "null": (b"null", 422, "", "expected object, got null"),
    "an array": (b'["a"]', 422, "", "expected object, got array"),
    "a string": (b'"everything"', 422, "", "expected object, got str"),
    "no target": (b"{}", 422, "", "expected at least one"),
    "empty targets": (b'{"keys":[],"tags":[],"prefixes":[]}', 422, "", "everything: true"),
    "everything false": (b'{"everything":false}', 422, "", "expected at least one"),
    "an unknown field": (b'{"key":["a"]}', 422, "", "expected no fields but namespace, keys"),
    "an unknown field of odd letters": (b'{"k~/`\\"":1}', 422, "", "expected no fields but"),
    "everything with a key": (b'{"everything":true,"keys":["a"]}', 422, "/everything", "got 1 names beside it"),
    "everything as a number": (b'{"everything":1}', 422, "/everything", "expected bool, got int at /everything"),
    "everything as null": (b'{"everything":null}', 422, "/everything", "expected bool, got null at /everything"),
    "keys as a string": (b'{"keys":"a"}', 422, "/keys", "expected array, got str at /keys"),
    "keys as an object": (b'{"keys":{"a":1}}', 422, "/keys", "expected array, got object at /keys"),
    "a key that is a number": (b'{"keys":["a",7]}', 422, "/keys/1", "expected str, got int at /keys/1"),
    "a key that is null": (b'{"keys":[null]}', 422, "/keys/0", "expected str, got null at /keys/0"),
    "an empty key": (b'{"keys":["a",""]}', 422, "/keys/1", "got '' at /keys/1"),
    "an empty tag": (b'{"tags":[""]}', 422, "/tags/0", "got '' at /tags/0"),
    "an empty prefix": (b'{"prefixes":["",""]}', 422, "/prefixes/0", "got '' at /prefixes/0"),
    "a key too long": (json.dumps({"keys": [LONG]}).encode(), 422, "/keys/0", "at most 1024 bytes of UTF-8, got 1025"),
    "a key too long in bytes": (json.dumps({"keys": ["é" * 513]}).encode(), 422, "/keys/0", "got 1026 at /keys/0"),
    "a tag too long": (json.dumps({"tags": [LONG[:257]]}).encode(), 422, "/tags/0", "at most 256 bytes"),
    "a prefix too long": (json.dumps({"prefixes": ["a", LONG]}).encode(), 422, "/prefixes/1", "got 1025"),
    "a reason too long": (json.dumps({"keys": ["a"], "reason": LONG}).encode(), 422, "/reason", "at /reason"),
    "a reason that is a number": (b'{"keys":["a"],"reason":7}', 422, "/reason", "got int at /reason"),
    "a namespace with a space": (b'{"namespace":"a b","keys":["a"]}', 422, "/namespace", "got 'a b' at /namespace"),
    "an empty namespace": (b'{"namespace":"","keys":["a"]}', 422, "/namespace", "got '' at /namespace"),
    "a namespace too long": (json.dumps({"namespace": LONG, "keys": ["a"]}).encode(), 422, "/namespace", "1 to 64"),
    "a namespace that is null": (b'{"namespace":null,"keys":["a"]}', 422, "/namespace", "got null at /namespace"),
    "a number out of range": (b'{"keys":[1e99999]}', 422, "/keys/0", "Number out of range at /keys/0"),
    "a huge number": (b'{"reason":' + b"9" * 100_000 + b"}", 422, "/reason", "at /reason"),
    "deep nesting": (DEEP, 422, "", "expected object, got array"),
    "deep nesting in a field": (b'{"keys":' + DEEP, 422, "/keys/0", "expected str, got array at /keys/0"),
    "too many keys": (json.dumps({"keys": ["k"] * 10_001}).encode(), 422, "", "at most 10000"),
    "too many names": (
        json.dumps({"keys": [f"k{number}" for number in range(9_999)], "tags": ["a", "b"]}).encode(),
        422,
        "",
        "at most 10000 keys, tags and prefixes together, got 10001",
    ),
}


@pytest.mark.parametrize("what", BAD_BODIES)
async def test_a_bad_body_is_a_problem_that_says_where(client: httpx2.AsyncClient, redis_url: str, what: str) -> None:
    body, status, pointer, said = BAD_BODIES[what]
    kind = "body-unreadable" if status == 400 else "invalidation-invalid"
    problem = problem_of(await client.post(PATH, content=body, headers=JSON), status, kind)
    assert said in problem["detail"]
    assert len(problem["detail"]) < 400
    if pointer is not None:
        assert problem["errors"][0]["pointer"] == pointer
        assert problem["errors"][0]["detail"] == problem["detail"]
    assert await log_length_of(redis_url) == 0


async def test_all_flaws_of_a_body_are_listed_up_to_a_limit(client: httpx2.AsyncClient) -> None:
    body = {"namespace": "a b", "keys": ["", "good"], "tags": [""], "reason": LONG}
    problem = problem_of(await client.post(PATH, json=body), 422, "invalidation-invalid")
    assert [flaw["pointer"] for flaw in problem["errors"]] == ["/namespace", "/keys/0", "/tags/0", "/reason"]
    problem = problem_of(await client.post(PATH, json={"keys": [""] * 1_000}), 422, "invalidation-invalid")
    assert len(problem["errors"]) == 20


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
async def test_a_body_that_is_not_said_to_be_json_is_refused(
    client: httpx2.AsyncClient, headers: dict[str, str]
) -> None:
    answer = await client.post(PATH, content=b'{"keys":["k"]}', headers=headers)
    problem_of(answer, 415, "media-type-unsupported")


async def test_a_path_that_does_not_exist_is_a_problem(client: httpx2.AsyncClient) -> None:
    for path in ("/nothing", "/invalidation", "/invalidations/", "/docs", "/redoc", "/health"):
        assert path in problem_of(await client.get(path), 404, "not-found")["detail"]


async def test_a_route_is_found_in_any_spelling_of_its_path_with_the_same_rights(redis_url: str) -> None:
    settings = ApiSettings(redis_url=redis_url, tokens=("swordfish", "ro:sesame"), fanout_allow=("web:80",))
    body = {"namespace": "products", "keys": ["a"]}
    async with client_of(settings) as client:
        assert (await client.get("/%68ealth/live")).status_code == 200
        for path in (f"{PATH}/preview", "/%69nvalidations/%70review"):
            for token, status in (("swordfish", 200), ("sesame", 403), ("stranger", 401)):
                answer = await client.post(path, json=body, headers={"Authorization": f"Bearer {token}"})
                assert answer.status_code == status, (path, token)


async def test_a_request_to_the_api_does_not_pass_through_the_fan_out(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(FanoutGate, "__call__")
    async with client_of(ApiSettings(redis_url=redis_url, fanout_allow=("web:80",))) as client:
        assert (await client.post(PATH, json={"keys": ["a"]})).status_code == 200
        assert (await client.get("/web/80")).status_code == 500


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("DELETE", PATH, "GET, POST"), ("PUT", PATH, "GET, POST"), ("POST", "/health/live", "GET, HEAD")],
)
async def test_a_method_that_a_path_does_not_have_is_a_problem_that_names_those_it_has(
    client: httpx2.AsyncClient, method: str, path: str, allowed: str
) -> None:
    answer = await client.request(method, path)
    assert f"expected {allowed}, got {method}" in problem_of(answer, 405, "method-not-allowed")["detail"]
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
async def test_a_probe_may_use_head(client: httpx2.AsyncClient, path: str) -> None:
    assert (await client.head(path)).status_code == (await client.get(path)).status_code == 200


async def test_a_body_that_is_too_large_is_refused(redis_url: str) -> None:
    settings = ApiSettings(redis_url=redis_url, request_bytes_max=2_048)
    body = json.dumps({"keys": ["x" * 1_000] * 3}).encode()

    async def in_chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 500):
            yield body[start : start + 500]

    async with served(create_app(settings)) as client:
        for content in (body, in_chunks()):
            problem = problem_of(await client.post(PATH, content=content, headers=JSON), 413, "body-too-large")
            assert "at most 2048 bytes" in problem["detail"]
        assert (await client.post(PATH, json={"keys": ["x" * 1_000] * 2})).status_code == 200


async def test_the_largest_body_that_is_allowed_is_published_in_parts_that_stand_together(redis_url: str) -> None:
    settings = ApiSettings(redis_url=redis_url, publish_timeout_seconds=20)
    keys = [f"{number:05}".ljust(1_000, "x") for number in range(4_000)]
    async with served(create_app(settings)) as client:
        large, *small = await asyncio.gather(
            client.post(PATH, json={"keys": keys}), *[client.post(PATH, json={"keys": ["k"]}) for _ in range(20)]
        )
        assert large.status_code == 200
        assert {answer.status_code for answer in small} == {200}
        logged: list[dict[str, Any]] = (await client.get(PATH, params={"limit": 1_000})).json()["invalidations"]
    parts = [entry for entry in logged if entry["id"].startswith(large.json()["id"])]
    sequences = [entry["sequence"] for entry in parts]
    assert sequences == list(range(large.json()["sequence"], large.json()["sequence"] - len(parts), -1))
    assert [key for part in reversed(parts) for key in part["keys"]] == keys


async def test_a_client_that_leaves_in_the_middle_of_a_body_disturbs_nobody(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(create_app(ApiSettings(redis_url=redis_url))) as client:
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(
            b"POST /invalidations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\nExpect: 100-continue\r\n\r\n"
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 100")  # it waits for the body now
        writer.write(b'{"keys":')
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        assert (await client.post(PATH, json={"keys": ["k"]})).json()["sequence"] == 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# Tokens


async def test_every_path_but_health_takes_a_token(redis_url: str) -> None:
    async with client_of(ApiSettings(redis_url=redis_url, tokens=("swordfish", "ro:sesame"))) as client:
        for path in ("/health/live", "/health/ready"):
            assert (await client.get(path)).status_code == 200
        for method, path in (("POST", PATH), ("GET", PATH), ("GET", "/openapi.json"), ("GET", "/nothing")):
            answer = await client.request(method, path)
            problem_of(answer, 401, "token-invalid")
            assert answer.headers["www-authenticate"] == 'Bearer realm="broadcache"'


@pytest.mark.parametrize(
    "authorization",
    [b"Bearer wrong", b"Bearer", b"Bearer ", b"Basic swordfish", b"swordfish", b"Bearer swordfish x", b"Bearer \xff"],
)
async def test_a_wrong_token_is_refused(redis_url: str, authorization: bytes) -> None:
    async with client_of(ApiSettings(redis_url=redis_url, tokens=("swordfish",))) as client:
        answer = await client.get(PATH, headers=[(b"Authorization", authorization)])
        problem_of(answer, 401, "token-invalid")
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]


async def test_all_tokens_are_valid_so_that_they_can_be_rotated(redis_url: str) -> None:
    async with client_of(ApiSettings(redis_url=redis_url, tokens=("old", "rw:new"))) as client:
        for token in ("old", "new"):
            headers = {"Authorization": f"Bearer {token}"}
            assert (await client.post(PATH, json={"keys": ["k"]}, headers=headers)).status_code == 200


async def test_a_read_only_token_may_only_read(redis_url: str) -> None:
    async with client_of(ApiSettings(redis_url=redis_url, tokens=("ro:sesame",))) as client:
        headers = {"Authorization": "bearer sesame"}
        assert (await client.get(PATH, headers=headers)).status_code == 200
        assert (await client.get("/openapi.json", headers=headers)).status_code == 200
        problem_of(await client.post(PATH, json={"keys": ["k"]}, headers=headers), 403, "right-missing")
        problem_of(await client.delete(PATH, headers=headers), 403, "right-missing")
    assert await log_length_of(redis_url) == 0


async def test_tokens_and_passwords_are_never_logged(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = own_server.url.replace("redis://", "redis://default:hunter2@")
    settings = ApiSettings(redis_url=url, tokens=("swordfish", "ro:sesame"), publish_timeout_seconds=0.3)
    said = ""
    async with served(create_app(settings)) as client:
        for token in ("swordfish", "sesame", "mellon"):
            said += (await client.post(PATH, json={"keys": ["k"]}, headers={"Authorization": f"Bearer {token}"})).text
        own_server.kill()
        said += (await client.get("/health/ready")).text
    ours = "".join(record.getMessage() for record in caplog.records if not record.name.startswith("httpcore2"))
    for secret in ("swordfish", "sesame", "mellon", "hunter2"):
        assert secret not in said + ours


# Namespaces


async def test_a_namespace_that_is_not_allowed_is_a_problem_that_names_the_known(redis_url: str) -> None:
    async with client_of(ApiSettings(redis_url=redis_url, namespaces=("users", "products"))) as client:
        for answer in (
            await client.post(PATH, json={"namespace": "prodcuts", "keys": ["k"]}),
            await client.get(PATH, params={"namespace": "prodcuts"}),
        ):
            problem = problem_of(answer, 404, "namespace-unknown")
            assert "expected one of the namespaces products, users, got 'prodcuts'" in problem["detail"]
        problem_of(await client.post(PATH, json={"keys": ["k"]}), 404, "namespace-unknown")
        assert (await client.post(PATH, json={"namespace": "users", "keys": ["k"]})).status_code == 200
        assert (await client.get("/health/ready")).status_code == 200


# Idempotency


async def test_a_request_that_is_sent_again_with_its_key_is_published_once(
    client: httpx2.AsyncClient, redis_url: str
) -> None:
    headers = {"Idempotency-Key": "order 7"}
    first = await client.post(PATH, json={"keys": ["k"]}, headers=headers)
    again = await client.post(PATH, json={"keys": ["k"]}, headers=headers)
    assert first.status_code == again.status_code == 200
    assert again.content == first.content
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert "order" not in first.json()["id"]
    assert len(first.json()["id"]) >= 26
    assert await log_length_of(redis_url) == 1


async def test_a_key_is_remembered_as_long_as_was_asked_for(redis_url: str) -> None:
    async with (
        client_of(ApiSettings(redis_url=redis_url, idempotency_seconds=1_000)) as client,
        redis_probe(redis_url) as probe,
    ):
        answer = await client.post(PATH, json={"keys": ["k"]}, headers={"Idempotency-Key": "order-7"})
        [receipt] = await probe.call("KEYS", f"*:receipt:*:{answer.json()['id']}")
        left_ms = await probe.call("PTTL", receipt)
    assert 900_000 < left_ms <= 1_000_000


async def test_a_key_that_was_used_for_other_targets_is_a_problem(client: httpx2.AsyncClient, redis_url: str) -> None:
    headers = {"Idempotency-Key": "order-7"}
    await client.post(PATH, json={"keys": ["k"]}, headers=headers)
    problem_of(await client.post(PATH, json={"keys": ["other"]}, headers=headers), 422, "idempotency-conflict")
    assert await log_length_of(redis_url) == 1


async def test_a_key_means_something_else_in_another_namespace(client: httpx2.AsyncClient) -> None:
    headers = {"Idempotency-Key": "order-7"}
    ids = [
        (await client.post(PATH, json={"namespace": namespace, "keys": [namespace]}, headers=headers)).json()["id"]
        for namespace in ("products", "users")
    ]
    assert ids[0] != ids[1]


async def test_a_key_belongs_to_its_token_and_no_client_voids_what_another_publishes(redis_url: str) -> None:
    settings = ApiSettings(redis_url=redis_url, tokens=("swordfish", "sesame"))
    async with client_of(settings) as client:
        answers = [
            await client.post(
                PATH,
                json={"keys": [key]},
                headers={"Idempotency-Key": "order-7", "Authorization": f"Bearer {token}"},
            )
            for token, key in (("swordfish", "k"), ("sesame", "k"), ("sesame", "k"), ("swordfish", "k"))
        ]
        other = await client.post(
            PATH,
            json={"keys": ["other"]},
            headers={"Idempotency-Key": "order-7", "Authorization": "Bearer sesame"},
        )
    assert [answer.status_code for answer in answers] == [200] * 4
    assert [answer.headers.get("idempotency-replayed") for answer in answers] == [None, None, "true", "true"]
    first, second, *_ = (answer.json()["id"] for answer in answers)
    assert first != second
    assert await log_length_of(redis_url) == 2
    problem_of(other, 422, "idempotency-conflict")


async def test_a_retry_may_go_to_another_process_of_the_api(redis_url: str) -> None:
    answers = []
    headers = {"Idempotency-Key": "order-7", "Authorization": "Bearer swordfish"}
    for host, tokens in (("pod-1", ("swordfish",)), ("pod-2", ("new", "rw:swordfish"))):
        settings = ApiSettings(redis_url=redis_url, tokens=tokens)
        async with client_of(settings, Publisher(redis_url, source=host)) as client:
            answers.append(await client.post(PATH, json={"keys": ["k"]}, headers=headers))
    assert [answer.headers.get("idempotency-replayed") for answer in answers] == [None, "true"]
    assert await log_length_of(redis_url) == 1


async def test_without_tokens_a_key_belongs_to_the_source_of_the_publisher(redis_url: str) -> None:
    answers = []
    for source in ("desk-1", "desk-2", "desk-1"):
        async with client_of(ApiSettings(redis_url=redis_url), Publisher(redis_url, source=source)) as client:
            answers.append(await client.post(PATH, json={"keys": ["k"]}, headers={"Idempotency-Key": "order-7"}))
    assert [answer.headers.get("idempotency-replayed") for answer in answers] == [None, None, "true"]


async def test_no_quick_hash_of_a_token_is_written_to_redis(redis_url: str) -> None:
    headers = {"Idempotency-Key": "order-7", "Authorization": "Bearer swordfish"}
    async with (
        client_of(ApiSettings(redis_url=redis_url, tokens=("swordfish",))) as client,
        redis_probe(redis_url) as probe,
    ):
        answer = await client.post(PATH, json={"keys": ["k"]}, headers=headers)
        [receipt] = await probe.call("KEYS", "*:receipt:*")
    written = receipt.decode() + answer.text
    assert "swordfish" not in written
    digest = hashlib.sha256(b"swordfish")
    for scope in ("swordfish", digest.hexdigest(), digest.digest().decode("latin-1"), "token swordfish"):
        assert hashlib.blake2b(scope.encode(), digest_size=16).hexdigest() not in written
        assert id_of(scope, "default", "order-7") not in written


async def test_the_longest_key_is_taken(client: httpx2.AsyncClient) -> None:
    answer = await client.post(PATH, json={"keys": ["k"]}, headers={"Idempotency-Key": "~" * 255})
    assert answer.status_code == 200


@pytest.mark.parametrize("keys", [[b""], [b"x" * 256], [b"caf\xe9"], [b"a\tb"], [b"one", b"two"]])
async def test_a_key_that_cannot_be_one_is_refused(client: httpx2.AsyncClient, keys: list[bytes]) -> None:
    headers = [(b"Content-Type", b"application/json"), *((b"Idempotency-Key", key) for key in keys)]
    answer = await client.post(PATH, content=b'{"keys":["k"]}', headers=headers)
    problem_of(answer, 400, "idempotency-key-invalid")


# History


async def test_history_shows_what_was_published_newest_first(client: httpx2.AsyncClient) -> None:
    first = (await client.post(PATH, json={"namespace": "p", "keys": ["k"], "tags": ["t"], "reason": "why"})).json()
    second = (await client.post(PATH, json={"namespace": "p", "everything": True})).json()
    history = (await client.get(PATH, params={"namespace": "p"})).json()
    assert (history["namespace"], history["next_before"]) == ("p", None)
    newest, oldest = history["invalidations"]
    assert (newest["id"], newest["sequence"], newest["everything"]) == (second["id"], 2, True)
    sent_at, source = oldest.pop("sent_at"), oldest.pop("source")
    assert oldest == {
        "sequence": 1,
        "epoch": first["epoch"],
        "id": first["id"],
        "keys": ["k"],
        "tags": ["t"],
        "prefixes": [],
        "everything": False,
        "reason": "why",
    }
    assert sent_at.endswith("Z")
    assert source == socket.gethostname()


async def test_history_is_read_page_by_page_to_its_end(client: httpx2.AsyncClient) -> None:
    for number in range(6):
        await client.post(PATH, json={"keys": [f"k{number}"]})
    sequences: list[list[int]] = []
    before: int | None = None
    while True:
        page = (await client.get(PATH, params={"limit": 3} | ({"before": before} if before else {}))).json()
        sequences.append([entry["sequence"] for entry in page["invalidations"]])
        before = page["next_before"]
        if before is None:
            break
    assert sequences == [[6, 5, 4], [3, 2, 1]]


async def test_history_of_a_namespace_without_any_is_empty(client: httpx2.AsyncClient) -> None:
    history = (await client.get(PATH, params={"namespace": "quiet"})).json()
    assert history == {"namespace": "quiet", "invalidations": [], "next_before": None, "examined": 0}


async def test_what_is_in_the_log_and_no_invalidation_is_shown_as_unreadable(
    client: httpx2.AsyncClient, redis_url: str
) -> None:
    await client.post(PATH, json={"keys": ["k"]})
    frame = b'{"v":1,"epoch":"e","seq":3,"keys":["k"],"sent_at_ms":9007199254740991}'
    async with redis_probe(redis_url) as probe:
        await probe.call("XADD", names_of("default").log, "2-0", "f", "now")
        await probe.call("XADD", names_of("default").log, "3-0", "f", frame)
    beyond_time, unreadable, _ = (await client.get(PATH)).json()["invalidations"]
    assert unreadable == {"sequence": 2, "unreadable": True}
    assert (beyond_time["sequence"], beyond_time["sent_at"]) == (3, None)


@pytest.mark.parametrize(
    ("query", "parameter", "said"),
    [
        ("limit=0", "limit", "got '0' at query parameter limit"),
        ("limit=1001", "limit", "got '1001'"),
        ("limit=many", "limit", "got 'many'"),
        ("limit=", "limit", "got ''"),
        ("before=0", "before", "got '0'"),
        ("before=-5", "before", "got '-5'"),
        (f"before={2**64}", "before", f"got '{2**64}'"),
        ("before=" + "9" * 5_000, "before", "at query parameter before"),
        ("limt=5", "limt", "expected no query parameter 'limt'"),
        ("namespace=a%20b", "namespace", "got 'a b' at query parameter namespace"),
        ("namespace=%FF", "namespace", "at query parameter namespace"),
    ],
)
async def test_a_bad_query_is_a_problem_that_names_the_parameter(
    client: httpx2.AsyncClient, query: str, parameter: str, said: str
) -> None:
    problem = problem_of(await client.get(f"{PATH}?{query}"), 422, "parameter-invalid")
    assert said in problem["detail"]
    assert problem["errors"][0]["parameter"] == parameter


async def test_the_highest_sequence_may_be_asked_for(client: httpx2.AsyncClient) -> None:
    assert (await client.get(PATH, params={"before": 2**64 - 1})).status_code == 200


# Redis away


async def test_while_redis_is_away_nothing_is_reported_accepted_and_afterwards_it_goes_on(
    own_server: EmbeddedServer,
) -> None:
    settings = ApiSettings(redis_url=own_server.url, publish_timeout_seconds=0.4)
    async with served(create_app(settings)) as client:
        assert (await client.post(PATH, json={"keys": ["k"]})).status_code == 200
        own_server.kill()
        for answer in (
            await client.post(PATH, json={"keys": ["k"]}),
            await client.get(PATH),
            await client.get("/health/ready"),
        ):
            problem = problem_of(answer, 503, "log-unreachable")
            assert answer.headers["retry-after"] == "1"
            assert [reason["path"] for reason in problem["reasons"]] == ["redis"]
            assert problem["reasons"][0]["detail"]
        assert (await client.get("/health/live")).json() == {"status": "live"}
        own_server.restart()
        assert (await client.get("/health/ready")).json() == {"status": "ready"}
        assert (await client.post(PATH, json={"keys": ["k"]})).json()["sequence"] == 1


async def test_an_api_that_starts_before_redis_is_live_and_not_ready(own_server: EmbeddedServer) -> None:
    own_server.kill()
    settings = ApiSettings(redis_url=own_server.url, publish_timeout_seconds=0.2)
    async with client_of(settings) as client:
        assert (await client.get("/health/live")).status_code == 200
        problem_of(await client.get("/health/ready"), 503, "log-unreachable")


async def test_a_half_open_link_is_given_up_for_a_new_one(own_server: EmbeddedServer) -> None:
    async with TcpProxy("127.0.0.1", own_server.port) as proxy:
        settings = ApiSettings(redis_url=proxy.url, publish_timeout_seconds=0.4)
        async with client_of(settings) as client:
            assert (await client.post(PATH, json={"keys": ["k"]})).status_code == 200
            proxy.black_hole()
            problem_of(await client.post(PATH, json={"keys": ["k"]}), 503, "log-unreachable")
            assert proxy.connections_accepted >= 2
            proxy.heal()
            assert (await client.post(PATH, json={"keys": ["k"]})).status_code == 200


async def test_a_publish_whose_answer_from_redis_is_lost_is_logged_once(own_server: EmbeddedServer) -> None:
    async with (
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        client_of(ApiSettings(redis_url=proxy.url, publish_timeout_seconds=20)) as client,
    ):
        assert (await client.get("/health/ready")).status_code == 200
        proxy.black_hole("to_client")
        posting = asyncio.create_task(client.post(PATH, json={"keys": ["k"]}))
        await proxy.has_discarded(1)
        proxy.heal()
        assert (await posting).json()["sequence"] == 1
    assert await log_length_of(own_server.url) == 1


async def test_a_redis_that_refuses_is_a_problem_with_its_reason(own_server: EmbeddedServer) -> None:
    async with client_of(ApiSettings(redis_url=own_server.url)) as client, redis_probe(own_server.url) as probe:
        await client.post(PATH, json={"keys": ["k"]})
        await probe.call("CONFIG", "SET", "maxmemory", "1")
        answer = await client.post(PATH, json={"keys": ["k"]})
        problem = problem_of(answer, 503, "log-refused")
        assert "OOM" in problem["reasons"][0]["detail"]
        assert answer.headers["retry-after"] == "1"
        assert (await client.get(PATH)).status_code == 200
    assert await log_length_of(own_server.url) == 1


async def test_a_mistake_of_ours_is_a_problem_without_internals(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Publisher):
        async def head(self, namespace: str = "") -> None:
            raise RuntimeError("the innermost secret")

    async with client_of(ApiSettings(), Broken(redis_url)) as client:
        answer = await client.get("/health/ready")
    problem_of(answer, 500, "internal-error")
    assert "innermost" not in answer.text
    assert "GET /health/ready failed: RuntimeError" in caplog.text


# Replicas, and what they confirm


async def test_the_replicas_of_a_namespace_are_listed(client: httpx2.AsyncClient, redis_url: str) -> None:
    assert (await client.get("/replicas", params={"namespace": "products"})).json() == {
        "namespace": "products",
        "replicas": [],
    }
    async with Subscriber(redis_url, caches={"products": LocalCache({})}, replica_id="web-1", **FAST):
        await client.post(PATH, json={"namespace": "products", "keys": ["a"], "confirm": {"timeout_seconds": 20}})
        while True:
            [replica] = (await client.get("/replicas", params={"namespace": "products"})).json()["replicas"]
            if replica["is_coherent"] and replica["position"]["sequence"] == 1:
                break
        assert (replica["replica"], replica["state"], replica["behind"]) == ("web-1", "coherent", 0)
        assert (replica["pid"], replica["version"]) == (os.getpid(), __version__)
        assert 0 <= replica["staleness_seconds"] < replica["max_staleness_seconds"] == 5.0
        # The first invalidation of all began the log anew, for all that the replica could know.
        assert (replica["hit_ratio"], replica["clears"]["subscribed"]) == (None, 1)


@pytest.mark.parametrize(
    ("query", "parameter"), [("namespace=two+words", "namespace"), ("limit=1", "limit"), ("name=a", "name")]
)
async def test_replicas_asked_for_wrongly_are_a_problem(client: httpx2.AsyncClient, query: str, parameter: str) -> None:
    problem = problem_of(await client.get(f"/replicas?{query}"), 422, "parameter-invalid")
    assert [error["parameter"] for error in problem["errors"]] == [parameter]


async def test_replicas_of_a_namespace_that_is_not_allowed_are_a_problem(redis_url: str) -> None:
    async with client_of(ApiSettings(redis_url=redis_url, namespaces=("products",), tokens=("ro:eye",))) as client:
        reader = {"Authorization": "Bearer eye"}
        problem_of(await client.get("/replicas?namespace=products"), 401, "token-invalid")
        problem_of(await client.get("/replicas?namespace=users", headers=reader), 404, "namespace-unknown")
        assert (await client.get("/replicas?namespace=products", headers=reader)).status_code == 200


async def test_the_namespaces_are_listed_in_pages(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/namespaces")).json() == {"namespaces": [], "next_after": None}
    for name in ("users", "products", "orders"):
        await client.post(PATH, json={"namespace": name, "keys": ["a"]})
    page = (await client.get("/namespaces?limit=2")).json()
    assert [each["namespace"] for each in page["namespaces"]] == ["orders", "products"]
    page = (await client.get("/namespaces", params={"after": page["next_after"]})).json()
    [users] = page["namespaces"]
    assert (users["namespace"], users["head"]["sequence"], users["log_length"]) == ("users", 1, 1)
    assert (users["registered"], users["silent"], users["silent_serving"]) == (0, 0, 0)
    assert users["last_sent_at"].startswith("20")
    assert page["next_after"] is None


@pytest.mark.parametrize(
    ("query", "parameter"), [("after=two+words", "after"), ("limit=0", "limit"), ("name=a", "name")]
)
async def test_namespaces_asked_for_wrongly_are_a_problem(
    client: httpx2.AsyncClient, query: str, parameter: str
) -> None:
    problem = problem_of(await client.get(f"/namespaces?{query}"), 422, "parameter-invalid")
    assert [error["parameter"] for error in problem["errors"]] == [parameter]


async def test_only_namespaces_that_are_allowed_are_listed_and_with_a_token(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        for name in ("products", "users"):
            await publisher.publish(Everything(), namespace=name)
    settings = ApiSettings(redis_url=redis_url, namespaces=("products", "orders"), tokens=("ro:eye",))
    async with client_of(settings) as client:
        problem_of(await client.get("/namespaces"), 401, "token-invalid")
        page = (await client.get("/namespaces", headers={"Authorization": "Bearer eye"})).json()
        assert [each["namespace"] for each in page["namespaces"]] == ["products"]


async def test_a_publish_that_every_replica_confirms_answers_200_with_each(
    client: httpx2.AsyncClient, redis_url: str
) -> None:
    body = {"namespace": "products", "keys": ["a"], "confirm": {"timeout_seconds": 20}}
    async with Subscriber(redis_url, caches={"products": LocalCache({})}, replica_id="web-1", **FAST):
        await make_registry_old(redis_url)
        answer = await client.post(PATH, json=body)
    assert answer.status_code == 200
    confirmation = answer.json()["confirmation"]
    assert {name: confirmation[name] for name in ("is_complete", "expected", "confirmed", "missing")} == {
        "is_complete": True,
        "expected": ["web-1"],
        "confirmed": ["web-1"],
        "missing": [],
    }
    assert confirmation["doubt"] is None
    [replica] = confirmation["replicas"]
    assert (replica["replica"], replica["outcome"]) == ("web-1", "confirmed")
    assert replica["latency_ms"] > 0


@pytest.mark.parametrize("status", [207, 504])
async def test_a_publish_that_a_replica_does_not_confirm_answers_who_is_missing(redis_url: str, status: int) -> None:
    settings = ApiSettings(redis_url=redis_url, unconfirmed_status=status)
    async with client_of(settings) as client, child_replica(redis_url, "products", "frozen") as child:
        child.freeze()
        body = {"namespace": "products", "keys": ["a"], "confirm": {"timeout_seconds": 0.2}}
        answer = await client.post(PATH, json=body)
        assert (answer.status_code, answer.json()["sequence"], answer.json()["receivers"]) == (status, 1, 1)
        assert answer.json()["confirmation"]["missing"] == ["frozen"]


@pytest.mark.parametrize("status", [207, 504])
async def test_a_publish_while_the_registry_is_new_answers_why_there_may_be_other_replicas(
    redis_url: str, status: int
) -> None:
    body = {"namespace": "products", "keys": ["a"], "confirm": {"timeout_seconds": 20}}
    async with client_of(ApiSettings(redis_url=redis_url, unconfirmed_status=status)) as client:
        empty = await client.post(PATH, json=body)
        async with Subscriber(redis_url, caches={"products": LocalCache({})}, replica_id="web-1", **FAST):
            one = await client.post(PATH, json=body)
    assert (empty.status_code, one.status_code) == (status, status)
    confirmation = one.json()["confirmation"]
    assert (confirmation["is_complete"], confirmation["confirmed"], confirmation["missing"]) == (False, ["web-1"], [])
    assert "has existed for only" in confirmation["doubt"]
    assert empty.json()["confirmation"]["replicas"] == []
    assert "is missing" in empty.json()["confirmation"]["doubt"]


async def test_a_repeated_request_is_confirmed_as_well(client: httpx2.AsyncClient, redis_url: str) -> None:
    body = {"namespace": "products", "keys": ["a"], "confirm": {"timeout_seconds": 20}}
    async with Subscriber(redis_url, caches={"products": LocalCache({})}, replica_id="web-1", **FAST):
        answers = [await client.post(PATH, json=body, headers={"Idempotency-Key": "key"}) for _ in range(2)]
    assert [answer.headers.get("Idempotency-Replayed") for answer in answers] == [None, "true"]
    assert [answer.json()["confirmation"]["confirmed"] for answer in answers] == [["web-1"]] * 2


@pytest.mark.parametrize(
    ("confirm", "pointer"),
    [
        ({"timeout_seconds": 0}, "/confirm/timeout_seconds"),
        ({"timeout_seconds": 61}, "/confirm/timeout_seconds"),
        ({"timeout_seconds": "1"}, "/confirm/timeout_seconds"),
        ({"timeout": 1}, "/confirm"),
        (True, "/confirm"),
    ],
)
async def test_a_wait_that_makes_no_sense_is_a_problem_that_says_where(
    client: httpx2.AsyncClient, redis_url: str, confirm: object, pointer: str
) -> None:
    answer = await client.post(PATH, json={"keys": ["a"], "confirm": confirm})
    [error] = problem_of(answer, 422, "invalidation-invalid")["errors"]
    assert error["pointer"] == pointer
    assert "expected" in error["detail"]
    assert pointer in error["detail"]
    assert await log_length_of(redis_url) == 0


@pytest.mark.parametrize("status", [199, 204, 304, 600])
def test_a_status_that_cannot_say_who_is_missing_is_refused(status: int) -> None:
    with pytest.raises(InvalidSettings, match=r"(?i)unconfirmed_status"):
        ApiSettings(unconfirmed_status=status)


# The document


async def test_the_openapi_document_is_whole(client: httpx2.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert document["info"]["version"] == __version__
    assert set(document["paths"]) == {
        *(
            PATH,
            f"{PATH}/preview",
            "/events",
            "/replicas",
            "/replicas/{replica}",
            "/namespaces",
            "/health/live",
            "/health/ready",
            "/metrics",
        ),
        *("/{service}/{port}", "/{service}/{port}/{rest}"),
    }
    assert document["components"]["securitySchemes"] == {"bearer": {"type": "http", "scheme": "bearer"}}
    assert set(document["paths"][PATH]["post"]["responses"]) == {
        "200", "207", "400", "401", "403", "404", "413", "415", "422", "500", "503",
    }  # fmt: skip
    parameters = {parameter["name"] for parameter in document["paths"][PATH]["get"]["parameters"]}
    assert parameters == {"namespace", "limit", "before", "key", "since"}
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split('"$ref": "')[1:]}:
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]
    assert "HTTPValidationError" not in text


def examples_of(media: dict[str, Any]) -> list[Any]:
    return (
        [media["example"]] if "example" in media else [named["value"] for named in media.get("examples", {}).values()]
    )


async def test_every_example_of_the_document_is_what_its_schema_describes(client: httpx2.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    count = 0
    for operations in document["paths"].values():
        for operation in operations.values():
            for described in [operation.get("requestBody", {}), *operation["responses"].values()]:
                for media in described.get("content", {}).values():
                    for example in examples_of(media):
                        schema = media["schema"] | {"components": document["components"]}
                        jsonschema.Draft202012Validator(schema).validate(example)
                        count += 1
    assert count > 20


async def test_every_documented_request_is_accepted_and_answers_as_documented(
    client: httpx2.AsyncClient, redis_url: str
) -> None:
    document = (await client.get("/openapi.json")).json()
    post = document["paths"][PATH]["post"]

    def validate(answer: httpx2.Response, operation: dict[str, Any]) -> None:
        media = operation["responses"][str(answer.status_code)]["content"][answer.headers["content-type"]]
        schema = media["schema"] | {"components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(answer.json())

    for example in examples_of(post["requestBody"]["content"]["application/json"]):
        answer = await client.post(PATH, json=example)
        # Where no replica has ever been, it is not known that each has confirmed.
        assert answer.status_code == (207 if "confirm" in example else 200)
        validate(answer, post)
    validate(await client.post(PATH, json={"keys": [1]}), post)
    validate(await client.get(PATH, params={"namespace": "products"}), document["paths"][PATH]["get"])
    validate(await client.get(PATH, params={"limit": 0}), document["paths"][PATH]["get"])
    replicas = document["paths"]["/replicas"]["get"]
    async with Subscriber(redis_url, caches={"products": LocalCache({})}):
        validate(await client.get("/replicas", params={"namespace": "products"}), replicas)
        validate(await client.post(PATH, json={"namespace": "products", "keys": ["a"], "confirm": {}}), post)
    validate(await client.get("/replicas", params={"limit": 0}), replicas)


@pytest.mark.parametrize(("tokens", "security"), [((), [{"bearer": []}, {}]), (("swordfish",), [{"bearer": []}])])
async def test_the_document_says_whether_a_token_is_needed(
    redis_url: str, tokens: tuple[str, ...], security: list[dict[str, Any]]
) -> None:
    async with client_of(ApiSettings(redis_url=redis_url, tokens=tokens)) as client:
        document = (await client.get("/openapi.json", headers={"Authorization": "Bearer swordfish"})).json()
    assert document["paths"][PATH]["post"]["security"] == security
    assert document["paths"]["/health/live"]["get"]["security"] == []


# The process


SERVE = """
import sys
from broadcache.publisher.api.server import serve
from broadcache.publisher.api.settings import ApiSettings
serve(ApiSettings(redis_url=sys.argv[1], listen_port=0), on_ready=lambda url: print(url, flush=True))
print("in order", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serving_ends_in_order_when_it_is_told_to(redis_url: str, number: signal.Signals) -> None:
    command = [sys.executable, "-c", SERVE, redis_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            answer = httpx2.post(f"{url}{PATH}", json={"keys": ["k"]}, trust_env=False, timeout=30)
            assert answer.json()["sequence"] == 1
            os.kill(process.pid, number)
            rest, log = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, rest) == (0, "in order\n"), log
    assert f"listening on {url}" in log
    assert f"closed {url}" in log


def test_the_publisher_is_imported_without_a_web_framework() -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('fastapi', 'starlette', 'uvicorn', 'pydantic')));"
        "from broadcache.publisher import Publisher"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
