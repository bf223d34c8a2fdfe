"""A server that is told to end does not wait for the rest of a request's body."""

import asyncio
import signal
import sys
from collections.abc import Sequence

import pytest
from tests.support.command_line import running
from tests.support.fanout_scene import reply_of
from tests.support.redis_probe import redis_probe
from tests.support.waiting import until

from broadcache.shared.process.bodies import UnfinishedBodies

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM")]

HALF = '{"keys":["k"'


def begun(method: str, path: str, *headers: str, body: str = HALF) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: publisher", "Content-Type: application/json", *headers, "", body]
    return "\r\n".join(lines).encode()


BEGUN = [
    begun("POST", "/invalidations", "Content-Length: 100"),
    begun("POST", "/invalidations", "Transfer-Encoding: chunked", body=f"{len(HALF):x}\r\n{HALF}\r\n"),
    begun("POST", "/invalidations/preview", "Content-Length: 100"),
    begun("POST", "/invalidations", "Content-Length: 100", "Expect: 100-continue", body=""),
]


async def halves(port: int, requests: Sequence[bytes]) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Send the begun requests, and return when the server reads their bodies."""
    connections = []
    for request in requests:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        await writer.drain()
        connections.append((reader, writer))
    return connections


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_serve_ends_although_bodies_are_unfinished(redis_url: str, number: signal.Signals) -> None:
    with running("serve", "--port", "0", "--redis-url", redis_url) as serve:
        port = int(serve.url().rpartition(":")[2])
        connections = await halves(port, BEGUN)
        # Answered after the others were accepted: the server has begun with all of them.
        whole, closing = (await halves(port, [begun("GET", "/health/live", "Connection: close", body="")]))[0]
        assert b"200" in await whole.readline()
        closing.transport.abort()
        code, log = await asyncio.to_thread(serve.end, number)
        assert code == 0
        # uvicorn says so when it had to cancel what did not end by itself.
        assert "graceful shutdown exceeded" not in log
        assert "Traceback" not in log
        for reader, writer in connections:
            raw = await reader.read()
            reply = reply_of(raw)
            assert (reply.status, reply.headers["connection"]) == (503, "close")
            assert reply.json["type"] == "urn:broadcache:problem:shutting-down"
            writer.transport.abort()
    async with redis_probe(redis_url) as probe:
        assert await probe.call("XLEN", "{cache-invalidation}:log") == 0


async def test_a_fan_out_ends_although_bodies_are_unfinished() -> None:
    with running("serve", "--fanout-only", "--port", "0", BROADCACHE_FANOUT_ALLOW="web:80") as serve:
        port = int(serve.url().rpartition(":")[2])
        connections = await halves(port, [begun("BAN", "/web/80/x", "Content-Length: 100")])
        code, log = await asyncio.to_thread(serve.end, signal.SIGTERM)
        assert (code, "graceful shutdown exceeded" in log) == (0, False)
        for _, writer in connections:
            writer.transport.abort()


class Body:
    """The messages of a request as a server passes them on."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[dict[str, object]] = asyncio.Queue()
        self.received: list[object] = []
        self.sent: list[dict[str, object]] = []

    async def app(self, scope: object, receive: object, send: object) -> None:
        while True:
            message = await receive()  # type: ignore[operator]
            self.received.append(message.get("body", message["type"]))
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200})  # type: ignore[operator]

    async def send(self, message: object) -> None:
        self.sent.append(message)  # type: ignore[arg-type]

    def put(self, body: bytes, *, more: bool) -> None:
        self.messages.put_nowait({"type": "http.request", "body": body, "more_body": more})


async def test_a_body_that_is_complete_is_processed_although_the_server_ends() -> None:
    body = Body()
    bodies = UnfinishedBodies(body.app)
    body.put(b"a", more=True)
    request = asyncio.create_task(bodies({"type": "http"}, body.messages.get, body.send))
    await until(lambda: body.received == [b"a"])
    body.put(b"b", more=False)
    bodies.end()
    await request
    assert (body.received, body.sent[0]["status"]) == ([b"a", b"b"], 200)
    # So is one that has arrived, and was not read yet.
    late = Body()
    bodies = UnfinishedBodies(late.app)
    bodies.end()
    late.put(b"c", more=False)
    await bodies({"type": "http"}, late.messages.get, late.send)
    assert (late.received, late.sent[0]["status"]) == ([b"c"], 200)


async def test_a_body_that_is_not_complete_is_given_up_once_and_its_request_is_not_answered_200() -> None:
    body = Body()
    bodies = UnfinishedBodies(body.app)
    request = asyncio.create_task(bodies({"type": "http"}, body.messages.get, body.send))
    body.put(b"a", more=True)
    await until(lambda: body.received == [b"a"])
    bodies.end()
    await request
    assert body.received == [b"a", "http.disconnect"]
    assert [message.get("status") for message in body.sent] == [503, None]
