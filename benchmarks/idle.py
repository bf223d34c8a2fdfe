"""The cost of an idle replica: its commands, as the server counts them, and its share of a core.

Each contestant has a server of its own and four processes on it, each with one connection: a Subscriber with one
LocalCache and default settings; redis-py's `PubSub.listen()`, which sends nothing and detects nothing; and the same
with a `ping()` every second, the minimum that may detect a dead link. All idle side by side, in the same windows.

Commands make two rows, because a server counts a script and each command that the script runs. CPU time is that of the
whole process, the median of the four; no process is queried within a window.
"""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple, Self, TypeAlias

from cachetools import TTLCache
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from benchmarks.harness import Effort, Limit, Measure, Row, Stopwatch, Taken, answer, child, compare, run_async
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.subscriber import LocalCache, Subscriber

REPLICAS: Final = 4
_NAMESPACE: Final = "products"
_PING_INTERVAL_SECONDS: Final = 1.0
_SETTLE_SECONDS: Final = 2.0
_PERCENT: Final = 100
_SENT: Final = ("evalsha", "eval", "ping")
"""What the contestants send while they idle. Whatever else the server executed, their scripts ran."""
_UNITS: Final[dict[str, tuple[str, Measure]]] = {
    "sent_per_second": ("/s", "count"),
    "executed_per_second": ("/s", "count"),
    "core_percent": ("%", "CPU"),
}
_PEERS: Final = {"listen": "PubSub.listen() (floor)", "ping": "PubSub.listen(), ping() each s"}

Idler: TypeAlias = Callable[[str], Any]
"""Makes an asynchronous context manager, within which one replica idles, of a server's URL."""


class Idled(NamedTuple):
    """The cost of one replica in one window: the mean or the median of its fleet."""

    sent_per_second: float
    executed_per_second: float
    core_percent: float


def run(effort: Effort) -> list[Row]:
    rounds = effort.pick(full=3, quick=1)
    window_seconds = effort.pick(full=10, quick=2)
    idlers: dict[str, Idler] = {"ours": idling_with_subscriber, "listen": idling_with_listen, "ping": idling_with_ping}
    with ExitStack() as stack:
        fleets = {name: stack.enter_context(_Fleet(idler)) for name, idler in idlers.items()}
        time.sleep(_SETTLE_SECONDS)
        idled = [_idle(fleets, window_seconds) for _ in range(rounds)]

    def row(what: str, field: str, peer: str, limit: Limit | None = None) -> Row:
        unit, measure = _UNITS[field]
        ours, theirs = ([getattr(each[name], field) for each in idled] for name in ("ours", peer))
        return compare(f"idle replica, {what}", ours, _PEERS[peer], theirs, unit=unit, measure=measure, limit=limit)

    return [
        row("commands sent", "sent_per_second", "ping", Limit("≤", 1.0, of="ours")),
        row("commands executed", "executed_per_second", "ping", Limit("≤", 5.0, of="ours")),
        row("share of a core", "core_percent", "ping", Limit("≤", 1.3)),
        row("share of a core", "core_percent", "listen"),
    ]


def _idle(fleets: Mapping[str, "_Fleet"], window_seconds: float) -> dict[str, Idled]:
    """Let all fleets idle for one window; return the cost of one replica of each."""
    for fleet in fleets.values():
        fleet.begin()
    time.sleep(window_seconds)
    return {name: fleet.end() for name, fleet in fleets.items()}


class _Commands(NamedTuple):
    """How many commands a server has counted."""

    sent: int
    executed: int


class _Fleet:
    """Four identical idle processes, and their own server."""

    def __init__(self, idler: Idler) -> None:
        self._idler = idler
        self._stack = ExitStack()
        self._pipes: list[Connection] = []
        self._questions = 0
        self._before = _Commands(0, 0)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            server = stack.enter_context(EmbeddedServer())
            self._redis = stack.enter_context(BlockingRedis.from_url(server.url))
            main = partial(run_async, idle)
            self._pipes = [stack.enter_context(child(main, server.url, self._idler)) for _ in range(REPLICAS)]
            for pipe in self._pipes:
                answer(pipe)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self) -> None:
        """Begin a window."""
        for pipe in self._pipes:
            pipe.send("begin")
        self._before = self._commands()

    def end(self) -> Idled:
        """End the window; return the cost of one replica."""
        commands = self._commands()
        for pipe in self._pipes:
            pipe.send("end")
        taken: list[Taken] = [answer(pipe) for pipe in self._pipes]
        window_seconds = statistics.median(each.wall for each in taken)
        return Idled(
            (commands.sent - self._before.sent) / REPLICAS / window_seconds,
            (commands.executed - self._before.executed) / REPLICAS / window_seconds,
            statistics.median(each.cpu / each.wall for each in taken) * _PERCENT,
        )

    def _commands(self) -> _Commands:
        # Each INFO command is counted as well, before the next one is answered.
        info: Any = self._redis.info("commandstats", "stats")
        self._questions += 1
        sent = sum(info[f"cmdstat_{name}"]["calls"] for name in _SENT if f"cmdstat_{name}" in info)
        return _Commands(sent, info["total_commands_processed"] - self._questions)


async def idle(pipe: Connection, url: str, idler: Idler) -> None:
    """Idle, and send back the CPU time of each window."""
    loop = asyncio.get_running_loop()
    async with idler(url):
        pipe.send("ready")
        with suppress(EOFError):
            while True:
                await loop.run_in_executor(None, pipe.recv)
                stopwatch = Stopwatch()
                await loop.run_in_executor(None, pipe.recv)
                pipe.send(stopwatch.read())


def idling_with_subscriber(url: str) -> Subscriber:
    return Subscriber(url, caches={_NAMESPACE: LocalCache(TTLCache(maxsize=10_000, ttl=300))})


@asynccontextmanager
async def idling_with_listen(url: str) -> AsyncIterator[None]:
    async with _listening(url):
        yield


@asynccontextmanager
async def idling_with_ping(url: str) -> AsyncIterator[None]:
    async with _listening(url) as pubsub:
        pinging = asyncio.create_task(_ping_for_ever(pubsub))
        yield
        pinging.cancel()


async def _ping_for_ever(pubsub: PubSub) -> None:
    while True:
        await asyncio.sleep(_PING_INTERVAL_SECONDS)
        await pubsub.ping()


@asynccontextmanager
async def _listening(url: str) -> AsyncIterator[PubSub]:
    async with Redis.from_url(url) as redis, redis.pubsub() as pubsub:
        await pubsub.subscribe(_NAMESPACE)

        async def listen() -> None:
            messages: Any = pubsub.listen()
            async for _ in messages:
                pass

        listening = asyncio.create_task(listen())
        yield pubsub
        listening.cancel()
        await asyncio.wait([listening])
