"""Reads that are bypassed because no subscriber was ever started say so, once for each cache."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
from cachetools import TTLCache
from fastapi import FastAPI
from fastapi.testclient import TestClient

from broadcache.subscriber import CacheInvalidationMixin, LocalCache, Subscriber

READS: dict[str, Callable[[LocalCache], object]] = {
    "get": lambda cache: cache.get("key"),
    "get_or_load_sync": lambda cache: cache.get_or_load_sync("key", lambda: 1),
    "in": lambda cache: "key" in cache,
    "len": len,
    "items": lambda cache: list(cache.items()),
    "pop": lambda cache: cache.pop("key", None),
}


class Catalogue(CacheInvalidationMixin):
    namespace = "products"


def new_cache() -> LocalCache:
    return LocalCache(TTLCache(maxsize=10, ttl=60))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_cache_without_a_subscriber_warns_once(
    read: Callable[[LocalCache], object], caplog: pytest.LogCaptureFixture
) -> None:
    for cache in (new_cache(), new_cache()):
        for _ in range(1_000):
            read(cache)
    assert len(warnings(caplog)) == 2
    assert "no subscriber was ever started for it" in warnings(caplog)[0]


def test_a_subscriber_that_is_not_started_is_named_by_its_namespace(caplog: pytest.LogCaptureFixture) -> None:
    names, prices = new_cache(), new_cache()
    Subscriber("redis://127.0.0.1:1", caches={"names": names, "prices": prices})
    for _ in range(1_000):
        names.get("key")
        prices.get("key")
    assert [line.partition(" is bypassed")[0] for line in warnings(caplog)] == [
        "the cache of namespace names",
        "the cache of namespace prices",
    ]


def test_one_that_would_serve_without_a_subscriber_warns_too(caplog: pytest.LogCaptureFixture) -> None:
    cache = LocalCache(TTLCache(maxsize=10, ttl=60), when_incoherent="serve")
    Subscriber("redis://127.0.0.1:1", caches={"prices": cache})
    for _ in range(1_000):
        cache.get_or_load_sync("key", lambda: 1)
    assert cache.stats().hits == 999
    [warning] = warnings(caplog)
    assert "the cache of namespace prices" in warning
    assert "with when_incoherent='serve' it serves what no publisher can invalidate" in warning


def test_a_lifespan_that_does_not_run_is_the_likely_cause(caplog: pytest.LogCaptureFixture) -> None:
    catalogue = Catalogue("redis://127.0.0.1:1", cache=TTLCache[str, Any](maxsize=10, ttl=60))
    mounted = FastAPI(lifespan=catalogue.lifespan)

    @mounted.get("/")
    def read() -> int:
        return catalogue.get_or_load_sync("key", lambda: 1)

    app = FastAPI()
    app.mount("/products", mounted)
    with TestClient(app) as client:
        for _ in range(10):
            assert client.get("/products/").json() == 1
    [warning] = warnings(caplog)
    assert "a lifespan that runs: that of a mounted application does not" in warning


def test_a_subscriber_that_was_started_is_no_reason_to_warn(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = new_cache()
    with Subscriber(redis_url, caches={"products": cache}):
        cache.get("key")
    cache.get("key")  # after the end, too: the subscriber has been there
    assert warnings(caplog) == []
