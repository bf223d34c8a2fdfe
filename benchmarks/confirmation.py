"""The cost of confirmation: a publish that waits until 1, 10 and 100 replicas have applied it.

One process holds the replicas, Subscribers with a cache each and echoes that never come due; another publishes, one
message at a time. Ours is `await publisher.publish(..., confirm=Confirm())`, from before the call until it returns with
every replica's report; the peer is a plain publish, from before the call until the last replica has applied it, by the
system's monotonic clock that both processes share. They take turns, message by message. A round is 100 messages each.

The difference is the way back: a report from each replica to the server, and from there to the publisher. Messages are
the `PUBLISH` commands that the server has executed, including those within scripts.
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

from cachetools import TTLCache
from redis.asyncio import Redis

from benchmarks.harness import Effort, Limit, Measure, Row, answer, child, compare, run_async
from broadcache.publisher import Confirm, Publisher
from broadcache.shared.invalidation import Invalidation, Keys
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.names import names_of
from broadcache.subscriber import LocalCache, Subscriber

REPLICAS: Final = (1, 10, 100)
_PEER: Final = "plain publish → last applied"
_NAMESPACE: Final = "products"
_WARM_UP_MESSAGES: Final = 10
_CONNECTS_AT_ONCE: Final = 10
_NEVER_SECONDS: Final = 3_600.0
_PATIENCE: Final = Confirm(timeout_seconds=30.0)


class Taken(NamedTuple):
    """The measurements of one round's messages.

    Units: `latency_ms` has a figure for each message, `messages` is how many a publish caused, on average.
    """

    latency_ms: list[float]
    messages: float


def run(effort: Effort) -> list[Row]:
    rounds = effort.pick(full=5, quick=1)
    messages = effort.pick(full=100, quick=10)
    rows: list[Row] = []
    for replicas in REPLICAS:
        with EmbeddedServer() as server, child(partial(run_async, listen), server.url, replicas) as pipe:
            answer(pipe)
            confirmed, plain = asyncio.run(_take_turns(server.url, pipe, rounds, messages))
        rows += _rows_of(replicas, confirmed, plain)
    return rows


def _rows_of(replicas: int, confirmed: Sequence[Taken], plain: Sequence[Taken]) -> list[Row]:
    def row(
        what: str, figure: Callable[[Taken], float], unit: str, measure: Measure, limit: Limit | None = None
    ) -> Row:
        ours, theirs = ([figure(each) for each in taken] for taken in (confirmed, plain))
        what = f"confirmed by {replicas}, {what}"
        return compare(what, ours, _PEER, theirs, unit=unit, measure=measure, limit=limit)

    limit = Limit("≤", 2.5) if replicas == REPLICAS[-1] else None

    return [
        row("p50", lambda each: statistics.median(each.latency_ms), "ms", "wall", limit),
        row("p99", lambda each: _percentile(each.latency_ms, 99), "ms", "wall"),
        row("messages", lambda each: each.messages, "", "count"),
    ]


def _percentile(figures: Sequence[float], percentile: int) -> float:
    return statistics.quantiles(figures, n=100, method="inclusive")[percentile - 1]


async def _take_turns(url: str, pipe: Connection, rounds: int, messages: int) -> tuple[list[Taken], list[Taken]]:
    async with Publisher(url) as publisher, Redis.from_url(url) as redis:
        publish = partial(publisher.publish, Keys("product:42"), namespace=_NAMESPACE, reason="price change")
        contestants: tuple[Callable[[], Awaitable[float]], ...] = (
            partial(_confirmed_ms, partial(publish, confirm=_PATIENCE), pipe),
            partial(_applied_ms, publish, pipe),
        )
        taken: tuple[list[Taken], list[Taken]] = ([], [])
        await _make_registry_old(redis)
        for number in range(rounds + 1):
            count = messages if number else _WARM_UP_MESSAGES
            latency_ms: tuple[list[float], list[float]] = ([], [])
            sent = [0, 0]
            for _ in range(count):
                for place, contestant in enumerate(contestants):
                    before = await _published(redis)
                    latency_ms[place].append(await contestant())
                    sent[place] += await _published(redis) - before
            if number:
                for place in (0, 1):
                    taken[place].append(Taken(latency_ms[place], sent[place] / count))
    return taken


async def _make_registry_old(redis: Any) -> None:
    """Make the registry old: no confirmation is complete while the registry is new."""
    registry = names_of(_NAMESPACE).registry
    await redis.execute_command("ZREMRANGEBYSCORE", registry, "9e15", "+inf")
    await redis.execute_command("ZADD", registry, "9e15", " since=0")


async def _confirmed_ms(publish: Callable[[], Awaitable[Any]], pipe: Connection) -> float:
    """Publish one message; return after how many milliseconds every replica was known to have applied it."""
    began_ns = time.monotonic_ns()
    receipt = await publish()
    ended_ns = time.monotonic_ns()
    if receipt.confirmation is None or not receipt.confirmation.is_complete:
        raise RuntimeError(f"expected every replica to confirm, got {receipt}")
    answer(pipe)
    return (ended_ns - began_ns) / 1_000_000


async def _applied_ms(publish: Callable[[], Awaitable[Any]], pipe: Connection) -> float:
    """Publish one message; return after how many milliseconds the last replica had applied it."""
    began_ns = time.monotonic_ns()
    await publish()
    applied_ns: int = answer(pipe)
    return (applied_ns - began_ns) / 1_000_000


async def _published(redis: Redis) -> int:
    info: Any = await redis.info("commandstats")
    return int(info.get("cmdstat_publish", {"calls": 0})["calls"])


async def listen(pipe: Connection, url: str, replicas: int) -> None:
    """Hold the replicas; send when the last of them has applied each message."""
    missing = replicas

    def note() -> None:
        nonlocal missing
        missing -= 1
        if not missing:
            missing = replicas
            pipe.send(time.monotonic_ns())

    async with AsyncExitStack() as stack:
        for first in range(0, replicas, _CONNECTS_AT_ONCE):
            together = range(first, min(first + _CONNECTS_AT_ONCE, replicas))
            await asyncio.gather(*[stack.enter_async_context(_subscriber(url, note)) for _ in together])
        pipe.send("ready")
        with suppress(EOFError):
            await asyncio.get_running_loop().run_in_executor(None, pipe.recv)


class _NotingCache(LocalCache):
    """Calls when an invalidation has been applied."""

    def __init__(self, on_applied: Callable[[], None]) -> None:
        super().__init__(TTLCache(maxsize=100, ttl=300), max_staleness_seconds=2 * _NEVER_SECONDS)
        self._on_applied = on_applied

    def apply_invalidation(self, invalidation: Invalidation, *, reason: str = "invalidation") -> None:
        super().apply_invalidation(invalidation, reason=reason)
        if invalidation.id:  # not the clear with which a subscription begins
            self._on_applied()


def _subscriber(url: str, on_applied: Callable[[], None]) -> Subscriber:
    return Subscriber(
        url,
        caches={_NAMESPACE: _NotingCache(on_applied)},
        echo_interval_seconds=_NEVER_SECONDS,
        echo_timeout_seconds=_NEVER_SECONDS,
        start_timeout_seconds=60.0,
    )
