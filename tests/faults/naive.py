"""The negative controls: the usual hand-written code. redis-py's PubSub in a loop, dropping keys from a TTLCache."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import urlsplit

from cachetools import TTLCache
from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MovedError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from tests.support.topologies import FROZEN_SECONDS, asked, slot_of

from broadcache.shared.errors import MalformedFrame
from broadcache.shared.wire import decode

RETRY_SECONDS = 0.01
# In a cluster also MOVED, which is the answer of a server that the slot has left.
_LOST: Final = (RedisConnectionError, RedisTimeoutError, MovedError)


@asynccontextmanager
async def listening(
    url: str, channel: str, namespace: str, cache: TTLCache[str, int], *, clears_on_reconnect: bool
) -> AsyncIterator[None]:
    """Drop from `cache` what is published on `channel`, as long as the block lasts. Nothing that is missed is noticed.

    With `clears_on_reconnect` everything is dropped whenever a subscription is confirmed, as the careful ones do.
    """
    subscription = await _Subscription.begin(url, channel, namespace)

    async def listen() -> None:
        while True:
            with contextlib.suppress(*_LOST):
                async for message in subscription.pubsub.listen():
                    if message["type"] in {"message", "smessage"}:
                        _drop(cache, message["data"], namespace)
                    elif clears_on_reconnect and message["type"] in {"subscribe", "ssubscribe"}:
                        cache.clear()
            await asyncio.sleep(RETRY_SECONDS)
            with contextlib.suppress(*_LOST):
                await subscription.renew()

    task = asyncio.create_task(listen())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        await subscription.end()


class _Subscription:
    """A PubSub, and its renewal where redis-py's PubSub does not do it: in a cluster, where the slot may have moved."""

    def __init__(self, url: str, channel: str, namespace: str) -> None:
        self._url = url
        self._channel = channel
        self._slot = slot_of(namespace)
        self._is_of_cluster = urlsplit(url).scheme == "redis+cluster"
        self._client: Redis
        self.pubsub: Any

    @classmethod
    async def begin(cls, url: str, channel: str, namespace: str) -> "_Subscription":
        self = cls(url, channel, namespace)
        await self._subscribe()
        return self

    async def renew(self) -> None:
        if self._is_of_cluster:
            await self.end()
            await self._subscribe()

    async def end(self) -> None:
        await self.pubsub.aclose()
        await self._client.aclose()

    async def _subscribe(self) -> None:
        is_sharded = False
        if self._is_of_cluster:
            port, is_sharded = await asyncio.to_thread(_primary_of, self._url, self._slot)
            self._client = Redis(host="127.0.0.1", port=port)
        elif urlsplit(self._url).scheme == "redis+sentinel":
            self._client = _client_of_sentinels(self._url)
        else:
            self._client = Redis.from_url(self._url)
        self.pubsub = self._client.pubsub()
        await (self.pubsub.ssubscribe if is_sharded else self.pubsub.subscribe)(self._channel)


def _client_of_sentinels(url: str) -> Redis:
    hosts, _, service = url.removeprefix("redis+sentinel://").partition("/")
    sentinels = [(host, int(port)) for host, _, port in (each.partition(":") for each in hosts.split(","))]
    client: Redis = Sentinel(sentinels, socket_timeout=FROZEN_SECONDS).master_for(service, socket_timeout=None)
    return client


def _primary_of(url: str, slot: int) -> tuple[int, bool]:
    """Return the port of the slot's primary, and whether channels are sharded there. Raises: RedisConnectionError."""
    for host in url.removeprefix("redis+cluster://").split(","):
        seed = int(host.partition(":")[2])
        with contextlib.suppress(RedisError):
            version = asked(seed, "INFO", "server", timeout_seconds=FROZEN_SECONDS).partition(b"redis_version:")[2]
            for first, last, (_, port, *_), *_ in asked(seed, "CLUSTER", "SLOTS", timeout_seconds=FROZEN_SECONDS):
                if first <= slot <= last:
                    return port, int(version.partition(b".")[0]) >= 7
    raise RedisConnectionError(f"expected a server of the cluster to name the primary of slot {slot}")


def _drop(cache: TTLCache[str, int], frame: bytes, namespace: str) -> None:
    try:
        invalidation = decode(frame, namespace)
    except MalformedFrame:
        return
    for name in (*invalidation.keys, *invalidation.prefixes):
        cache.pop(name, None)
    for tag in invalidation.tags:
        # Each key has a tag of its own here, with its number.
        cache.pop(tag.replace("page:", "product:"), None)
