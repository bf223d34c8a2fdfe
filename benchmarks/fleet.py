"""How long from `publish()` until the last of 1,000 replicas on one server has applied it.

Four processes hold 250 connections each. Ours are Subscribers with the default echo and a cache each; the peer's are
asyncio streams whose bytes hiredis reads, and which only receive. The echoes of 1,000 replicas, elsewhere the work of
1,000 machines, keep the few cores of this one busy: so a third fleet is ours with echoes that never come due. The
fleets take turns on the same processes. A fifth process publishes: to ours with `Publisher`, which logs as well, to the
peer's with redis-py's `PUBLISH` of a frame of the same form. It publishes the next message when the last connection has
heard this one.

Times are the system's monotonic clock, which all processes share, from before the call until after the frame was
applied (or read) by the last connection. A round is 100 messages to each fleet. CPU time is that of the four processes
through a round, per message: for ours it has the echoes of that time in it.
"""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple, TypeAlias

from cachetools import TTLCache
from redis.asyncio import Redis

from benchmarks.harness import HAS_HIREDIS, Effort, Limit, Measure, Row, Stopwatch, answer, child, compare, run_async
from broadcache.publisher import Publisher
from broadcache.shared.invalidation import Invalidation, Keys, invalidation_of
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.wire import encode
from broadcache.subscriber import LocalCache, Subscriber

PROCESSES: Final = 4
PEER: Final = "asyncio + hiredis" if HAS_HIREDIS else "PubSub.listen()"
_NO_ECHO: Final = "ours, no echo"
FLEETS: Final = ("ours", _NO_ECHO, PEER)
_ECHO_INTERVAL_SECONDS: Final = 1.0  # the default
_NEVER_SECONDS: Final = 3_600.0
# Long, so that a busy machine loses no links: reconnecting would be another benchmark.
_PATIENCE_SECONDS: Final = 60.0
_NAMESPACE: Final = "products"
_RAW_CHANNEL: Final = "raw"
_CONNECTS_AT_ONCE: Final = 10
_WARM_UP_MESSAGES: Final = 10
_FILES_BESIDE_CONNECTIONS: Final = 100
_MILLISECONDS: Final = 1_000

OnHeard: TypeAlias = Callable[[], None]
Listening: TypeAlias = Callable[[OnHeard], AbstractAsyncContextManager[object]]
"""One connection, which calls back when it has received a message."""
Publish: TypeAlias = Callable[[int], Awaitable[object]]


class Heard(NamedTuple):
    """The measurements of one round.

    Units: `last_ms` is, for each message, how long until the last connection had it; `cpu_ms` is what one message took
           of all processes together.
    """

    last_ms: list[float]
    cpu_ms: float


def run(effort: Effort) -> list[Row]:
    replicas = effort.pick(full=1_000, quick=100)
    messages = effort.pick(full=100, quick=20)
    rounds = effort.pick(full=3, quick=1)
    heard: dict[str, list[Heard]] = {fleet: [] for fleet in FLEETS}
    with EmbeddedServer() as server, ExitStack() as stack:
        main = partial(run_async, listen)
        pipes = [
            stack.enter_context(child(main, server.url, server.port, replicas // PROCESSES)) for _ in range(PROCESSES)
        ]
        asyncio.run(_begin_log(server.url))
        for number in range(rounds):
            first = number % len(FLEETS)
            for fleet in FLEETS[first:] + FLEETS[:first]:
                heard[fleet].append(asyncio.run(_publish_round(server.url, pipes, fleet, messages)))

    def row(fleet: str, what: str, figure: Callable[[Heard], float], measure: Measure, limit: Limit | None) -> Row:
        ours, theirs = ([figure(each) for each in heard[name]] for name in (fleet, PEER))
        return compare(what, ours, PEER, theirs, unit="ms", measure=measure, limit=limit)

    rows: list[Row] = []
    for fleet, beside, limit in (("ours", "", Limit("≤", 1.5)), (_NO_ECHO, ", no echo", None)):
        last = f"publish → last of {replicas:,}{beside}"
        rows += [
            row(fleet, f"{last}, p50", lambda each: _percentile(each.last_ms, 50), "wall", None),
            row(fleet, f"{last}, p99", lambda each: _percentile(each.last_ms, 99), "wall", limit),
            row(fleet, f"one message, {replicas:,} replicas{beside}", lambda each: each.cpu_ms, "CPU", None),
        ]
    return rows


def _percentile(figures: Sequence[float], percentile: int) -> float:
    return statistics.quantiles(figures, n=100, method="inclusive")[percentile - 1]


async def _begin_log(url: str) -> None:
    async with Publisher(url) as publisher:
        await _publish(publisher, 0)


async def _publish_round(url: str, pipes: Sequence[Connection], fleet: str, messages: int) -> Heard:
    for pipe in pipes:
        pipe.send(fleet)
    for pipe in pipes:
        answer(pipe)
    async with Publisher(url) as publisher, Redis.from_url(url) as redis:
        publish = partial(_publish_raw, redis) if fleet == PEER else partial(_publish, publisher)
        for number in range(_WARM_UP_MESSAGES):
            await _last_heard(pipes, publish, number)
        for pipe in pipes:
            pipe.send("begin")
        for pipe in pipes:
            answer(pipe)
        last_ms = [await _last_heard(pipes, publish, number) for number in range(messages)]
        for pipe in pipes:
            pipe.send("end")
        cpu_seconds: float = sum(answer(pipe) for pipe in pipes)
    return Heard(last_ms, cpu_seconds * _MILLISECONDS / messages)


async def _last_heard(pipes: Sequence[Connection], publish: Publish, number: int) -> float:
    """Publish one message; return after how many milliseconds the last connection had it."""
    published_ns = time.monotonic_ns()
    await publish(number)
    heard_ns: int = max(answer(pipe) for pipe in pipes)
    return (heard_ns - published_ns) / 1_000_000


async def _publish(publisher: Publisher, number: int) -> None:
    await publisher.publish(Keys(f"product:{number}"), namespace=_NAMESPACE, reason="price change")


async def _publish_raw(redis: Redis, number: int) -> None:
    frame = encode(invalidation_of([Keys(f"product:{number}")], namespace=_NAMESPACE, reason="price change"))
    await redis.publish(_RAW_CHANNEL, frame)


async def listen(pipe: Connection, url: str, port: int, connections: int) -> None:
    """Hold the connections of one fleet at a time; send back when the last of them has received each message."""
    allow_files(connections + _FILES_BESIDE_CONNECTIONS)
    loop = asyncio.get_running_loop()
    listeners: dict[str, Listening] = {
        "ours": partial(_listening_with_subscriber, url),
        _NO_ECHO: partial(_listening_with_subscriber, url, echo_interval_seconds=_NEVER_SECONDS),
        "asyncio + hiredis": partial(_listening_with_hiredis, port),
        "PubSub.listen()": partial(_listening_with_redis_py, url),
    }
    missing = connections

    def note() -> None:
        nonlocal missing
        missing -= 1
        if not missing:
            missing = connections
            pipe.send(time.monotonic_ns())

    with suppress(EOFError):
        while True:
            listening = listeners[await loop.run_in_executor(None, pipe.recv)]
            async with AsyncExitStack() as stack:
                for first in range(0, connections, _CONNECTS_AT_ONCE):
                    together = range(first, min(first + _CONNECTS_AT_ONCE, connections))
                    await asyncio.gather(*[stack.enter_async_context(listening(note)) for _ in together])
                pipe.send("ready")
                await loop.run_in_executor(None, pipe.recv)
                stopwatch = Stopwatch()
                pipe.send("begun")
                await loop.run_in_executor(None, pipe.recv)
                pipe.send(stopwatch.read().cpu)


class _NotingCache(LocalCache):
    """Calls when an invalidation has been applied."""

    def __init__(self, on_heard: OnHeard) -> None:
        # A bound longer than any echo interval: the cache is never read here.
        super().__init__(TTLCache(maxsize=100, ttl=300), max_staleness_seconds=2 * _NEVER_SECONDS)
        self._on_heard = on_heard

    def apply_invalidation(self, invalidation: Invalidation, *, reason: str = "invalidation") -> None:
        super().apply_invalidation(invalidation, reason=reason)
        if invalidation.id:  # not the clear with which a subscription begins
            self._on_heard()


@asynccontextmanager
async def _listening_with_subscriber(
    url: str, on_heard: OnHeard, *, echo_interval_seconds: float = _ECHO_INTERVAL_SECONDS
) -> AsyncIterator[None]:
    subscriber = Subscriber(
        url,
        caches={_NAMESPACE: _NotingCache(on_heard)},
        echo_interval_seconds=echo_interval_seconds,
        echo_timeout_seconds=_PATIENCE_SECONDS,
        connect_timeout_seconds=_PATIENCE_SECONDS,
        start_timeout_seconds=_PATIENCE_SECONDS,
    )
    async with subscriber:
        if subscriber.state != "coherent":
            raise RuntimeError(f"expected a subscriber to be coherent once it is entered, got {subscriber.state}")
        yield


@asynccontextmanager
async def _listening_with_hiredis(port: int, on_heard: OnHeard) -> AsyncIterator[None]:
    import hiredis

    parser = hiredis.Reader()
    stream, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"SUBSCRIBE {_RAW_CHANNEL}\r\n".encode())
    while parser.gets() is False:
        parser.feed(await stream.read(65_536))

    async def hear() -> None:
        while chunk := await stream.read(65_536):
            parser.feed(chunk)
            while parser.gets() is not False:
                on_heard()

    async with _running(hear()):
        yield
    writer.close()


@asynccontextmanager
async def _listening_with_redis_py(url: str, on_heard: OnHeard) -> AsyncIterator[None]:
    async with Redis.from_url(url) as redis, redis.pubsub() as pubsub:
        await pubsub.subscribe(_RAW_CHANNEL)
        messages: Any = pubsub.listen()
        await anext(messages)  # the confirmation

        async def hear() -> None:
            async for _ in messages:
                on_heard()

        async with _running(hear()):
            yield


@asynccontextmanager
async def _running(work: Coroutine[object, object, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def allow_files(files: int) -> None:
    """Raise this process's limit of open files to `files`, if it has a lower limit."""
    try:
        import resource
    except ImportError:  # Windows has none
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (files if hard == resource.RLIM_INFINITY else min(files, hard), hard)
        )
