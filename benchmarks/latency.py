"""How long an invalidation takes from `publish()` until it is applied, one message at a time.

Two processes beside the server: one publishes, the other listens. All paths are open at once and take turns, message by
message, with pauses of a millisecond: ours (`Publisher` → `Subscriber`, which logs and applies), redis-py's
(`await redis.publish` → asyncio `PubSub.listen()`, which only counts), and the floor (the same redis-py publish →
asyncio stream → hiredis). All send a frame of the same form. Times are the system's monotonic clock, which both
processes share, from before the call to after the frame was applied (or read). A round is 500 messages on each path.
"""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final, TypeAlias

from cachetools import TTLCache
from redis.asyncio import Redis

from benchmarks.harness import HAS_HIREDIS, Effort, Limit, Row, answer, child, compare, run_async
from broadcache.publisher import Publisher
from broadcache.shared.invalidation import Invalidation, Keys, invalidation_of
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.wire import encode
from broadcache.subscriber import LocalCache, Subscriber

PATHS: Final = ("ours", "PubSub.listen()", "asyncio + hiredis") if HAS_HIREDIS else ("ours", "PubSub.listen()")
_NAMESPACE: Final = "products"
_REST_SECONDS: Final = 0.001
_WARM_UP_MESSAGES: Final = 20

Publish: TypeAlias = Callable[[int], Awaitable[object]]


def run(effort: Effort) -> list[Row]:
    messages = effort.pick(full=500, quick=50)
    rounds = effort.pick(full=10, quick=2)
    with EmbeddedServer() as server, child(partial(run_async, listen), server.url, server.port) as pipe:
        answer(pipe)
        microseconds = asyncio.run(_publish_rounds(pipe, server.url, messages, rounds))

    def row(percentile: int, peer: str, limit: Limit | None = None) -> Row:
        figures = {name: [_percentile(each[name], percentile) for each in microseconds] for name in ("ours", peer)}
        what = f"publish → applied, p{percentile}"
        return compare(what, figures["ours"], peer, figures[peer], unit="µs", measure="wall", limit=limit)

    limits = {"PubSub.listen()": Limit("≤", 1.2)}
    return [row(percentile, peer, limits.get(peer)) for peer in PATHS[1:] for percentile in (50, 99)]


def _percentile(figures: list[float], percentile: int) -> float:
    return statistics.quantiles(figures, n=100, method="inclusive")[percentile - 1]


async def _publish_rounds(pipe: Connection, url: str, messages: int, rounds: int) -> list[dict[str, list[float]]]:
    async with Publisher(url) as publisher, Redis.from_url(url) as redis:
        publish: dict[str, Publish] = {path: partial(_publish_raw, redis, path) for path in PATHS[1:]}
        publish["ours"] = partial(_publish, publisher)
        await _publish_round(pipe, publish, _WARM_UP_MESSAGES)
        return [await _publish_round(pipe, publish, messages) for _ in range(rounds)]


async def _publish_round(pipe: Connection, publish: dict[str, Publish], messages: int) -> dict[str, list[float]]:
    pipe.send(messages)
    sent_ns: dict[str, list[int]] = {path: [] for path in PATHS}
    for number in range(messages):
        for path in PATHS[number % len(PATHS) :] + PATHS[: number % len(PATHS)]:
            sent_ns[path].append(time.monotonic_ns())
            await publish[path](number)
            await asyncio.sleep(_REST_SECONDS)
    heard_ns: dict[str, list[int]] = answer(pipe)
    return {
        path: [(heard - sent) / 1_000 for sent, heard in zip(sent_ns[path], heard_ns[path], strict=True)]
        for path in PATHS
    }


async def _publish(publisher: Publisher, number: int) -> None:
    await publisher.publish(Keys(f"product:{number}"), namespace=_NAMESPACE, reason="price change")


async def _publish_raw(redis: Redis, path: str, number: int) -> None:
    frame = encode(invalidation_of([Keys(f"product:{number}")], namespace=_NAMESPACE, reason="price change"))
    await redis.publish(path, frame)


class _TimedCache(LocalCache):
    """Records when each invalidation has been applied."""

    def __init__(self, heard_ns: list[int]) -> None:
        super().__init__(TTLCache(maxsize=10_000, ttl=3_600))
        self._heard_ns = heard_ns

    def apply_invalidation(self, invalidation: Invalidation, *, reason: str = "invalidation") -> None:
        super().apply_invalidation(invalidation, reason=reason)
        if invalidation.id:  # not the clear with which a subscription begins
            self._heard_ns.append(time.monotonic_ns())


async def listen(pipe: Connection, url: str, port: int) -> None:
    """Listen on all paths; for each requested number of messages, send back when they were received."""
    heard_ns: dict[str, list[int]] = {path: [] for path in PATHS}
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        cache = _TimedCache(heard_ns["ours"])
        await stack.enter_async_context(Subscriber(url, caches={_NAMESPACE: cache}))
        await stack.enter_async_context(_listening_with_redis_py(url, heard_ns["PubSub.listen()"]))
        if HAS_HIREDIS:
            await stack.enter_async_context(_listening_with_hiredis(port, heard_ns["asyncio + hiredis"]))
        pipe.send("ready")
        with suppress(EOFError):
            while True:
                messages = await loop.run_in_executor(None, pipe.recv)
                # Rarely, so that the check does not delay the measured messages.
                while any(len(times) < messages for times in heard_ns.values()):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                pipe.send(heard_ns)
                for times in heard_ns.values():
                    times.clear()


@asynccontextmanager
async def _listening_with_redis_py(url: str, heard_ns: list[int]) -> AsyncIterator[None]:
    async with Redis.from_url(url) as redis, redis.pubsub() as pubsub:
        await pubsub.subscribe("PubSub.listen()")
        messages: Any = pubsub.listen()
        await anext(messages)  # the confirmation

        async def note() -> None:
            async for _ in messages:
                heard_ns.append(time.monotonic_ns())  # noqa: PERF401  (each has its own time)

        async with _running(note()):
            yield


@asynccontextmanager
async def _listening_with_hiredis(port: int, heard_ns: list[int]) -> AsyncIterator[None]:
    import hiredis

    parser = hiredis.Reader()
    stream, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"SUBSCRIBE 'asyncio + hiredis'\r\n")
    while parser.gets() is False:
        parser.feed(await stream.read(65_536))

    async def note() -> None:
        while chunk := await stream.read(65_536):
            parser.feed(chunk)
            while parser.gets() is not False:
                heard_ns.append(time.monotonic_ns())

    async with _running(note()):
        yield
    writer.close()


@asynccontextmanager
async def _running(work: Any) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
