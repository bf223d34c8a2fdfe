"""The fault tests stand on the proxy, so it is tested itself: against an echo server."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from tests.support.tcp_proxy import Directions, TcpProxy

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 20


@pytest.fixture
async def echo_port() -> AsyncIterator[int]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(1024):
                writer.write(chunk)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture
async def proxy(echo_port: int) -> AsyncIterator[TcpProxy]:
    async with TcpProxy("127.0.0.1", echo_port) as proxy:
        yield proxy


class Caller:
    """A client of the echo server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def dial(cls, port: int) -> "Caller":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, text: bytes) -> None:
        self._writer.write(text)

    async def hear(self) -> bytes:
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await self._reader.read(1024)

    async def call(self, text: bytes) -> bytes:
        self.send(text)
        return await self.hear()

    async def has_heard_nothing(self, echo_port: int) -> bool:
        """Whether nothing, not even the end, has come by the time a healthy path has answered."""
        listening = asyncio.ensure_future(self._reader.read(1024))
        healthy = await Caller.dial(echo_port)
        assert await healthy.call(b"healthy") == b"healthy"
        healthy.hang_up()
        has_heard = listening.done()
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        return not has_heard

    async def is_dropped(self) -> bool:
        try:
            return await self.hear() == b""
        except ConnectionError:
            return True

    def hang_up(self) -> None:
        self._writer.transport.abort()


Dial = Callable[[], Awaitable[Caller]]


@pytest.fixture
async def callers() -> AsyncIterator[list[Caller]]:
    """Every caller of a test, to be hung up at its end."""
    callers: list[Caller] = []
    yield callers
    for caller in callers:
        caller.hang_up()


@pytest.fixture
def dial(proxy: TcpProxy, callers: list[Caller]) -> Dial:
    async def dial() -> Caller:
        callers.append(await Caller.dial(proxy.port))
        return callers[-1]

    return dial


@pytest.fixture
async def caller(dial: Dial) -> Caller:
    return await dial()


async def test_bytes_pass_both_ways(caller: Caller) -> None:
    assert await caller.call(b"hello") == b"hello"


async def test_a_cut_drops_every_connection_and_takes_new_ones(proxy: TcpProxy, caller: Caller, dial: Dial) -> None:
    assert await caller.call(b"before") == b"before"
    await proxy.cut()
    assert await caller.is_dropped()
    another = await dial()
    assert await another.call(b"after") == b"after"


async def test_a_refusing_proxy_keeps_its_port_and_its_connections(proxy: TcpProxy, caller: Caller, dial: Dial) -> None:
    assert await caller.call(b"before") == b"before"
    port = proxy.port
    await proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await dial()
    assert await caller.call(b"still") == b"still"
    await proxy.accept()
    assert proxy.port == port
    another = await dial()
    assert await another.call(b"after") == b"after"


@pytest.mark.parametrize("directions", ["both", "to_server", "to_client"])
async def test_a_black_hole_is_silent_and_heals_by_dropping_what_lost_bytes(
    proxy: TcpProxy, caller: Caller, dial: Dial, echo_port: int, directions: Directions
) -> None:
    assert await caller.call(b"before") == b"before"
    proxy.black_hole(directions)
    newcomer = await dial()
    caller.send(b"lost")
    newcomer.send(b"lost too")
    async with asyncio.timeout(DEADLINE_SECONDS):
        await proxy.has_discarded(len(b"lost" + b"lost too"))
    assert await caller.has_heard_nothing(echo_port)
    assert await newcomer.has_heard_nothing(echo_port)
    proxy.heal()
    assert await caller.is_dropped()
    assert await newcomer.is_dropped()
    another = await dial()
    assert await another.call(b"after") == b"after"


async def test_a_cut_does_not_wait_for_the_end_of_a_black_hole(proxy: TcpProxy, caller: Caller, dial: Dial) -> None:
    assert await caller.call(b"before") == b"before"
    proxy.black_hole()
    caller.send(b"lost")
    async with asyncio.timeout(DEADLINE_SECONDS):
        await proxy.has_discarded(len(b"lost"))
        await proxy.cut()
    assert await caller.is_dropped()
    proxy.heal()
    another = await dial()
    assert await another.call(b"after") == b"after"


async def test_a_stall_delivers_late(proxy: TcpProxy, caller: Caller, echo_port: int) -> None:
    proxy.stall()
    caller.send(b"late")
    assert await caller.has_heard_nothing(echo_port)
    proxy.heal()
    assert await caller.hear() == b"late"


async def test_a_slow_link_delivers_everything_at_its_pace(echo_port: int, callers: list[Caller]) -> None:
    sent, bytes_per_second = b"x" * 30_000, 100_000
    async with TcpProxy("127.0.0.1", echo_port, bytes_per_second=bytes_per_second) as proxy:
        callers.append(await Caller.dial(proxy.port))
        began = time.monotonic()
        callers[0].send(sent)
        received = b""
        while len(received) < len(sent):
            received += await callers[0].hear()
        # The last chunk is paid for after it was delivered.
        assert time.monotonic() - began >= 0.9 * len(sent) / bytes_per_second
    assert received == sent


async def test_a_server_that_is_away_ends_the_connection(callers: list[Caller]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # Bound and not listening: connections are refused.
        async with TcpProxy("127.0.0.1", unused.getsockname()[1]) as proxy:
            callers.append(await Caller.dial(proxy.port))
            assert await callers[0].is_dropped()
