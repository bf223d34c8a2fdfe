"""Who may post without a token: callers on this machine, and no proxy that speaks for others."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from cachetools import TTLCache
from fastapi import FastAPI
from starlette.testclient import TestClient
from tests.support.replicas import FAST, fill
from tests.support.web_server import served, web_server

from broadcache.publisher import Confirm, Fanout, Publisher
from broadcache.shared import InvalidSettings, Keys, NotDelivered
from broadcache.subscriber import CacheInvalidationMixin
from broadcache.subscriber.endpoint.access import Access, is_from_this_machine, refusal_of

pytestmark = pytest.mark.anyio

PATH = "/cache-invalidation"
AWAY = "redis://127.0.0.1:1"


class Catalogue(CacheInvalidationMixin):
    namespace = "products"

    def __init__(self, **options: Any) -> None:
        unproven: dict[str, Any] = {"start_timeout_seconds": 0, "when_incoherent": "serve"}
        super().__init__(AWAY, cache=TTLCache(maxsize=100, ttl=600), **{**FAST, **unproven, **options})
        fill(self.cache, "a")


def app_of(*catalogues: Catalogue) -> FastAPI:
    app = FastAPI()
    for each in catalogues:
        app.include_router(each.router)
    return app


def scope_of(
    client: tuple[str, int] | None = ("127.0.0.1", 50_000),
    server: tuple[str, int | None] | None = ("127.0.0.1", 8_080),
    host: str | None = "127.0.0.1:8080",
    http_version: str = "1.1",
    headers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    named = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    hosts = [] if host is None else [(b"host", host.encode())]
    return {"client": client, "server": server, "headers": [*hosts, *named], "http_version": http_version}


# --- which callers are on this machine --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scope",
    [
        scope_of(),
        scope_of(("127.0.0.2", 1), ("127.0.0.3", 80), "127.0.0.3"),
        scope_of(("::1", 1), ("::1", 80), "[::1]:80"),
        scope_of(("::ffff:127.0.0.1", 1), ("::ffff:127.0.0.1", 80), "localhost"),
        scope_of(host="LOCALHOST:8080"),
        scope_of(host=None),
        scope_of(("testclient", 50_000), ("testserver", 80), "testserver"),
        scope_of(headers={"user-agent": "curl/8", "accept": "*/*", "traceparent": "00-1-1-00"}),
    ],
    ids=str,
)
def test_a_caller_on_this_machine_is_recognised(scope: dict[str, Any]) -> None:
    assert is_from_this_machine(scope)


@pytest.mark.parametrize(
    "scope",
    [
        scope_of(("10.0.0.7", 1)),
        scope_of(server=("10.0.0.9", 8_080)),
        scope_of(("10.0.0.9", 1), ("10.0.0.9", 8_080), "10.0.0.9"),
        scope_of(("::ffff:10.0.0.7", 1)),
        scope_of(("fe80::1", 1)),
        scope_of(("0.0.0.0", 1)),
        scope_of(None),
        scope_of(server=None),
        scope_of(None, None),
        scope_of(None, ("/run/web.sock", None), "localhost"),
        scope_of(("", 0), ("/run/web.sock", None), "localhost"),
        scope_of(("127.0.0.1", 0), ("/run/web.sock", None), "localhost"),
        scope_of(("localhost.example", 1)),
        scope_of(host="rebound.example:8080"),
        scope_of(host="web.prod:8080"),
        scope_of(host="10.0.0.9"),
        scope_of(host=""),
        scope_of(host="[::1"),
        scope_of(host="127.0.0.1@evil.example"),
        scope_of(http_version="1.0"),
    ],
    ids=str,
)
def test_a_caller_elsewhere_or_unknown_is_not_taken_for_one_on_this_machine(scope: dict[str, Any]) -> None:
    assert not is_from_this_machine(scope)


FORWARDING = [
    *("forwarded", "via", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-client-cert"),
    *("x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip", "x-envoy-external-address", "l5d-client-id"),
    *("x-forwarded", "x-envoy-expected-rq-timeout-ms", "x-original-forwarded-for", "x-cluster-client-ip"),
    *("forwarded-for", "fly-client-ip", "x-vercel-id", "x-appengine-user-ip", "x-cloud-trace-context", "cdn-loop"),
    *("cloudfront-viewer-address", "x-proxyuser-ip", "dapr-caller-app-id", "proxy-connection"),
]


@pytest.mark.parametrize("name", FORWARDING)
def test_a_header_of_a_proxy_gives_it_away(name: str) -> None:
    assert not is_from_this_machine(scope_of(headers={name: "127.0.0.1"}))
    assert not is_from_this_machine(scope_of(("testclient", 1), ("testserver", 80), "testserver", headers={name: ""}))


def test_two_hosts_must_both_be_loopback() -> None:
    scope = scope_of()
    scope["headers"].append((b"host", b"elsewhere.example"))
    assert not is_from_this_machine(scope)


def test_allow_open_and_a_token_decide_without_regard_to_the_address() -> None:
    elsewhere = scope_of(("10.0.0.7", 1), ("10.0.0.9", 80), "web.prod")
    assert refusal_of(elsewhere, Access.of(allow_open=True)) is None
    refusal = refusal_of(elsewhere, Access.of())
    assert refusal is not None
    assert (refusal.status, refusal.kind) == (403, "token-not-set")
    for scope in (elsewhere, scope_of()):
        refusal = refusal_of(scope, Access.of("good", allow_open=True))
        assert refusal is not None
        assert refusal.status == 401
        scope["headers"].append((b"authorization", b"Bearer good"))
        assert refusal_of(scope, Access.of("good")) is None


# --- real servers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [{"X-Forwarded-For": "127.0.0.1"}, {"Via": "1.1 sidecar"}, {"Host": "rebound.example"}, {"X-Real-IP": "127.0.0.1"}],
    ids=str,
)
async def test_what_a_proxy_forwards_is_refused_with_what_to_set(
    headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    catalogue = Catalogue()
    async with served(app_of(catalogue)) as client:
        for _ in range(2):
            answer = await client.post(PATH, headers=headers)
            problem = answer.json()
            assert (answer.status_code, answer.headers["content-type"]) == (403, "application/problem+json")
            assert problem["type"] == "urn:broadcache:problem:token-not-set"
            assert "set BROADCACHE_REPLICA_TOKEN for the replica and for the publisher" in problem["detail"]
            assert "BROADCACHE_REPLICA_ALLOW_OPEN=true" in problem["detail"]
        assert set(catalogue.cache) == {"a"}
        assert (await client.get(PATH, headers=headers)).status_code == 200  # to look needs no token
        assert (await client.post(PATH)).status_code == 200
        assert set(catalogue.cache) == set()
    assert caplog.text.count("refused POST /cache-invalidation (logged once): ") == 1


async def test_what_nginx_forwards_by_default_is_refused() -> None:
    """HTTP/1.0 without any header of its own, to the address of the upstream."""
    catalogue = Catalogue()
    async with web_server(app_of(catalogue)) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST %s HTTP/1.0\r\nHost: 127.0.0.1:%d\r\nContent-Length: 0\r\n\r\n" % (PATH.encode(), port))
        assert (await reader.readline()).split()[1] == b"403"
        writer.close()
        await writer.wait_closed()
    assert set(catalogue.cache) == {"a"}


async def test_a_caller_over_a_unix_socket_needs_a_token(tmp_path: Path) -> None:
    path = str(tmp_path / "web.sock")
    for options, status in (({}, 403), ({"replica_token": "good"}, 200), ({"allow_open": True}, 200)):
        catalogue = Catalogue(**options)
        async with over_unix_socket(app_of(catalogue), path) as client:
            answer = await client.post(PATH, headers={"Authorization": "Bearer good"})
            assert (answer.status_code, set(catalogue.cache)) == (status, {"a"} if status == 403 else set())


@asynccontextmanager
async def over_unix_socket(app: FastAPI, path: str) -> AsyncIterator[httpx2.AsyncClient]:
    server = uvicorn.Server(uvicorn.Config(app, uds=path, log_config=None))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        async with httpx2.AsyncClient(
            transport=httpx2.AsyncHTTPTransport(uds=path), base_url="http://localhost"
        ) as client:
            yield client
    finally:
        server.should_exit = True
        await running


def test_the_test_client_may_post_unless_it_plays_a_proxy() -> None:
    client = TestClient(app_of(Catalogue()))
    assert client.post(PATH).status_code == 200
    assert client.post(PATH, headers={"X-Forwarded-For": "10.0.0.7"}).status_code == 403


# --- allowed by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["argument", "environment"])
async def test_what_is_allowed_by_name_is_open_and_warns_once(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if how == "environment":
        monkeypatch.setenv("BROADCACHE_REPLICA_ALLOW_OPEN", "true")
    options: dict[str, Any] = {"allow_open": True} if how == "argument" else {}
    app = app_of(Catalogue(**options), Catalogue(**options))
    async with served(app) as client:
        assert opened(caplog) == 1  # at the start
        answer = await client.post(PATH, headers={"X-Forwarded-For": "10.0.0.7"})
        assert answer.status_code == 200
    assert opened(caplog) == 1


def opened(caplog: pytest.LogCaptureFixture) -> int:
    lines = [each for each in caplog.records if "POST /cache-invalidation is open" in each.getMessage()]
    assert all(each.levelno == logging.WARNING for each in lines)
    return len(lines)


async def test_a_token_closes_what_is_allowed_by_name(caplog: pytest.LogCaptureFixture) -> None:
    async with served(app_of(Catalogue(replica_token="good", allow_open=True))) as client:
        assert (await client.post(PATH)).status_code == 401
    assert opened(caplog) == 0


async def test_an_application_is_open_only_if_all_its_mixins_are() -> None:
    for order in ((True, False), (False, True)):
        async with served(app_of(*(Catalogue(allow_open=each) for each in order))) as client:
            assert (await client.post(PATH, headers={"Via": "1.1 proxy"})).status_code == 403


@pytest.mark.parametrize("text", ["yes", "secret", "2"])
def test_an_unreadable_setting_is_refused_and_not_shown(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROADCACHE_REPLICA_ALLOW_OPEN", text)
    with pytest.raises(InvalidSettings, match=r"^BROADCACHE_REPLICA_ALLOW_OPEN: expected true or false") as raised:
        Catalogue()
    assert text not in str(raised.value).replace("may be secret", "")


def test_an_argument_that_is_no_boolean_is_refused() -> None:
    with pytest.raises(InvalidSettings, match=r"^allow_open: expected True or False, got a str$"):
        Catalogue(allow_open="no")


# --- what a publisher sees --------------------------------------------------------------------------------------------


async def test_a_fan_out_that_a_proxy_forwards_does_not_count_as_delivered() -> None:
    """The second path is refused, so the receipt must not say that the replica has dropped anything."""
    catalogue = Catalogue()
    async with web_server(app_of(catalogue)) as (port, _):
        at = [f"127.0.0.1:{port}"]
        for mode, is_told in (("service", False), ("address", True)):
            fanout = Fanout("web", port, addresses=at, networks=["127.0.0.0/8"], host_mode=mode)  # type: ignore[arg-type]
            async with Publisher(AWAY, delivery="fanout", fanout=fanout) as publisher:
                if not is_told:
                    with pytest.raises(NotDelivered, match="answered 403"):
                        await publisher.publish(Keys("a"), namespace="products")
                    continue
                receipt = await publisher.publish(Keys("a"), namespace="products", confirm=Confirm(timeout_seconds=5))
                assert receipt.confirmation is not None
                assert receipt.confirmation.is_complete
    assert set(catalogue.cache) == set()
