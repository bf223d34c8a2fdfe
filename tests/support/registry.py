"""The registry of replicas, made older than it is: a fresh one is a reason to doubt confirmations."""

from typing import Final

from redis import Redis
from tests.support.redis_probe import redis_probe

from broadcache.shared.transport.redis.names import names_of

__all__ = ["make_registry_old", "make_registry_old_sync"]

_NEVER_MS: Final = "9e15"
"""The score of the member that tells since when the registry exists."""
_LONG_AGO: Final = " since=0"


async def make_registry_old(url: str, namespace: str = "products") -> None:
    """Rewrite since when the registry of `namespace` exists: since long ago. There has to be one."""
    registry = names_of(namespace).registry
    async with redis_probe(url) as probe:
        assert await probe.call("ZREMRANGEBYSCORE", registry, _NEVER_MS, "+inf") == 1
        assert await probe.call("ZADD", registry, _NEVER_MS, _LONG_AGO) == 1


def make_registry_old_sync(url: str, namespace: str = "products") -> None:
    """The same, without an event loop."""
    registry = names_of(namespace).registry
    with Redis.from_url(url, protocol=2) as client:
        assert client.execute_command("ZREMRANGEBYSCORE", registry, _NEVER_MS, "+inf") == 1
        assert client.execute_command("ZADD", registry, _NEVER_MS, _LONG_AGO) == 1
