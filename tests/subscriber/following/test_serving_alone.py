"""A cache that serves while incoherent does so only where publishers expect its replica, or know of none."""

import asyncio
import logging
import threading
from typing import Any

import pytest
from tests.support.registry import make_registry_old
from tests.support.replicas import FAST, fill, new_cache
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import until

from broadcache.publisher import Confirm, Publisher
from broadcache.shared import Keys
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.subscriber import LocalCache, Subscriber

pytestmark = pytest.mark.anyio

KEY = "product:42"
BRIEF: dict[str, Any] = {"max_staleness_seconds": 0.6}
AWAY = "redis://127.0.0.1:1"


async def is_complete(url: str) -> bool:
    """Whether a confirmation of the invalidation of KEY says that no replica serves it any more."""
    async with Publisher(url) as publisher:
        receipt = await publisher.publish(Keys(KEY), namespace="products", confirm=Confirm(timeout_seconds=5.0))
    assert receipt.confirmation is not None
    return receipt.confirmation.is_complete


@pytest.mark.parametrize("how", ["close", "detach", "thread", "cancelled"])
async def test_a_replica_that_has_left_serves_nothing(redis_url: str, how: str) -> None:
    leaving, staying = new_cache(when_incoherent="serve"), new_cache()
    subscriber = Subscriber(redis_url, caches={"products": leaving, "users": new_cache()}, **FAST)
    async with Subscriber(redis_url, caches={"products": staying}, **FAST):
        if how == "thread":
            with subscriber:
                fill(leaving, KEY)
                assert leaving.get(KEY) == "old"
        else:
            await subscriber.__aenter__()
            fill(leaving, KEY)
            assert leaving.get(KEY) == "old"
            if how == "detach":
                await subscriber.detach("products")
            elif how == "cancelled":
                # As `asyncio.run` does with the tasks that it finds at its end.
                name = f"broadcache subscriber {subscriber.replica_id}"
                [main] = [each for each in asyncio.all_tasks() if each.get_name() == name]
                main.cancel()
                await asyncio.wait([main])
            else:
                await subscriber.close()
        await make_registry_old(redis_url)
        assert await is_complete(redis_url)
        assert leaving.get(KEY) is None
        leaving.when_incoherent = "serve"
        assert leaving.get(KEY) is None
        await subscriber.close()


def test_a_subscriber_whose_thread_cannot_start_has_not_started(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread_is_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    cache = new_cache(when_incoherent="serve")
    subscriber = Subscriber(redis_url, caches={"products": cache}, **FAST)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread_is_left)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            subscriber.__enter__()
    assert not subscriber.is_running
    cache[KEY] = "old"
    assert cache.get(KEY) is None
    with subscriber:
        fill(cache, KEY)
        assert cache.get(KEY) == "old"


async def test_what_was_stored_before_it_left_is_not_served_by_its_next_start() -> None:
    cache = new_cache(when_incoherent="serve")
    subscriber = Subscriber(AWAY, caches={"products": cache}, start_timeout_seconds=0)
    async with subscriber:
        fill(cache, KEY)
        assert cache.get(KEY) == "old"  # no publisher has ever heard of it
    async with subscriber:
        assert cache.get(KEY) is None
        fill(cache, KEY)
        assert cache.get(KEY) == "old"


async def test_a_change_to_serve_has_no_effect_while_publishers_rely_on_the_opposite(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    cache = new_cache(**BRIEF)
    async with (
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        Subscriber(own_server.url, caches={"products": new_cache()}, **FAST),
        Subscriber(proxy.url, caches={"products": cache}, **FAST) as subscriber,
        Publisher(own_server.url) as publisher,
    ):
        await make_registry_old(own_server.url)
        fill(cache, KEY)
        await proxy.refuse()
        await proxy.cut()
        await until(lambda: not cache.is_coherent)
        with caplog.at_level(logging.WARNING, "broadcache.subscriber"):
            cache.when_incoherent = "serve"
        assert "has an effect once Redis is reached" in caplog.text
        await until(lambda: _is_silent(publisher, subscriber.replica_id))
        assert await is_complete(own_server.url)
        assert cache.get(KEY) is None
        # Once it is registered, it is missing while it serves.
        await proxy.accept()
        await until(lambda: cache.is_coherent and not cache.upkeep.is_listed_as_bypass)
        fill(cache, KEY)
        await proxy.refuse()
        await proxy.cut()
        await until(lambda: not cache.is_coherent)
        assert cache.get(KEY) == "old"
        receipt = await publisher.publish(Keys(KEY), namespace="products", confirm=Confirm(timeout_seconds=0.3))
        assert receipt.confirmation is not None
        assert receipt.confirmation.missing == (subscriber.replica_id,)


async def _is_silent(publisher: Publisher, replica: str) -> bool:
    return any(each.is_silent for each in await publisher.replicas("products") if each.replica == replica)


def test_a_cache_of_no_subscriber_serves_as_it_is_told() -> None:
    cache: LocalCache = new_cache(when_incoherent="serve")
    fill(cache, KEY)
    assert cache.get(KEY) == "old"
