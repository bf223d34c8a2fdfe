"""What a publish costs code without an event loop: one `SyncPublisher`, beside a new event loop for each call.

Three contestants take turns on one server: a `SyncPublisher` that is kept, `asyncio.run` of a new `Publisher` for each
call, as code without one writes it first, and the floor: a `PUBLISH` of redis-py's blocking client, which logs nothing.
A figure is the wall time of one call, the mean of a round.
"""

import asyncio
import time
from collections.abc import Callable

from redis import Redis

from benchmarks.harness import Effort, Limit, Row, compare, take_turns
from broadcache.publisher import Publisher, SyncPublisher
from broadcache.shared.invalidation import Keys, invalidation_of
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.wire import encode

_NAMESPACE = "products"


def run(effort: Effort) -> list[Row]:
    calls = effort.pick(full=200, quick=10)
    rounds = effort.pick(full=10, quick=2)
    with EmbeddedServer() as server, SyncPublisher(server.url) as publisher, Redis.from_url(server.url) as redis:
        figures = take_turns(
            {
                "ours": _mean(lambda: publisher.publish(Keys("product:42"), namespace=_NAMESPACE), calls),
                "asyncio.run": _mean(lambda: asyncio.run(_publish_once(server.url)), calls),
                "PUBLISH": _mean(lambda: redis.publish(_NAMESPACE, _frame()), calls),
            },
            rounds,
        )

    def row(peer_name: str, peer: str, limit: Limit | None = None) -> Row:
        return compare(
            "SyncPublisher.publish",
            figures["ours"],
            peer_name,
            figures[peer],
            unit="µs",
            measure="wall",
            limit=limit,
        )

    return [row("asyncio.run(publish)", "asyncio.run", Limit("≤", 0.25)), row("redis.publish, unlogged", "PUBLISH")]


def _mean(call: Callable[[], object], calls: int) -> Callable[[], float]:
    def measure() -> float:
        began_ns = time.perf_counter_ns()
        for _ in range(calls):
            call()
        return (time.perf_counter_ns() - began_ns) / calls / 1_000

    return measure


def _frame() -> bytes:
    return encode(invalidation_of([Keys("product:42")], namespace=_NAMESPACE))


async def _publish_once(url: str) -> None:
    async with Publisher(url) as publisher:
        await publisher.publish(Keys("product:42"), namespace=_NAMESPACE)
