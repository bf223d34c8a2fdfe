"""The negative controls: what everybody writes. redis-py's PubSub in a loop, dropping keys from a TTLCache."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cachetools import TTLCache
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from broadcache.shared.wire import decode

RETRY_SECONDS = 0.01


@asynccontextmanager
async def listening(
    url: str, channel: str, namespace: str, cache: TTLCache[str, int], *, clears_on_reconnect: bool
) -> AsyncIterator[None]:
    """Drop from `cache` what is published on `channel`, as long as the block lasts. Nothing that is missed is noticed.

    With `clears_on_reconnect` everything is dropped whenever a subscription is confirmed, as the careful ones do.
    """
    client = Redis.from_url(url)
    pubsub = client.pubsub()
    await pubsub.subscribe(channel)

    async def listen() -> None:
        while True:
            with contextlib.suppress(RedisConnectionError, RedisTimeoutError):
                async for message in pubsub.listen():
                    if message["type"] == "message":
                        _drop(cache, message["data"], namespace)
                    elif clears_on_reconnect:
                        cache.clear()
            await asyncio.sleep(RETRY_SECONDS)

    task = asyncio.create_task(listen())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        await pubsub.aclose()
        await client.aclose()


def _drop(cache: TTLCache[str, int], frame: bytes, namespace: str) -> None:
    invalidation = decode(frame, namespace)
    for name in (*invalidation.keys, *invalidation.prefixes):
        cache.pop(name, None)
    for tag in invalidation.tags:
        # Each key has a tag of its own here, with its number.
        cache.pop(tag.replace("page:", "product:"), None)
