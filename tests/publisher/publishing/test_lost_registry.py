"""A registry that Redis loses: replicas that were cut off before may serve, and do not register again."""

from typing import Any

import pytest
from tests.publisher.publishing.test_silent_replicas import PATIENT, confirmed, cut_off, is_silent
from tests.support.child_replica import KEY
from tests.support.redis_probe import redis_probe
from tests.support.waiting import until

from broadcache.publisher import Publisher
from broadcache.shared import Keys
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.names import names_of
from broadcache.shared.transport.redis.registry import Registries, Registry

pytestmark = pytest.mark.anyio

NAMES = names_of("products")


async def lose_registry(url: str) -> None:
    """Lose it, and have the replicas that are connected make another one, which counts as old."""
    async with redis_probe(url) as probe:
        assert await probe.call("DEL", NAMES.registry) == 1

        async def is_there() -> Any:
            return await probe.call("ZSCORE", NAMES.registry, "stays")

        await until(is_there)
        assert await probe.call("ZREMRANGEBYSCORE", NAMES.registry, "9e15", "+inf") == 1
        assert await probe.call("ZADD", NAMES.registry, "9e15", " since=7") == 1


async def test_a_replica_that_may_serve_is_doubted_until_it_comes_back_or_is_forgotten(
    own_server: EmbeddedServer,
) -> None:
    async with Publisher(own_server.url) as publisher, cut_off(own_server, when_incoherent="serve") as (proxy, cache):
        assert (await confirmed(publisher)).confirmed == ("cut", "stays")
        cache.store(cache.begin_load(KEY), "old")
        proxy.black_hole()
        await lose_registry(own_server.url)
        confirmation = await confirmed(publisher)
        assert cache.get(KEY) == "old"
        assert (confirmation.confirmed, confirmation.is_complete) == (("stays",), False)
        assert "was lost, and cut has not registered again: it may serve old values" in (confirmation.doubt or "")
        # The negative control: a publisher that has not seen the registry before cannot know.
        async with Publisher(own_server.url) as fresh:
            assert (await confirmed(fresh)).is_complete
        assert await publisher.forget_replica("cut", "products") == "forgotten"
        assert (await confirmed(publisher)).is_complete
        assert await publisher.forget_replica("cut", "products") == "unknown"


async def test_a_replica_that_registers_again_or_serves_nothing_is_not_doubted(own_server: EmbeddedServer) -> None:
    async with Publisher(own_server.url) as publisher, cut_off(own_server) as (proxy, _):
        assert (await confirmed(publisher)).is_complete
        proxy.black_hole()
        await until(is_silent(publisher, "cut"))
        await lose_registry(own_server.url)
        receipt = await publisher.publish(Keys(KEY), namespace="products", confirm=PATIENT)
        assert receipt.confirmation is not None
        assert (receipt.confirmation.confirmed, receipt.confirmation.doubt) == (("stays",), None)


def test_after_a_day_there_is_no_doubt() -> None:
    now = [0.0]
    registries = Registries(clock=lambda: now[0])
    empty: dict[str, Any] = {"namespace": "p", "is_there": True, "age_ms": 10**9, "lease_ms": 1}
    before = Registry(**empty, left_ms={"a": 5, "b": 5}, born_at_ms=1, serving={"a"})
    after = Registry(**empty, left_ms={"b": 5}, born_at_ms=2)
    assert registries._lost(before, None) == []
    assert registries._lost(after, before) == ["a"]
    assert registries._lost(after, after) == ["a"]
    now[0] = 86_399.0
    assert registries._lost(after, after) == ["a"]
    now[0] = 86_401.0
    assert registries._lost(after, after) == []
