"""The server in front of the API: one connection may carry requests to the API and broadcasts of any method."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tests.support.web_server import web_server
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from broadcache.publisher.api.app import create_app
from broadcache.publisher.api.settings import ApiSettings

pytestmark = pytest.mark.anyio

_BODY = b'{"namespace":"products","keys":["product:42"]}'
PUBLISH = (
    b"POST /invalidations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
    % (len(_BODY), _BODY)
)
# Its port is not allowed, so it is refused before anything is sent.
BAN = b"BAN /web.test/9/products HTTP/1.1\r\nHost: x\r\n\r\n"


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()
            await asyncio.sleep(0.02)  # lets the server read this piece by itself

    async def status(self) -> int:
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(None, 1)[0])
        await self._reader.readexactly(length)
        return int(head.split()[1])


@pytest.fixture
async def protocols(redis_url: str) -> AsyncIterator[tuple[Client, set[object]]]:
    app = create_app(ApiSettings(redis_url=redis_url, fanout_allow=("web.test:80",)))
    async with web_server(app) as (port, server), _connected(port) as client:
        yield client, server.server_state.connections  # type: ignore[misc]


@asynccontextmanager
async def _connected(port: int) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()


async def test_requests_to_the_api_are_parsed_by_httptools_until_another_path_comes(
    protocols: tuple[Client, set[object]],
) -> None:
    client, connections = protocols
    for _ in range(2):
        await client.send(PUBLISH)
        assert await client.status() == 200
    assert [isinstance(each, HttpToolsProtocol) for each in connections] == [True]
    await client.send(BAN)
    assert await client.status() == 403
    assert [isinstance(each, H11Protocol) for each in connections] == [True]
    for request, status in ((PUBLISH, 200), (BAN, 403), (PUBLISH, 200)):
        await client.send(request)
        assert await client.status() == status


@pytest.mark.parametrize("cut", [1, 6, 12, 20, 40, len(PUBLISH) - 5])
async def test_a_request_in_two_parts_is_answered_wherever_it_is_cut(
    protocols: tuple[Client, set[object]], cut: int
) -> None:
    client, _ = protocols
    for request, status in ((PUBLISH, 200), (BAN, 403)):
        await client.send(request[:cut], request[cut:])
        assert await client.status() == status


async def test_requests_that_do_not_wait_for_each_other_are_answered_in_order(
    protocols: tuple[Client, set[object]],
) -> None:
    client, _ = protocols
    await client.send(PUBLISH + PUBLISH + PUBLISH)
    assert [await client.status() for _ in range(3)] == [200] * 3
    await client.send(BAN + PUBLISH)
    assert [await client.status() for _ in range(2)] == [403, 200]


@pytest.mark.parametrize(
    ("method", "path"), [("BAN", "invalidations"), ("GET", "invalidationsx/80/x"), ("GET", "replica")]
)
async def test_what_only_resembles_a_request_to_the_api_is_answered_too(
    protocols: tuple[Client, set[object]], method: str, path: str
) -> None:
    client, connections = protocols
    await client.send(f"{method} /{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert await client.status() in (403, 404, 405, 422)
    assert [isinstance(each, H11Protocol) for each in connections] == [True]
