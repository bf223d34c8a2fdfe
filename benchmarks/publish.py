"""How much CPU time a publish costs the client, when 64 callers share one Publisher.

Ours are 64 tasks that each await `publisher.publish(Keys(…))` again and again: each publish is checked, gets an id and
a receipt, has a timeout, and is logged. The peer is redis-py's pipeline, which sends 64 `PUBLISH` of frames of the same
form in one write and awaits their replies together. Both make an invalidation for each message. They take turns in one
process; a round is 6,400 messages each.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio import Redis

from benchmarks.harness import Effort, Limit, Row, compare
from broadcache.publisher import Publisher
from broadcache.shared.invalidation import Keys, invalidation_of
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.names import names_of
from broadcache.shared.wire import encode

CALLERS = 64
_NAMESPACE = "products"


def run(effort: Effort) -> list[Row]:
    messages = effort.pick(full=6_400, quick=640)
    rounds = effort.pick(full=9, quick=2)
    with EmbeddedServer() as server:
        ours, peer = asyncio.run(_take_turns(server.url, messages, rounds))
    what = f"publish, {CALLERS} callers of one Publisher"
    return [compare(what, ours, "redis-py's pipelined PUBLISH", peer, unit="/s", limit=Limit("≥", 0.7))]


async def _take_turns(url: str, messages: int, rounds: int) -> tuple[list[float], list[float]]:
    figures: tuple[list[float], list[float]] = ([], [])
    async with Publisher(url) as publisher, Redis.from_url(url) as redis:

        async def publish() -> None:
            for _ in range(messages // CALLERS):
                await publisher.publish(Keys("product:42"), namespace=_NAMESPACE, reason="price change")

        async def publish_all() -> None:
            await asyncio.gather(*[publish() for _ in range(CALLERS)])

        async def publish_pipelined() -> None:
            channel = names_of(_NAMESPACE).channel
            for _ in range(messages // CALLERS):
                pipeline: Any = redis.pipeline(transaction=False)
                for _ in range(CALLERS):
                    invalidation = invalidation_of([Keys("product:42")], namespace=_NAMESPACE, reason="price change")
                    pipeline.execute_command("PUBLISH", channel, encode(invalidation))
                await pipeline.execute()

        contestants: tuple[Callable[[], Awaitable[None]], ...] = (publish_all, publish_pipelined)
        for number in range(rounds + 1):
            for place in ((0, 1), (1, 0))[number % 2]:
                began = time.process_time()
                await contestants[place]()
                if number:  # the first warms up
                    figures[place].append(messages / (time.process_time() - began))
    return figures
