"""A mapping belongs to one cache: what one of two stored, the other would serve after its invalidation."""

import gc
from typing import Any

import pytest
from cachetools import TTLCache
from tests.support.replicas import FAST, fill
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import until

from broadcache.publisher import Publisher
from broadcache.shared import InvalidSettings, Keys
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.subscriber import CacheInvalidationMixin, LocalCache, Subscriber
from broadcache.subscriber.cache import local_cache


class OfAClass(CacheInvalidationMixin):
    """As it is easily written: all instances share the mapping."""

    entries: Any = TTLCache(maxsize=10, ttl=60)

    def __init__(self) -> None:
        super().__init__("redis://127.0.0.1:1", cache=self.entries)


def test_a_mapping_of_another_cache_is_refused() -> None:
    mapping: dict[str, Any] = {}
    cache = LocalCache(mapping, when_incoherent="serve")
    with pytest.raises(InvalidSettings, match="a mapping of its own for each LocalCache, got a dict"):
        LocalCache(mapping)
    fill(cache, "key")
    assert cache.get("key") == "old"  # the first is as it was
    first = OfAClass()
    with pytest.raises(InvalidSettings, match="got a TTLCache that another one has"):
        OfAClass()
    assert first.cache.wraps(OfAClass.entries)
    assert LocalCache({}).get("key") is None  # equal, but another mapping


def test_a_mapping_whose_cache_is_gone_can_be_given_to_another() -> None:
    mapping: dict[str, Any] = {}
    gc.disable()
    try:
        LocalCache(mapping)
        LocalCache(mapping)
    finally:
        gc.enable()


@pytest.mark.anyio
async def test_without_the_rule_a_coherent_cache_would_serve_what_was_invalidated(
    own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_cache, "claim_mapping", lambda *_: None)
    mapping: dict[str, Any] = {}
    one, other = LocalCache(mapping), LocalCache(mapping)
    async with (
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        Subscriber(proxy.url, caches={"products": one}, **FAST),
        Subscriber(own_server.url, caches={"users": other}, **FAST),
        Publisher(own_server.url) as publisher,
    ):
        fill(one, "key")
        await proxy.refuse()
        await proxy.cut()
        await publisher.publish(Keys("key"), namespace="products")
        await until(lambda: not one.is_coherent)
        assert (one.get("key"), other.get("key"), other.is_coherent) == (None, "old", True)
