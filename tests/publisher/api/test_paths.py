"""The gate and the routes decide by one form of the path, and the fan-out by the one that was sent."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tests.support.dns_server import DnsServer
from tests.support.fanout_scene import Reply, exchanged, reply_of, request_of
from tests.support.pods import Pods
from tests.support.web_server import web_server

from broadcache.publisher.api.app import create_app, create_fanout_app
from broadcache.publisher.api.paths import EncodedPath
from broadcache.publisher.api.settings import ApiSettings, FanoutSettings

pytestmark = pytest.mark.anyio

WRITE, READ = "w" * 32, "r" * 32
OPEN = ["/health/live", "/health/ready", "/", "/page.css", "/%68ealth/live", "/health/%6Cive", "/%70age%2Ecss"]
CLOSED = ["/%69nvalidations", "/invalidations", "/replicas", "/metrics", "/openapi.json", "/events"]

DISGUISED = [
    "/health%2Flive",
    "//health/live",
    "/./health/live",
    "/health/./live",
    "/x/../health/live",
    "/%2e%2e/health/live",
    "/health/live/",
    "/health/live%00",
    "/health/live%0A",
    "/health/live%20",
    "/health/live.",
    "/health/live;x=1",
    "/Health/live",
    "/HEALTH/LIVE",
    "/health%252Flive",
    "/health\\live",
    "/page.css%00",
    "/metrics%0A",
    "/Metrics",
]
"""Spellings that some component on the way might read as a path of the API."""


class Asked:
    """The API with tokens, and the pods of a service that has the name of a route: `call(token, method, path)`."""

    def __init__(self, port: int, pods: Pods) -> None:
        self.port = port
        self.pods = pods

    async def call(self, token: str | None, method: str, path: str) -> Reply:
        headers = () if token is None else (f"Authorization: Bearer {token}",)
        return reply_of(await exchanged(self.port, request_of(method, path, headers)))

    @property
    def calls(self) -> int:
        return sum(pod.connections for pod in self.pods.all)


@asynccontextmanager
async def asked(redis_url: str, *, with_tokens: bool = True, prefix: str = "") -> AsyncIterator[Asked]:
    async with DnsServer() as dns, Pods(1) as pods:
        for name in ("health", "metrics", "invalidations", "web"):
            dns.a(f"{name}.test", *pods.hosts)
        settings = ApiSettings(
            redis_url=redis_url,
            tokens=(f"rw:{WRITE}", f"ro:{READ}") if with_tokens else (),
            fanout_allow=("health.test:*", "metrics.test:*", "invalidations.test:*", "web.test:*"),
            fanout_networks=("127.0.0.0/8",),
            fanout_nameservers=(dns.address,),
        )
        app = create_app(settings)
        if prefix:
            outer = FastAPI(lifespan=app.router.lifespan_context)
            outer.mount(prefix, app)
            outer.state.end_streams = app.state.end_streams
            outer.state.takes_any_method = True
            app = outer
        async with web_server(app) as (port, _):
            yield Asked(port, pods)


async def test_what_passes_the_gate_without_a_token_is_answered_by_that_very_route(redis_url: str) -> None:
    async with asked(redis_url) as api:
        for path in OPEN:
            assert (await api.call(None, "GET", path)).status == 200
            assert (await api.call(None, "POST", path)).status == 405
        for path in [*CLOSED, *DISGUISED]:
            for method in ("GET", "POST", "HEAD", "BAN"):
                assert (await api.call(None, method, path)).status == 401, (method, path)
        assert api.calls == 0


@pytest.mark.parametrize("path", DISGUISED)
async def test_another_spelling_of_a_path_is_no_path_of_the_api(redis_url: str, path: str) -> None:
    async with asked(redis_url, with_tokens=False) as api:
        reply = await api.call(None, "GET", path)
        assert reply.status in (403, 404, 422), reply.body
        assert reply.headers["content-type"] == "application/problem+json"
        assert api.calls == 0


async def test_a_token_that_may_only_read_never_broadcasts(redis_url: str) -> None:
    async with asked(redis_url) as api:
        port = api.pods.port
        for name in ("health", "metrics", "invalidations", "web"):
            for service in (f"{name}.test", f"{name}.test.", f"{name}.TEST", f"%{ord(name[0]):02x}{name[1:]}.test"):
                for path in (f"/{service}/{port}/x", f"//{service}/{port}/x", f"/{service}%2F{port}/x"):
                    reply = await api.call(READ, "GET", path)
                    assert reply.status in (403, 404), path
        assert api.calls == 0
        assert (await api.call(WRITE, "GET", f"/health.test/{port}/x")).status == 200
        assert api.calls == 1


async def test_dots_and_escapes_in_the_rest_are_sent_as_they_are(redis_url: str) -> None:
    async with asked(redis_url) as api:
        rest = "/../../health/live/%2e%2E/%2F%00//a%20b;x=%41"
        reply = await api.call(WRITE, "GET", f"/web.test/{api.pods.port}{rest}?q=%2F")
        assert reply.status == 200
        [received] = api.pods[0].received
        assert received.target == f"{rest}?q=%2F"


async def test_below_another_application_the_same_paths_are_open(redis_url: str) -> None:
    async with asked(redis_url, prefix="/broadcache") as api:
        for path in OPEN:
            assert (await api.call(None, "GET", f"/broadcache{path}")).status == 200
        for path in [*CLOSED, *DISGUISED]:
            assert (await api.call(None, "GET", f"/broadcache{path}")).status == 401, path
        assert (await api.call(WRITE, "GET", f"/broadcache/web.test/{api.pods.port}/x")).statuses == [200]


@pytest.mark.parametrize(
    ("scope", "seen"),
    [
        ({"path": "/a/b c", "raw_path": b"/%61%2Fb%20c%7E%5B"}, "/a%2Fb%20c~%5B"),
        ({"path": "/a/b", "raw_path": b"/a/b?x=1"}, "/a/b"),
        # Without the path as it was sent: nothing that was decoded gets into a request line.
        ({"path": "/a/\r\nHost: x/%41é"}, "/a/%0D%0AHost:%20x/%2541%C3%A9"),
        ({"path": "/a", "raw_path": None}, "/a"),
    ],
)
async def test_only_unreserved_characters_of_a_path_are_decoded(scope: dict[str, object], seen: str) -> None:
    paths = list[str]()

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        paths.append(scope["path"])

    inner: ASGIApp = app
    await EncodedPath(inner)({"type": "http", **scope}, receive, send)
    assert paths == [seen]


async def test_the_fan_out_alone_has_the_same_gate() -> None:
    settings = FanoutSettings(tokens=(f"rw:{WRITE}",), fanout_allow=("web.test:*",))
    async with web_server(create_fanout_app(settings)) as (port, _):
        for path, status in (("/health/live", 200), *((path, 401) for path in DISGUISED)):
            assert reply_of(await exchanged(port, request_of("GET", path))).status == status, path
