"""How long a broadcast to 10, 100 and 1,000 addresses takes, compared with a bare aiohttp gather and httpx.

One process responds at every address of 127.0.0.0/8 on one port, with the minimum that HTTP/1.1 allows. The contestants
share another process and take turns: our broadcaster, with its checks, outcomes and slots; `asyncio.gather` over one
aiohttp session, with the same limits and as few kept connections as ours; and the same with httpx, which calls 1,000
addresses only once because of the time it needs. Discovery is measured separately: a broadcast whose addresses come
from a real DNS server, with both look-ups, compared with the same one from a fixed list.

Server and client share the cores, so only wall-clock time can be compared.
"""

import asyncio
import resource
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Final

import aiohttp
import httpx
from tests.support.dns_server import DnsServer

from benchmarks.harness import Effort, Limit, Row, answer, child, compare, run_async
from broadcache.publisher.fanout.broadcaster import Broadcaster, Limits, Request
from broadcache.publisher.fanout.discovery import DnsDiscovery, ListDiscovery
from broadcache.publisher.fanout.policy import FanoutPolicy

_BODY: Final = b'{"v":1,"keys":["product:42"]}'
_ANSWER: Final = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{"dropped":1}'
_HTTPX_ADDRESSES_MAX: Final = 100

Contestant = Callable[[], Awaitable[None]]


def run(effort: Effort) -> list[Row]:
    rows: list[Row] = []
    counts = (10, 50) if effort.is_quick else (10, 100, 1_000)
    _allow_files(4 * max(counts))
    with child(partial(run_async, _serve), _hosts(max(counts))) as pipe:
        port: int = answer(pipe)
        for addresses in counts:
            rounds = effort.pick(full=max(5, 600 // addresses), quick=2)
            rows += asyncio.run(_measure(port, addresses, rounds, with_httpx_at_most=_httpx_rounds(addresses, rounds)))
    return rows


def _httpx_rounds(addresses: int, rounds: int) -> int:
    return rounds if addresses <= _HTTPX_ADDRESSES_MAX else 1


def _hosts(count: int) -> list[str]:
    return [f"127.1.{number // 250}.{2 + number % 250}" for number in range(count)]


def _allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(count + 256, hard)), hard))


async def _serve(pipe: Connection, hosts: Sequence[str]) -> None:
    """Answer every request at each of `hosts`, all on one port, until the parent goes."""
    _allow_files(4 * len(hosts))
    with socket.create_server((hosts[0], 0)) as free:
        port = free.getsockname()[1]
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Bare, hosts, port, backlog=512)
    pipe.send(port)
    async with server:
        await loop.run_in_executor(None, _wait_for_end, pipe)


def _wait_for_end(pipe: Connection) -> None:
    with suppress(EOFError):
        pipe.recv()


class _Bare(asyncio.Protocol):
    """Treats any bytes up to the end of a body as one request, and responds with 200."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._seen = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._seen += data
        if self._seen.endswith(_BODY) and self._transport is not None:
            self._seen = b""
            self._transport.write(_ANSWER)


async def _measure(port: int, count: int, rounds: int, *, with_httpx_at_most: int) -> list[Row]:
    hosts = _hosts(count)
    async with AsyncExitStack() as stack:
        dns = await stack.enter_async_context(DnsServer())
        dns.a("web.test", *hosts)
        listed = ListDiscovery({"web.test": [f"{host}:{port}" for host in hosts]})
        ours = await stack.enter_async_context(_broadcaster(listed, port))
        discovering = await stack.enter_async_context(_broadcaster(DnsDiscovery([dns.address]), port))
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=True), cookie_jar=aiohttp.DummyCookieJar()
            )
        )
        client = await stack.enter_async_context(
            httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=120, trust_env=False)
        )
        urls = [f"http://{host}:{port}/cache-invalidation" for host in hosts]
        contestants: dict[str, Contestant] = {
            "ours": lambda: _broadcast(ours, port, count),
            "aiohttp": lambda: _gather_aiohttp(session, urls),
            "httpx": lambda: _gather_httpx(client, urls),
            "discovering": lambda: _broadcast(discovering, port, count),
        }
        taken = await _take_turns(contestants, rounds, with_httpx_at_most)
    row = partial(compare, unit="ms", measure="wall")
    what = f"broadcast to {count:,} addresses"
    return [
        row(what, taken["ours"], "aiohttp gather", taken["aiohttp"], limit=Limit("≤", 1.3)),
        row(what, taken["ours"][: len(taken["httpx"])], "httpx gather", taken["httpx"]),
        row(f"{what}, found by DNS", taken["discovering"], "from a list", taken["ours"]),
    ]


async def _take_turns(contestants: dict[str, Contestant], rounds: int, httpx_rounds: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(-1, rounds):  # the first is to warm up
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if name == "httpx" and (number >= httpx_rounds or (number < 0 and httpx_rounds == 1)):
                continue
            began_at = time.perf_counter()
            await contestants[name]()
            if number >= 0:
                taken[name].append((time.perf_counter() - began_at) * 1_000)
    return taken


def _broadcaster(discovery: ListDiscovery | DnsDiscovery, port: int) -> Broadcaster:
    policy = FanoutPolicy([f"web.test:{port}"], networks=["127.0.0.0/8"])
    return Broadcaster(
        discovery, policy, limits=Limits(timeout_seconds=30, deadline_seconds=60, connect_timeout_seconds=30)
    )


async def _broadcast(broadcaster: Broadcaster, port: int, count: int) -> None:
    destination = FanoutPolicy([f"web.test:{port}"]).check("POST", "web.test", str(port))
    request = Request(method="POST", destination=destination, target=b"/cache-invalidation", body=_BODY)
    broadcast = await broadcaster.broadcast(request)
    if broadcast.succeeded != count:
        raise RuntimeError(f"expected {count} to succeed, got {broadcast.succeeded}: {broadcast.outcomes[:3]}")


async def _gather_aiohttp(session: aiohttp.ClientSession, urls: Sequence[str]) -> None:
    async def post(url: str) -> int:
        async with session.post(url, data=_BODY) as response:
            await response.read()
            return response.status

    _check(await asyncio.gather(*map(post, urls)))


async def _gather_httpx(client: httpx.AsyncClient, urls: Sequence[str]) -> None:
    async def post(url: str) -> int:
        return (await client.post(url, content=_BODY)).status_code

    _check(await asyncio.gather(*map(post, urls)))


def _check(statuses: Sequence[int]) -> None:
    if set(statuses) != {200}:
        raise RuntimeError(f"expected every address to answer 200, got {sorted(set(statuses))}")
