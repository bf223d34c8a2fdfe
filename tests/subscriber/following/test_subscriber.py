"""The subscriber against a real server: it drops what it is told, and serves nothing while it cannot be told.

Faults that the promise is about come with a negative control: the same fault with redis-py's own PubSub, which leaves
a stale value in a plain TTLCache.
"""

import asyncio
import contextlib
import gc
import itertools
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from cachetools import TTLCache
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from tests.support.receipts import position_of
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import until

from broadcache.publisher import Publisher
from broadcache.shared import (
    Everything,
    Invalidation,
    InvalidNamespace,
    InvalidSettings,
    Keys,
    LinkLost,
    Position,
    Prefixes,
    Receipt,
    Tags,
    Target,
)
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.log import Heads, echo
from broadcache.shared.wire import encode
from broadcache.subscriber import LocalCache, State, Subscriber
from broadcache.subscriber.following import follower

pytestmark = pytest.mark.anyio

FAST: dict[str, Any] = {"echo_interval_seconds": 0.05, "echo_timeout_seconds": 0.3, "backoff_seconds_max": 0.1}


def new_cache(**options: Any) -> LocalCache:
    return LocalCache(TTLCache(maxsize=10_000, ttl=600), **options)


def fill(cache: LocalCache, **values: object) -> None:
    for key, value in values.items():
        assert cache.store(cache.begin_load(key), value)


async def reached(subscriber: Subscriber, namespace: str, receipt: Receipt) -> None:
    await until(lambda: subscriber.position(namespace) == receipt.position, f"position {receipt.position}")


@asynccontextmanager
async def naive_replica(url: str, channel: str) -> AsyncIterator[tuple[TTLCache[str, Any], Redis]]:
    """What everybody writes: redis-py's PubSub in a loop, dropping keys from a TTLCache."""
    cache: TTLCache[str, Any] = TTLCache(maxsize=100, ttl=600)
    client = Redis.from_url(url, socket_timeout=1)
    pubsub = client.pubsub()
    await pubsub.subscribe(channel)
    await pubsub.get_message(timeout=5)

    async def listen() -> None:
        while True:
            with contextlib.suppress(RedisConnectionError):
                async for message in pubsub.listen():
                    if message["type"] == "message":
                        cache.pop(message["data"].decode(), None)
            await asyncio.sleep(0.01)

    listening = asyncio.create_task(listen())
    try:
        yield cache, client
    finally:
        listening.cancel()
        await asyncio.wait([listening])
        await pubsub.aclose()
        await client.aclose()


async def test_every_target_drops_what_it_names_on_every_replica(redis_url: str) -> None:
    first, second = new_cache(), new_cache()
    async with (
        Subscriber(redis_url, caches={"products": first}) as one,
        Subscriber(redis_url, caches={"products": second}) as two,
        Publisher(redis_url) as publisher,
    ):
        cases: list[tuple[Target, set[str]]] = [
            (Keys("a:1"), {"a:1"}),
            (Tags("red"), {"a:2", "b:2"}),
            (Prefixes("b:"), {"b:1", "b:2"}),
            (Everything(), {"a:1", "a:2", "b:1", "b:2"}),
        ]
        for target, dropped in cases:
            for cache in (first, second):
                for key in ("a:1", "a:2", "b:1", "b:2"):
                    assert cache.store(cache.begin_load(key), key, tags=("red",) if key.endswith("2") else ())
            receipt = await publisher.publish(target, namespace="products")
            assert receipt.receivers == 2
            for subscriber, cache in ((one, first), (two, second)):
                await reached(subscriber, "products", receipt)
                assert {"a:1", "a:2", "b:1", "b:2"} - set(cache) == dropped


async def test_one_invalidation_may_carry_several_targets(redis_url: str) -> None:
    cache = new_cache()
    async with Subscriber(redis_url, caches={"default": cache}) as subscriber, Publisher(redis_url) as publisher:
        fill(cache, one=1, two=2, three=3)
        assert cache.store(cache.begin_load("four"), 4, tags=("even",))
        receipt = await publisher.publish(Keys("one"), Tags("even"), Prefixes("tw"))
        await reached(subscriber, "default", receipt)
        assert set(cache) == {"three"}


async def test_a_namespace_hears_only_its_own(redis_url: str) -> None:
    products, users = new_cache(), new_cache()
    async with (
        Subscriber(redis_url, caches={"products": products, "users": users}) as subscriber,
        Publisher(redis_url) as publisher,
    ):
        fill(products, same=1)
        fill(users, same=1)
        receipt = await publisher.publish(Keys("same"), namespace="users")
        await reached(subscriber, "users", receipt)
        assert ("same" in products, "same" in users) == (True, False)
        position = subscriber.position("products")
        assert position is not None
        assert position.sequence == 0
        with pytest.raises(InvalidSettings, match="expected one of the namespaces products, users, got 'prodcts'"):
            subscriber.position("prodcts")


async def test_a_new_subscription_begins_at_the_head_of_the_log(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        receipt = await publisher.publish(Keys("before"))
        async with Subscriber(redis_url, caches={"default": new_cache()}) as subscriber:
            assert subscriber.position("default") == receipt.position == Position(position_of(receipt).epoch, 1)


async def test_the_cache_is_bypassed_before_the_start_and_after_the_end(redis_url: str) -> None:
    cache = new_cache()
    subscriber = Subscriber(redis_url, caches={"default": cache})
    assert (subscriber.state, cache.is_coherent) == ("closed", False)
    async with subscriber:
        fill(cache, key="value")
        assert (subscriber.state, cache.is_coherent, cache.get("key")) == ("coherent", True, "value")
    assert (subscriber.state, cache.is_coherent, cache.get("key")) == ("closed", False, None)
    loads = [await cache.get_or_load("key", lambda: "from the source") for _ in range(3)]
    assert loads == ["from the source"] * 3
    assert cache.stats().loads == 3


async def test_a_redis_that_starts_late_is_waited_for(own_server: EmbeddedServer) -> None:
    cache = new_cache()
    own_server.kill()
    async with Subscriber(own_server.url, caches={"default": cache}, start_timeout_seconds=0, **FAST) as subscriber:
        assert (subscriber.state in ("connecting", "lost"), cache.is_coherent) == (True, False)
        assert await cache.get_or_load("key", lambda: 1) == 1
        own_server.restart()
        await until(lambda: subscriber.state == "coherent")
        assert cache.is_coherent


async def test_a_redis_that_never_comes_leaves_the_process_alive_and_bypassing() -> None:
    cache = new_cache()
    async with Subscriber("redis://127.0.0.1:1", caches={"default": cache}, start_timeout_seconds=0, **FAST) as alone:
        await until(lambda: alone.stats().lost >= 3)
        assert await cache.get_or_load("key", lambda: 1) == 1
        assert cache.get("key") is None
        with pytest.raises(LinkLost, match="there is no link to Redis; this replica has dropped its entries"):
            await alone.invalidate(Keys("key"), namespace="default", timeout_seconds=0.05)


async def test_a_restarted_redis_clears_and_is_followed_again(own_server: EmbeddedServer) -> None:
    cache = new_cache()
    async with Subscriber(own_server.url, caches={"default": cache}, **FAST) as subscriber:
        fill(cache, key="old")
        own_server.restart()
        await until(lambda: subscriber.stats().subscriptions == 2)
        assert "key" not in cache
        async with Publisher(own_server.url) as publisher:
            fill(cache, key="new")
            await publisher.publish(Keys("key"))
            await until(lambda: "key" not in cache)


async def test_a_cut_replays_what_was_missed_and_keeps_the_rest(own_server: EmbeddedServer) -> None:
    cache = new_cache()
    async with (
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        Subscriber(proxy.url, caches={"default": cache}, **FAST) as subscriber,
        Publisher(own_server.url) as publisher,
    ):
        await reached(subscriber, "default", await publisher.publish(Keys("first")))
        echoes = subscriber.stats().echoes
        await until(lambda: subscriber.stats().echoes > echoes + 1)  # what is proven now is not read again
        fill(cache, **{f"key {number}": number for number in range(100)})
        await proxy.refuse()
        await proxy.cut()
        receipts = [await publisher.publish(Keys(f"key {number}")) for number in range(3)]
        await proxy.accept()
        await reached(subscriber, "default", receipts[-1])
        await until(lambda: subscriber.state == "coherent")
        assert set(cache) == {f"key {number}" for number in range(3, 100)}
        assert cache.stats().clears == {"subscribed": 1}
        assert subscriber.stats().received == {"applied": 4, "replayed": 3}
        assert subscriber.stats().gaps == 1


async def test_a_killed_connection_loses_nothing(own_server: EmbeddedServer) -> None:
    cache = new_cache()
    async with (
        Subscriber(own_server.url, caches={"default": cache}, **FAST) as subscriber,
        Publisher(own_server.url) as publisher,
        Redis.from_url(own_server.url) as admin,
    ):
        await publisher.publish(Keys("first"))
        fill(cache, key="old")
        await redis_call(admin, "CLIENT", "KILL", "TYPE", "pubsub")
        receipt = await publisher.publish(Keys("key"))
        await reached(subscriber, "default", receipt)
        assert cache.get("key") is None


async def test_ten_killed_connections_among_ten_thousand_messages_lose_nothing(
    own_server: EmbeddedServer,
) -> None:
    messages, kills = 10_000, 10
    cache = ListingCache(TTLCache(maxsize=10, ttl=600))
    async with (
        Subscriber(own_server.url, caches={"default": cache}, replica_id="tested", **FAST) as subscriber,
        Publisher(own_server.url) as publisher,
        Redis.from_url(own_server.url) as admin,
    ):
        first_of_all = await publisher.publish(Keys("first"))
        await reached(subscriber, "default", first_of_all)
        epoch = position_of(first_of_all).epoch
        cache.listed.clear()
        for kill in range(kills):
            numbers = range(kill * messages // kills, (kill + 1) * messages // kills)
            publishing = [asyncio.create_task(publisher.publish(Keys(str(number)))) for number in numbers]
            await subscribed(subscriber, kill + 1)
            await kill_the_replicas_connection(admin)
            await asyncio.gather(*publishing)
        await until(lambda: subscriber.position("default") == (epoch, messages + 1))
        # If the first kill comes before any of them, the log is read from the first of all on, which is applied again.
        assert {sequence for sequence, _ in cache.listed} - {1} == set(range(2, messages + 2))
        assert {key for _, key in cache.listed} - {"first"} == {str(number) for number in range(messages)}
        assert cache.stats().clears == {"subscribed": 1}
        await subscribed(subscriber, kills + 1)
        await until(lambda: subscriber.state == "coherent")
        assert subscriber.stats().received["replayed"] > 0


async def subscribed(subscriber: Subscriber, times: int) -> None:
    await until(lambda: subscriber.stats().subscriptions == times, f"subscription {times}")


class ListingCache(LocalCache):
    """Notes what is applied, in which order."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.listed: list[tuple[int, str]] = []

    def apply_invalidation(self, invalidation: Invalidation, *, reason: str = "invalidation") -> None:
        super().apply_invalidation(invalidation, reason=reason)
        if invalidation.seq is not None:
            self.listed.append((invalidation.seq, invalidation.keys[0]))


async def kill_the_replicas_connection(admin: Redis) -> None:
    [replica] = [client for client in await admin.client_list() if client["name"].startswith("broadcache:tested")]
    await admin.client_kill_filter(_id=replica["id"])


async def test_control_a_killed_connection_leaves_naive_pubsub_stale(own_server: EmbeddedServer) -> None:
    async with naive_replica(own_server.url, "naive") as (cache, client):
        cache["key"] = "old"
        await kill_subscribers_and_publish(client, "naive", "key")
        await publish_until_heard(client, cache)
        assert cache["key"] == "old"  # stale for ever: nobody was told that a message was lost


async def redis_call(client: Redis, *command: str | bytes) -> Any:
    return await client.execute_command(*command)


async def kill_subscribers_and_publish(admin: Redis, channel: str, frame: str) -> None:
    """Lose one message: kill the subscribers' connections and publish, both before any of them can be back."""
    async with admin.pipeline(transaction=True) as both:
        both.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        both.publish(channel, frame)
        killed, receivers = await both.execute()
    assert (killed >= 1, receivers) == (True, 0)


async def publish_until_heard(client: Redis, cache: TTLCache[str, Any]) -> None:
    """Wait until the naive replica, which says nothing of reconnecting, demonstrably hears again."""
    for _ in range(1_000):
        cache["beacon"] = 1
        await client.publish("naive", "beacon")
        for _ in range(10):
            await asyncio.sleep(0.002)
            if "beacon" not in cache:
                return
    raise AssertionError("the naive replica never heard again")


async def test_a_black_holed_link_is_noticed_by_our_own_deadline(own_server: EmbeddedServer) -> None:
    cache = new_cache()
    async with (
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        Subscriber(proxy.url, caches={"default": cache}, connect_timeout_seconds=0.3, **FAST) as subscriber,
        Publisher(own_server.url) as publisher,
    ):
        fill(cache, key="old")
        proxy.black_hole("both")
        await publisher.publish(Keys("key"))
        await until(lambda: subscriber.state != "coherent")
        assert cache.get("key") is None
        proxy.heal()
        await until(lambda: subscriber.state == "coherent")
        assert cache.get("key") is None


async def test_control_a_black_holed_link_leaves_naive_pubsub_stale(own_server: EmbeddedServer) -> None:
    async with (
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        naive_replica(proxy.url, "naive") as (cache, _),
        Redis.from_url(own_server.url) as admin,
    ):
        cache["key"] = "old"
        proxy.black_hole("both")
        await admin.publish("naive", "key")
        await proxy.has_discarded(1)
        # Far beyond the deadline after which the subscriber above has given the link up.
        await asyncio.sleep(1.5)
        assert cache["key"] == "old"


async def test_a_frozen_server_ends_the_lease_and_costs_nothing_else(own_server: EmbeddedServer) -> None:
    cache = new_cache()
    async with (
        Subscriber(own_server.url, caches={"default": cache}, connect_timeout_seconds=0.3, **FAST) as subscriber,
        Publisher(own_server.url) as publisher,
    ):
        await reached(subscriber, "default", await publisher.publish(Keys("first")))
        fill(cache, key="value")
        own_server.pause()
        await until(lambda: subscriber.state != "coherent")
        assert cache.get("key") is None
        own_server.resume()
        await until(lambda: subscriber.state == "coherent")
        assert (cache.get("key"), cache.stats().clears) == ("value", {"subscribed": 1})


async def test_a_log_that_was_lost_while_nobody_listened_clears(own_server: EmbeddedServer) -> None:
    cache = new_cache()
    async with (
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        Subscriber(proxy.url, caches={"default": cache}, **FAST) as subscriber,
        Publisher(own_server.url) as publisher,
        Redis.from_url(own_server.url) as admin,
    ):
        fill(cache, key="old")
        await proxy.refuse()
        await proxy.cut()
        await publisher.publish(Keys("key"))
        await admin.flushall()
        await proxy.accept()
        await until(lambda: subscriber.stats().subscriptions == 2)
        assert (cache.get("key"), cache.stats().clears) == (None, {"subscribed": 1, "log lost": 1})


async def test_a_stalled_event_loop_cannot_serve_past_the_lease(redis_url: str) -> None:
    now = [100.0]

    def clock() -> float:
        return now[0]

    cache = LocalCache(TTLCache(maxsize=10, ttl=600), max_staleness_seconds=2.0, clock=clock)
    async with Subscriber(redis_url, caches={"default": cache}, clock=clock) as subscriber:
        fill(cache, key="value")
        assert cache.get("key") == "value"
        now[0] += 2.0  # time passes, and not one line of the subscriber's runs
        assert cache.get("key") is None
        assert subscriber.state == "lost"
        await until(lambda: cache.is_coherent, "the next proof")
        assert cache.get("key") == "value"


async def test_serve_mode_serves_on_while_disconnected(own_server: EmbeddedServer) -> None:
    cache = new_cache(when_incoherent="serve")
    async with Subscriber(own_server.url, caches={"default": cache}, **FAST) as subscriber:
        fill(cache, key="value")
        own_server.kill()
        await until(lambda: subscriber.state == "lost")
        assert (cache.get("key"), cache.is_coherent) == ("value", False)
        cache.when_incoherent = "bypass"
        assert cache.get("key") is None


async def test_a_hand_made_message_is_applied_at_once_and_counted_as_unsequenced(redis_url: str) -> None:
    cache = new_cache()
    async with Subscriber(redis_url, caches={"products": cache}) as subscriber, Redis.from_url(redis_url) as foreign:
        fill(cache, **{"product:42": 1, "product:43": 1})
        await foreign.publish("cache-invalidation:products", '{"keys":["product:42"]}')
        await until(lambda: subscriber.stats().received.get("unsequenced") == 1)
        assert set(cache) == {"product:43"}


@pytest.mark.parametrize(
    "frame",
    [
        b"now",
        b"",
        b"{",
        b'{"keys":"product:42"}',
        b'{"keys":[]}',
        b'{"v":2,"keys":["a"]}',
        b'{"keys":["a"],"seq":1e999}',
        b'{"keys":["a"],"namespace":"users"}',
        b'{"keys":["a"],"x":' + b"[" * 60_000,
        b"[" * 70_000,
        b"\xff\xfe",
    ],
    ids=lambda frame: frame[:20].decode(errors="replace"),
)
async def test_an_unreadable_message_clears_the_namespace(
    redis_url: str, frame: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache = new_cache()
    async with Subscriber(redis_url, caches={"products": cache}) as subscriber, Redis.from_url(redis_url) as foreign:
        fill(cache, key=1)
        with caplog.at_level(logging.WARNING, logger="broadcache.subscriber"):
            await foreign.publish("cache-invalidation:products", frame)
            await until(lambda: subscriber.stats().received.get("malformed") == 1)
        assert len(cache) == 0
        assert cache.stats().clears == {"subscribed": 1, "malformed": 1}
        assert "cleared namespace products: invalid frame:" in caplog.text
        assert subscriber.state == "coherent"


async def test_a_gap_is_replayed_from_the_log(redis_url: str) -> None:
    cache = new_cache()
    async with (
        Subscriber(redis_url, caches={"default": cache}) as subscriber,
        Publisher(redis_url) as publisher,
        Redis.from_url(redis_url) as admin,
    ):
        first = await publisher.publish(Keys("first"))
        await reached(subscriber, "default", first)
        fill(cache, second=2, third=3, other=4)
        # As if a message had been lost on its way: it is in the log, and nobody hears of it.
        frame = encode(Invalidation(epoch=position_of(first).epoch, seq=2, namespace="default", keys=("second",)))
        await redis_call(admin, "HINCRBY", "{cache-invalidation}:head", "seq", "1")
        await redis_call(admin, "XADD", "{cache-invalidation}:log", "2-0", "f", frame)
        third = await publisher.publish(Keys("third"))
        await reached(subscriber, "default", third)
        assert set(cache) == {"other"}
        assert (subscriber.stats().gaps, cache.stats().clears) == (1, {"subscribed": 1})


async def test_a_message_lost_at_the_tail_is_found_by_the_echo(redis_url: str) -> None:
    cache = new_cache()
    async with (
        Subscriber(redis_url, caches={"default": cache}, **FAST) as subscriber,
        Publisher(redis_url) as publisher,
        Redis.from_url(redis_url) as admin,
    ):
        first = await publisher.publish(Keys("first"))
        await reached(subscriber, "default", first)
        fill(cache, second=2, other=4)
        frame = encode(Invalidation(epoch=position_of(first).epoch, seq=2, namespace="default", keys=("second",)))
        async with admin.pipeline(transaction=True) as both:
            both.execute_command("XADD", "{cache-invalidation}:log", "2-0", "f", frame)
            both.execute_command("HINCRBY", "{cache-invalidation}:head", "seq", "1")
            await both.execute()
        await until(lambda: subscriber.position("default") == Position(position_of(first).epoch, 2))
        assert set(cache) == {"other"}


async def test_a_gap_that_the_log_does_not_hold_any_more_clears(redis_url: str) -> None:
    cache = new_cache()
    async with (
        Subscriber(redis_url, caches={"default": cache}) as subscriber,
        Publisher(redis_url) as publisher,
        Redis.from_url(redis_url) as admin,
    ):
        first = await publisher.publish(Keys("first"))
        await reached(subscriber, "default", first)
        fill(cache, key=1)
        # The sequence moves on, and the log has a hole.
        await redis_call(admin, "HINCRBY", "{cache-invalidation}:head", "seq", "1")
        third = await publisher.publish(Keys("third"))
        await reached(subscriber, "default", third)
        assert len(cache) == 0
        assert cache.stats().clears == {"subscribed": 1, "log trimmed": 1}


async def test_a_position_that_the_log_does_not_have_moves_nothing(redis_url: str) -> None:
    cache = new_cache()
    async with (
        Subscriber(redis_url, caches={"default": cache}) as subscriber,
        Publisher(redis_url) as publisher,
        Redis.from_url(redis_url) as foreign,
    ):
        first = await publisher.publish(Keys("first"))
        await reached(subscriber, "default", first)
        forged = encode(Invalidation(epoch=position_of(first).epoch, seq=10**9, keys=("x",)))
        await foreign.publish("cache-invalidation", forged)
        await until(lambda: subscriber.stats().received.get("unlogged") == 1)
        fill(cache, key=1)
        second = await publisher.publish(Keys("key"))
        await reached(subscriber, "default", second)
        assert (len(cache), cache.stats().clears) == (0, {"subscribed": 1})


async def test_a_flushed_server_begins_a_new_epoch_and_clears(redis_url: str) -> None:
    cache = new_cache()
    async with (
        Subscriber(redis_url, caches={"default": cache}) as subscriber,
        Publisher(redis_url) as publisher,
        Redis.from_url(redis_url) as admin,
    ):
        first = await publisher.publish(Keys("first"))
        await reached(subscriber, "default", first)
        fill(cache, key=1)
        await admin.flushall()
        again = await publisher.publish(Keys("again"))
        assert (position_of(again).sequence, position_of(again).epoch != position_of(first).epoch) == (1, True)
        await reached(subscriber, "default", again)
        assert cache.stats().clears == {"subscribed": 1, "epoch changed": 1}


async def test_a_replica_forgets_its_own_invalidation_at_once_and_when_it_is_accepted(redis_url: str) -> None:
    mine, other = new_cache(), new_cache()
    async with (
        Subscriber(redis_url, caches={"default": mine}) as subscriber,
        Subscriber(redis_url, caches={"default": other}) as elsewhere,
    ):
        fill(mine, key="old")
        fill(other, key="old")
        publishing = asyncio.create_task(subscriber.invalidate(Keys("key"), namespace="default", reason="mine"))
        await asyncio.sleep(0)
        assert "key" not in mine  # before the publish has returned
        fill(mine, key="read before it was accepted, from a source that lags")
        receipt = await publishing
        assert "key" not in mine  # its message has come back before
        fill(mine, key="new")
        await reached(elsewhere, "default", receipt)
        await reached(subscriber, "default", receipt)
        assert (mine.get("key"), other.get("key")) == ("new", None)
        assert subscriber.stats().received == {"applied": 1}


async def test_an_invalidation_survives_a_lost_link_and_is_logged_once(own_server: EmbeddedServer) -> None:
    async with (
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        Subscriber(proxy.url, caches={"default": new_cache()}, connect_timeout_seconds=0.3, **FAST) as subscriber,
        Redis.from_url(own_server.url) as admin,
    ):
        await subscriber.invalidate(Keys("first"), namespace="default")  # from now on the server knows the script
        proxy.black_hole("to_client")  # the server logs it, and its answer never arrives
        publishing = asyncio.create_task(subscriber.invalidate(Keys("key"), namespace="default", timeout_seconds=15))
        await proxy.has_discarded(1)
        await until(lambda: subscriber.state != "coherent")
        proxy.heal()
        receipt = await publishing
        assert (receipt.is_repeat, await redis_call(admin, "XLEN", "{cache-invalidation}:log")) == (True, 2)


async def test_a_flood_leaves_the_event_loop_to_others(redis_url: str) -> None:
    cache = new_cache()
    messages = 20_000
    async with Subscriber(redis_url, caches={"default": cache}) as subscriber, Redis.from_url(redis_url) as foreign:
        turns = 0
        async with foreign.pipeline(transaction=False) as flood:
            for _ in range(messages):
                flood.publish("cache-invalidation", b'{"keys":["key"]}')
            publishing = asyncio.create_task(flood.execute())
            while subscriber.stats().received.get("applied", 0) < messages:
                turns += 1
                await asyncio.sleep(0)
            await publishing
        # At most a slice of 128 messages is applied between two turns of everybody else.
        assert turns >= messages / 128


async def test_a_user_without_the_right_to_subscribe_bypasses_and_says_why(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with Redis.from_url(own_server.url) as admin:
        await admin.acl_setuser("reader", enabled=True, passwords=["+secret"], commands=["+@all"], keys=["*"])
        url = f"redis://reader:secret@127.0.0.1:{own_server.port}"
        with caplog.at_level(logging.WARNING, logger="broadcache"):
            async with Subscriber(url, caches={"default": new_cache()}, start_timeout_seconds=0, **FAST) as refused:
                await until(lambda: refused.stats().lost >= 2)
                assert refused.state != "coherent"
                await admin.acl_setuser(
                    "reader", enabled=True, channels=["cache-invalidation*", "{cache-invalidation*"]
                )
                await until(lambda: refused.state == "coherent")
        assert "to let this user subscribe, got: NOPERM" in caplog.text
        assert "secret" not in caplog.text


async def test_a_wrong_password_bypasses_and_never_shows_it(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"redis://nobody:hunter2@127.0.0.1:{own_server.port}"
    with caplog.at_level(logging.DEBUG, logger="broadcache"):
        async with Subscriber(url, caches={"default": new_cache()}, start_timeout_seconds=0, **FAST) as refused:
            await until(lambda: refused.stats().lost >= 1)
    assert "WRONGPASS" in caplog.text or "invalid username-password" in caplog.text
    assert "hunter2" not in caplog.text + repr(refused)


async def test_a_sync_service_runs_the_subscriber_in_a_thread(redis_url: str) -> None:
    cache = new_cache()

    def serve() -> tuple[Any, ...]:
        with Subscriber(redis_url, caches={"default": cache}) as subscriber:
            while_running = cache.get_or_load_sync("key", lambda: 1), cache.get("key"), subscriber.state
            names = {thread.name for thread in threading.enumerate()}
            told.set()
            dropped.wait()
        return *while_running, "broadcache subscriber" in names, cache.get("key"), subscriber.state

    told, dropped = threading.Event(), threading.Event()
    serving = asyncio.create_task(asyncio.to_thread(serve))
    await asyncio.to_thread(told.wait)
    async with Publisher(redis_url) as publisher:
        await publisher.publish(Keys("key"))
        await until(lambda: cache.stats().dropped == 1)
    dropped.set()
    assert await serving == (1, 1, "coherent", True, None, "closed")
    assert "broadcache subscriber" not in {thread.name for thread in threading.enumerate()}


async def test_whoever_wants_to_know_is_told_each_new_state(own_server: EmbeddedServer) -> None:
    states: list[State] = []
    async with Subscriber(
        own_server.url, caches={"default": new_cache()}, on_state=states.append, **FAST
    ) as subscriber:
        assert states == ["connecting", "recovering", "coherent"]
        own_server.kill()
        await until(lambda: "lost" in states)
        own_server.restart()
        await until(lambda: subscriber.state == "coherent")
    assert (states.count("coherent"), states[-1]) == (2, "closed")
    assert all(one != next_one for one, next_one in itertools.pairwise(states))


async def test_whoever_hears_of_a_state_finds_the_cache_in_it(own_server: EmbeddedServer) -> None:
    cache = new_cache()
    found: list[tuple[State, bool]] = []

    def look(state: State) -> None:
        found.append((state, cache.is_coherent))

    async with Subscriber(own_server.url, caches={"default": cache}, on_state=look, **FAST):
        own_server.kill()
        await until(lambda: any(state == "lost" for state, _ in found))
    assert {(state == "coherent", is_coherent) for state, is_coherent in found} == {(True, True), (False, False)}


async def test_a_failing_on_state_is_logged_and_harms_nobody(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(state: State) -> None:
        raise ValueError("no such thing")

    async with Subscriber(redis_url, caches={"default": new_cache()}, on_state=fail) as subscriber:
        assert subscriber.state == "coherent"
    assert "on_state('coherent') failed" in caplog.text


async def test_closing_is_idempotent_and_the_subscriber_can_live_again(redis_url: str) -> None:
    subscriber = Subscriber(redis_url, caches={"default": new_cache()})
    await subscriber.close()
    states: list[State] = []
    for _ in range(2):
        async with subscriber:
            states.append(subscriber.state)
            with pytest.raises(InvalidSettings, match="entered twice"):
                await subscriber.__aenter__()
        await subscriber.close()
        states.append(subscriber.state)
    assert states == ["coherent", "closed"] * 2


async def test_a_cache_of_a_running_subscriber_is_refused_to_any_other(redis_url: str) -> None:
    """It would be served as long as either of them is coherent, although the other one misses what is published."""
    cache, refusal = new_cache(), "expected a cache that no other subscriber keeps coherent"
    other = Subscriber(redis_url, caches={"users": cache}, **FAST)
    async with (
        Subscriber(redis_url, caches={"products": cache, "prices": new_cache()}, **FAST) as owner,
        Subscriber(redis_url, caches={"users": new_cache()}, **FAST) as running,
    ):
        with pytest.raises(InvalidSettings, match=refusal):
            await other.__aenter__()
        with pytest.raises(InvalidSettings, match=refusal):
            other.__enter__()
        for namespace in ("users", "products"):
            with pytest.raises(InvalidSettings, match=refusal):
                await running.attach(namespace, cache)
        assert (owner.state, cache.is_coherent, other.state) == ("coherent", True, "closed")
        assert (running.state, list(running.caches_by_namespace)) == ("coherent", ["users"])
        await owner.detach("products")
        async with other:
            assert cache.is_coherent
        assert await running.attach("products", cache)


@pytest.mark.parametrize("is_threaded", [False, True])
async def test_a_cache_is_free_again_when_its_subscriber_has_closed(redis_url: str, is_threaded: bool) -> None:
    cache = new_cache()
    first, second = (Subscriber(redis_url, caches={"products": cache}, **FAST) for _ in range(2))

    def serve(subscriber: Subscriber) -> None:
        with subscriber:
            assert cache.is_coherent

    for subscriber in (first, second, first):
        if is_threaded:
            await asyncio.to_thread(serve, subscriber)
            continue
        async with subscriber:
            assert cache.is_coherent


async def test_a_cache_is_free_again_when_its_subscriber_is_gone_without_a_close(redis_url: str) -> None:
    cache = new_cache()

    async def leave_it_running() -> None:
        await Subscriber(redis_url, caches={"products": cache}, **FAST).__aenter__()

    await asyncio.to_thread(lambda: asyncio.run(leave_it_running()))
    gc.collect()
    async with Subscriber(redis_url, caches={"products": cache}, **FAST):
        assert cache.is_coherent


async def test_a_subscriber_whose_close_was_cancelled_is_refused_until_it_has_ended(own_server: EmbeddedServer) -> None:
    cache = new_cache()
    subscriber = Subscriber(own_server.url, caches={"default": cache}, **FAST)
    await subscriber.__aenter__()
    [life] = [
        task for task in asyncio.all_tasks() if task.get_name() == f"broadcache subscriber {subscriber.replica_id}"
    ]
    own_server.pause()  # it takes its leave, and no answer comes
    closing = asyncio.create_task(subscriber.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    assert closing.cancelled()
    with pytest.raises(InvalidSettings, match="its close was cancelled and has not ended yet"):
        await subscriber.__aenter__()
    assert not life.done()
    own_server.resume()
    await asyncio.wait([life])
    async with subscriber:
        fill(cache, key=1)
        await reached(subscriber, "default", await subscriber.invalidate(Keys("key"), namespace="default"))
        assert (subscriber.state, cache.get("key")) == ("coherent", None)


async def test_a_cache_attached_while_an_echo_is_under_way_gets_no_lease_from_it(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That echo registered the replica for as long as the bounds of the other caches last."""
    late, attaching = new_cache(max_staleness_seconds=60), list[asyncio.Task[bool]]()
    was_coherent: list[bool] = []

    async def attach_and_echo(*arguments: Any, **options: Any) -> Heads:
        was_coherent.append(late.is_coherent)
        if not attaching:
            attaching.append(asyncio.create_task(subscriber.attach("products", late)))
            await asyncio.sleep(0)
            assert late in subscriber.caches
        return await echo(*arguments, **options)

    async with Subscriber(redis_url, caches={"products": new_cache()}, **FAST) as subscriber:
        monkeypatch.setattr(follower, "echo", attach_and_echo)
        await until(lambda: attaching and attaching[0].done())
        assert (was_coherent[:2], attaching[0].result(), late.is_coherent) == ([False, False], True, True)
        monkeypatch.undo()


async def test_cancelling_the_start_leaves_nothing_running() -> None:
    subscriber = Subscriber("redis://127.0.0.1:1", caches={"default": new_cache()}, start_timeout_seconds=60)
    starting = asyncio.create_task(subscriber.__aenter__())
    await until(lambda: subscriber.stats().lost >= 1)
    starting.cancel()
    await asyncio.wait([starting])
    assert (starting.cancelled(), subscriber.state) == (True, "closed")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"caches": {}}, "expected at least one namespace"),
        ({"caches": {"products": TTLCache(1, 1)}}, "expected a LocalCache for namespace 'products', got TTLCache"),
        ({"replica_id": "two words"}, "without spaces, got 'two words'"),
        ({"replica_id": ""}, "expected replica_id to be 1 to 128"),
        ({"echo_interval_seconds": 0}, "expected echo_interval_seconds to be a positive number of seconds, got 0"),
        ({"echo_timeout_seconds": float("nan")}, "expected echo_timeout_seconds to be a positive number"),
        ({"echo_interval_seconds": 6}, r"must exceed echo_interval_seconds \(got 5 and 6\)"),
        ({"clock": lambda: 0.0}, "expected the subscriber and its caches to use one clock"),
    ],
)
async def test_a_users_mistake_raises_at_construction(options: dict[str, Any], text: str) -> None:
    arguments: dict[str, Any] = {"caches": {"default": new_cache()}} | options
    with pytest.raises(InvalidSettings, match=text):
        Subscriber("redis://127.0.0.1:6379", **arguments)


@pytest.mark.parametrize("url", ["", "127.0.0.1:6379", "http://127.0.0.1", "redis://127.0.0.1:port"])
async def test_a_url_that_cannot_be_one_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidSettings, match="expected a URL such as redis://") as refusal:
        Subscriber(url.replace("//", "//me:hunter2@"), caches={"default": new_cache()})
    assert "hunter2" not in str(refusal.value)


async def test_a_namespace_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(InvalidNamespace, match="got 'two words'"):
        Subscriber("redis://127.0.0.1:6379", caches={"two words": new_cache()})
