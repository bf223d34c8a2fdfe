"""The demo's processes, and the HTTP requests that it sends to them."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import aiohttp

from ...shared.errors import BroadcacheError
from ...shared.transport.redis.embedded import EmbeddedServer
from .catalogue import Catalogue, CatalogueSource, key_of
from .child import Child

__all__ = ["PRODUCT_ID", "Fleet", "Invalidated", "MeasuredDrop", "Read", "Replica", "RequestFailed", "running_fleet"]

PRODUCT_ID: Final = 1
SUBSCRIBED_COUNT: Final = 3
_FIRST_REPLICA_PORT_OFFSET: Final = 101
_REQUEST_SECONDS_MAX: Final = 5.0
_DROP_SECONDS_MAX: Final = 5.0
_STATE_SECONDS_MAX: Final = 15.0
"""Longer than a replica's pause between two attempts to reach Redis, and than the start of a server takes."""
_POLL_SECONDS: Final = 0.05


class RequestFailed(BroadcacheError):
    """A process of the demo could not be reached, or responded with an error."""


class Read(NamedTuple):
    """The result of reading the product from a replica."""

    price: Decimal
    from_cache: bool


class MeasuredDrop(NamedTuple):
    """The invalidation that a replica applied last, and when, in ns of the clock that all processes here share."""

    id: str
    applied_at_ns: int


class Invalidated(NamedTuple):
    """A published invalidation, and when its request was sent, on the same clock.

    `sequence` is None when it was not logged: then `sent_by_http` replicas applied it by HTTP.
    """

    id: str
    sequence: int | None
    sent_at_ns: int
    sent_by_http: int = 0


class _Http:
    """Requests to one process. Raises: RequestFailed."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url: Final = url
        self.port: Final = urlsplit(url).port or 80
        self._session = session

    async def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            async with self._session.request(method, self.url + path, json=body) as response:
                if response.status != 200:
                    raise RequestFailed(
                        f"{method} {self.url}{path} answered {response.status}: {(await response.text())[:3000]}"
                    )
                answer: dict[str, Any] = await response.json()
                return answer
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise RequestFailed(f"{method} {self.url}{path} failed: {str(error) or type(error).__name__}") from error


class Replica(_Http):
    """One replica process. Each method raises RequestFailed."""

    def __init__(self, name: str, url: str, session: aiohttp.ClientSession, *, is_subscribed: bool) -> None:
        super().__init__(url, session)
        self.name: Final = name
        self.is_subscribed: Final = is_subscribed

    async def read(self) -> Read:
        """Read the product."""
        answer = await self.request("GET", f"/products/{PRODUCT_ID}")
        return Read(Decimal(str(answer["price"])).quantize(Decimal("0.01")), answer["from_cache"])

    async def set_price(self, price: Decimal) -> None:
        """Have the replica write the source. Nothing is invalidated."""
        await self.request("PUT", f"/products/{PRODUCT_ID}", {"price": str(price)})

    async def status(self) -> tuple[str, int]:
        """Return its state, and the sequence of its position (0 before the first invalidation)."""
        answer = await self.request("GET", "/cache-invalidation")
        position = answer["namespaces"][Catalogue.namespace]["position"]
        return answer["state"], position["sequence"] if position else 0

    async def await_state(self, *, is_coherent: bool) -> bool:
        """Wait until it is coherent, or is not; return whether that happened within _STATE_SECONDS_MAX."""
        deadline = time.monotonic() + _STATE_SECONDS_MAX
        while time.monotonic() < deadline:
            state, _ = await self.status()
            if (state == "coherent") == is_coherent:
                return True
            await asyncio.sleep(_POLL_SECONDS)
        return False

    async def await_sequence(self, sequence: int) -> bool:
        """Wait until its position is at or beyond `sequence`; return whether that happened in _STATE_SECONDS_MAX."""
        deadline = time.monotonic() + _STATE_SECONDS_MAX
        while time.monotonic() < deadline:
            if (await self.status())[1] >= sequence:
                return True
            await asyncio.sleep(_POLL_SECONDS)
        return False

    async def drop_of(self, invalidated: Invalidated) -> MeasuredDrop | None:
        """Wait until the replica has applied this invalidation; None if it has not within _DROP_SECONDS_MAX."""
        deadline = time.monotonic() + _DROP_SECONDS_MAX
        # An immediate request would compete for the processor with the measured apply.
        await asyncio.sleep(_POLL_SECONDS)
        while time.monotonic() < deadline:
            answer = await self.request("GET", "/demo/last-drop")
            if answer["id"] == invalidated.id:
                return MeasuredDrop(answer["id"], answer["applied_at_ns"])
            await asyncio.sleep(0.005)
        return None


class Fleet:
    """The publisher's API, the subscribed replicas, and the one that is not subscribed."""

    def __init__(
        self, api: _Http, replicas: list[Replica], source: CatalogueSource, server: EmbeddedServer | None = None
    ) -> None:
        self.api_port: Final = api.port
        self.replicas: Final = tuple(replicas)
        self._api = api
        self._source = source
        self._server = server

    async def kill_server(self) -> None:
        """Kill the Valkey server, like a crash."""
        assert self._server is not None
        await asyncio.to_thread(self._server.kill)

    async def restart_server(self) -> None:
        """Start it again at the same address, with empty data."""
        assert self._server is not None
        await asyncio.to_thread(self._server.restart)

    async def source_price(self) -> Decimal:
        """Read the price from the source, past every cache."""
        return (await asyncio.to_thread(self._source.product, PRODUCT_ID)).price

    async def invalidate(self) -> Invalidated:
        """Send `POST /invalidations` for the product. Raises: RequestFailed."""
        body = {"namespace": Catalogue.namespace, "keys": [key_of(PRODUCT_ID)], "reason": "price change"}
        sent_at_ns = time.monotonic_ns()
        answer = await self._api.request("POST", "/invalidations", body)
        sent_by_http = answer["fanout"]["succeeded"] if answer["fanout"] else 0
        return Invalidated(answer["id"], answer["sequence"], sent_at_ns, sent_by_http)


@asynccontextmanager
async def running_fleet(first_port: int) -> AsyncIterator[Fleet]:
    """Start the server and all processes, and stop them on exit.

    Shape:  the API listens on `first_port`, the replicas on the ports from 101 above it; where that is 0 or in use, on
            any free one.
    Raises: ServerBinaryNotFound, ServerStartFailed, ChildFailed, RequestFailed.
    """
    with TemporaryDirectory(prefix="broadcache-demo-") as name:
        folder = Path(name)
        source = CatalogueSource(folder / "catalogue.sqlite")
        names = [f"replica-{number}" for number in range(1, SUBSCRIBED_COUNT + 1)]
        children = [Child(name, folder / f"{name}.log") for name in ("publisher", *names, "naive")]
        timeout = aiohttp.ClientTimeout(total=_REQUEST_SECONDS_MAX)
        async with EmbeddedServer() as server, aiohttp.ClientSession(timeout=timeout) as session:
            try:
                await _start_all(children, server.url, folder / "catalogue.sqlite", first_port)
                publisher, *others = children
                replicas = [
                    Replica(child.name, child.url, session, is_subscribed=child.name in names) for child in others
                ]
                api = _Http(publisher.url, session)
                # The API connects to the server now, so that the first measurement is of publishing alone.
                await api.request("GET", "/health/ready")
                yield Fleet(api, replicas, source, server)
            finally:
                await session.close()
                await asyncio.gather(*(child.end() for child in children))


async def _start_all(children: list[Child], redis_url: str, source: Path, first_port: int) -> None:
    publisher, *replicas = children
    token = {"BROADCACHE_REPLICA_TOKEN": secrets.token_urlsafe()}  # of this demo alone, for its publisher's fan-out
    starts = []
    for number, child in enumerate(replicas):
        arguments = ["replica", "--name", child.name, "--source", str(source), "--redis-url", redis_url]
        if child is replicas[-1]:
            arguments.append("--no-subscribe")
        elif child is replicas[-2]:
            arguments += ["--when-incoherent", "serve"]
        starts.append(child.start(arguments, first_port and first_port + _FIRST_REPLICA_PORT_OFFSET + number, token))
    await _all_started(starts)
    # The fan-out needs the replicas' addresses; in production they come from DNS.
    addresses = "|".join(urlsplit(child.url).netloc for child in replicas[:-1])
    second_path = token | {
        "BROADCACHE_DELIVERY": "redis-then-fanout",
        "BROADCACHE_FANOUT_SERVICE": "replicas:http",
        "BROADCACHE_FANOUT_LISTS": f"replicas={addresses}",
    }
    await _all_started([publisher.start(("serve", "--redis-url", redis_url), first_port, second_path)])


async def _all_started(starts: list[Coroutine[Any, Any, None]]) -> None:
    try:
        async with asyncio.TaskGroup() as tasks:
            for start in starts:
                tasks.create_task(start)
    except BaseExceptionGroup as failures:
        # The first failure is the cause; the group has cancelled the others.
        raise failures.exceptions[0] from None
