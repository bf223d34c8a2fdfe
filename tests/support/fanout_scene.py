"""The fan-out as its callers meet it: a real web server, a real name server, real pods, and a client of raw bytes."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ssl import SSLContext
from typing import Any

from tests.support.dns_server import DnsServer
from tests.support.pods import Behaviour, Pods, Received
from tests.support.web_server import web_server
from uvicorn import Server

from broadcache.publisher.api.app import create_fanout_app
from broadcache.publisher.api.settings import FanoutSettings
from broadcache.publisher.fanout.broadcaster import Request
from broadcache.publisher.fanout.policy import Destination

SERVICE = "web.test"


@dataclass(frozen=True)
class Reply:
    """An answer as it came. Shape: names of headers in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def statuses(self) -> list[int | None]:
        """What each address answered, in the order of the answer."""
        return [response["statusCode"] for response in self.json["responses"]]

    @property
    def errors(self) -> list[str | None]:
        return [response["error"] for response in self.json["responses"]]

    @property
    def attempts(self) -> list[int]:
        return [response["attempts"] for response in self.json["responses"]]

    def problem(self, status: int, kind: str, rule: str | None = None) -> dict[str, Any]:
        """The problem document, which must be a whole one of this status, kind and rule."""
        assert self.status == status, self.body
        assert self.headers["content-type"] == "application/problem+json"
        document: dict[str, Any] = self.json
        assert document["type"] == f"urn:broadcache:problem:{kind}"
        assert document["status"] == status
        assert document["title"]
        assert document["detail"]
        assert document.get("rule") == rule
        return document


async def exchanged(port: int, raw: bytes) -> bytes:
    """Send these bytes, and return all that comes until the other side closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(raw)
        return await reader.read()
    except ConnectionError:
        return b""  # it closed before it had read all
    finally:
        writer.transport.abort()


def reply_of(raw: bytes) -> Reply:
    head, _, body = raw.partition(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 1"):
        head, _, body = body.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Reply(int(first.split(" ")[1]), headers, body)


def request_of(method: str, target: str, headers: Sequence[str] = (), body: bytes | None = None) -> bytes:
    """Write a request out. Without a header that says so, its body is framed by Content-Length, and Host is ours."""
    lines = [f"{method} {target} HTTP/1.1"]
    names = {header.partition(":")[0].lower() for header in headers}
    if "host" not in names:
        lines.append("Host: broadcaster.test")
    if "connection" not in names:
        lines.append("Connection: close")
    if body is not None and not names & {"transfer-encoding", "content-length"}:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + (body or b"")


@dataclass(frozen=True)
class Scene:
    """The fan-out at `port`, in front of `pods`, which `dns` knows as `web.test`."""

    dns: DnsServer
    pods: Pods
    port: int
    server: Server

    @property
    def path(self) -> str:
        return f"/{SERVICE}/{self.pods.port}"

    async def send(
        self, method: str = "POST", rest: str = "/x", *headers: str, body: bytes | None = None, path: str | None = None
    ) -> Reply:
        """Send one request: to `rest` of the pods, or to another `path` of the fan-out."""
        target = f"{self.path}{rest}" if path is None else path
        return reply_of(await exchanged(self.port, request_of(method, target, headers, body)))

    def url(self, index: int, rest: str = "/x") -> str:
        return f"http://{self.pods[index].host}:{self.pods.port}{rest}"

    def request(self, method: str = "POST", **more: Any) -> Request:
        """The same for a broadcaster without a web server."""
        return Request(method=method, destination=Destination(SERVICE, SERVICE, self.pods.port), **more)

    def assert_nobody_was_called(self) -> None:
        assert [pod.connections for pod in self.pods.all] == [0] * len(self.pods)


def settings_of(dns: DnsServer, **settings: Any) -> FanoutSettings:
    """Settings for a scene: no time limit decides, unless the test says so."""
    patient = {"fanout_connect_timeout_seconds": 8, "fanout_timeout_seconds": 12, "fanout_deadline_seconds": 25}
    return FanoutSettings(
        **{
            "fanout_allow": (f"{SERVICE}:*",),
            "fanout_networks": ("127.0.0.0/8",),
            "fanout_nameservers": (dns.address,),
            **patient,
            **settings,
        }
    )


@asynccontextmanager
async def scene(
    count: int = 3, *, hosts: Sequence[str] = (), tls: SSLContext | None = None, **settings: Any
) -> AsyncIterator[Scene]:
    """A fan-out of its own, with `count` pods that answer 200 at once. `settings` are those of `FanoutSettings`."""
    async with (
        DnsServer() as dns,
        web_server(create_fanout_app(settings_of(dns, **settings))) as (port, server),
        # They close first, so that a broadcast that a failed test has left under way ends.
        Pods(count, hosts=hosts, tls=tls) as pods,
    ):
        dns.a(SERVICE, *pods.hosts)
        yield Scene(dns, pods, port, server)


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """Behave so the first time, and so the next; and for ever as the last."""
    left = list(behaviours)

    async def behave(received: Received, writer: asyncio.StreamWriter) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(received, writer)

    return behave


@dataclass
class Held:
    """A behaviour that answers only when it is told to: `pod.behaviour = held.behave`."""

    behaviour: Behaviour
    arrived: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def behave(self, received: Received, writer: asyncio.StreamWriter) -> None:
        self.arrived += 1
        await self.released.wait()
        await self.behaviour(received, writer)
