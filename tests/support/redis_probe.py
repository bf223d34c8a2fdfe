"""Asks a server what it holds, past everything that is under test."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from broadcache.shared.transport.redis.link import Link, OnMessage, RedisAddress


@asynccontextmanager
async def redis_probe(url: str, *, on_message: OnMessage | None = None) -> AsyncIterator[Link]:
    """A connection of the test's own: `await probe.call("XLEN", …)`."""
    link = await Link.open(RedisAddress(url), client_name="test", timeout_seconds=10, on_message=on_message)
    try:
        yield link
    finally:
        await link.close()
