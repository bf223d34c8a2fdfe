"""Replicas that fall silent, and ids that several processes have: listed, missing where they may serve, forgotten."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest
from tests.support.child_replica import KEY, child_replica
from tests.support.redis_probe import redis_probe
from tests.support.registry import make_registry_old
from tests.support.replicas import FAST, fill, new_cache
from tests.support.servers import Server, ServerName, is_installed
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import until

from broadcache.publisher import Confirm, Publisher
from broadcache.shared import Confirmation, Keys, ReplicaPresence
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.names import names_of
from broadcache.subscriber import LocalCache, Subscriber

pytestmark = pytest.mark.anyio

PATIENT, IMPATIENT = Confirm(timeout_seconds=20.0), Confirm(timeout_seconds=0.3)
BRIEF: dict[str, Any] = {"max_staleness_seconds": 0.6}
"""A bound after which a replica with FAST echoes is silent soon."""
NAMES = names_of("products")
DAY_MS = 86_400_000
ACL_LINES = (
    (
        "ACL SETUSER replica on >secret ~{cache-invalidation*}:* resetchannels &cache-invalidation* "
        "&{cache-invalidation*}:echo:* &{cache-invalidation*}:confirmed &{cache-invalidation*}:question "
        "+client|setname +info +subscribe +unsubscribe "
        "+evalsha +eval +set +publish +hmget +hset +xrange +time +zadd +zrangebyscore +zrem +pexpire +del"
    ),
    (
        "ACL SETUSER publisher on >secret ~{cache-invalidation*}:* resetchannels &cache-invalidation* "
        "&{cache-invalidation*}:confirmed +client|setname +evalsha +eval +get +set +hset +xadd +del +publish +hmget "
        "+xrevrange +subscribe +time +zrangebyscore +mget +zrem"
    ),
)
"""The rights of docs/redis.md."""


async def confirmed(publisher: Publisher, confirm: Confirm = PATIENT) -> Confirmation:
    receipt = await publisher.publish(Keys(KEY), namespace="products", confirm=confirm)
    assert receipt.confirmation is not None
    return receipt.confirmation


async def listed(publisher: Publisher) -> dict[str, ReplicaPresence]:
    return {each.replica: each for each in await publisher.replicas("products")}


def is_silent(publisher: Publisher, replica: str) -> Callable[[], Any]:
    async def check() -> bool:
        found = await listed(publisher)
        return replica in found and found[replica].is_silent

    return check


@asynccontextmanager
async def cut_off(server: EmbeddedServer, **options: Any) -> AsyncIterator[tuple[TcpProxy, LocalCache]]:
    """A replica `cut` whose link can be made a black hole; beside it one that stays."""
    async with (
        TcpProxy("127.0.0.1", server.port) as proxy,
        Subscriber(server.url, caches={"products": new_cache()}, replica_id="stays", **FAST),
    ):
        cache = new_cache(**BRIEF, **options)
        async with Subscriber(proxy.url, caches={"products": cache}, replica_id="cut", **FAST):
            await make_registry_old(server.url)
            fill(cache, KEY)
            yield proxy, cache


async def test_a_frozen_replica_that_serves_nothing_is_listed_and_holds_up_no_confirmation(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher, AsyncExitStack() as stack:
        await stack.enter_async_context(
            Subscriber(redis_url, caches={"products": new_cache()}, replica_id="stays", **FAST)
        )
        child = await stack.enter_async_context(child_replica(redis_url, "products", "frozen", **BRIEF, **FAST))
        await make_registry_old(redis_url)
        assert (await confirmed(publisher)).confirmed == ("frozen", "stays")
        child.freeze()
        await until(is_silent(publisher, "frozen"))
        confirmation = await confirmed(publisher)
        assert (confirmation.expected, confirmation.silent) == (("stays",), ("frozen",))
        assert (confirmation.missing, confirmation.is_complete) == ((), True)
        silent = confirmation.replicas[0]
        assert silent.seen_ms_ago is not None
        assert silent.silent_ms is not None
        assert silent.seen_ms_ago > silent.silent_ms
        frozen = (await listed(publisher))["frozen"]
        assert (frozen.is_silent, frozen.may_serve, frozen.is_coherent, frozen.behind in (1, 2)) == (
            True,
            False,
            False,
            True,
        )
        assert frozen.pid == child.pid
        child.wake()

        async def is_back() -> bool:
            return (await listed(publisher))["frozen"].is_coherent

        await until(is_back)
        assert (await confirmed(publisher)).confirmed == ("frozen", "stays")


async def test_a_cut_off_replica_that_serves_on_is_missing_until_it_is_forgotten(own_server: EmbeddedServer) -> None:
    async with cut_off(own_server, when_incoherent="serve") as (proxy, cache), Publisher(own_server.url) as publisher:
        proxy.black_hole()
        await until(is_silent(publisher, "cut"))
        confirmation = await confirmed(publisher, IMPATIENT)
        assert cache.get(KEY) == "old"  # it does serve what was dropped
        assert (confirmation.missing, confirmation.is_complete) == (("cut",), False)
        assert confirmation.replicas[0].seen_ms_ago is not None
        cut = (await listed(publisher))["cut"]
        assert (cut.is_silent, cut.may_serve, cut.behind) == (True, True, 1)
        assert "has not dropped #1" in cut.last_word(0.0)
        preview = await publisher.preview(Keys(KEY), namespace="products")
        assert (preview.missing, preview.is_estimate) == (("cut",), True)
        # The negative control: without the memory of the registry, the confirmation is complete and false.
        assert await publisher.forget_replica("cut", "products") == "forgotten"
        assert (await confirmed(publisher)).is_complete
        assert cache.get(KEY) == "old"
        assert await publisher.forget_replica("cut", "products") == "unknown"
        assert await publisher.forget_replica("stays", "products") == "registered"
        # It was dismissed too early: its next echo lists it again.
        proxy.heal()

        async def is_back() -> bool:
            found = await listed(publisher)
            return "cut" in found and found["cut"].is_coherent

        await until(is_back)
        assert (await confirmed(publisher)).confirmed == ("cut", "stays")
        assert cache.get(KEY) is None


async def test_a_cut_off_replica_that_bypasses_is_silent_and_a_cache_that_serves_makes_it_missing(
    own_server: EmbeddedServer,
) -> None:
    async with cut_off(own_server) as (proxy, cache), Publisher(own_server.url) as publisher:
        proxy.black_hole()
        await until(is_silent(publisher, "cut"))
        assert (await confirmed(publisher)).is_complete
        assert cache.get(KEY) is None
        async with (
            TcpProxy("127.0.0.1", own_server.port) as second,
            Subscriber(
                second.url,
                caches={"products": [new_cache(**BRIEF), new_cache(when_incoherent="serve", **BRIEF)]},
                replica_id="both",
                **FAST,
            ),
        ):
            second.black_hole()
            await until(is_silent(publisher, "both"))
            confirmation = await confirmed(publisher, IMPATIENT)
            assert (confirmation.missing, confirmation.silent) == (("both",), ("cut",))


@pytest.mark.parametrize(
    ("mark", "presence", "may_serve"),
    [
        (0.5, None, False),
        (0.5, b"?", False),
        (0.0, None, True),
        (0.0, b"?", True),
        (0.75, None, True),
        (0.125, b"", True),
    ],
)
async def test_a_silent_replica_of_unknown_mode_may_serve(
    redis_url: str, mark: float, presence: bytes | None, may_serve: bool
) -> None:
    async with (
        Publisher(redis_url) as publisher,
        redis_probe(redis_url) as probe,
        Subscriber(redis_url, caches={"products": new_cache()}, replica_id="stays", **FAST),
    ):
        await make_registry_old(redis_url)
        seconds, _ = await probe.call("TIME")
        await probe.call("ZADD", NAMES.registry, int(seconds) * 1_000 - 60_000 + mark, "gone")
        if presence is not None:
            await probe.call("SET", NAMES.presence_prefix + "gone", presence)
        gone = (await listed(publisher))["gone"]
        assert (gone.is_silent, gone.may_serve, gone.state) == (True, may_serve, "unknown")
        confirmation = await confirmed(publisher, IMPATIENT)
        assert confirmation.missing == (("gone",) if may_serve else ())
        assert confirmation.is_complete is not may_serve


async def test_a_silent_replica_is_remembered_for_a_day(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher, redis_probe(redis_url) as probe:
        async with Subscriber(redis_url, caches={"products": new_cache()}, replica_id="stays", **FAST) as subscriber:
            seconds, _ = await probe.call("TIME")
            now_ms = int(seconds) * 1_000
            await probe.call(
                "ZADD", NAMES.registry, now_ms - DAY_MS + 60_000, "today", now_ms - DAY_MS - 1, "yesterday"
            )
            assert set(await listed(publisher)) == {"stays", "today"}
            echoes = subscriber.stats().echoes
            await until(lambda: subscriber.stats().echoes > echoes + 1)

            async def is_tidied() -> bool:  # by one in sixteen echoes
                return set(await probe.call("ZRANGEBYSCORE", NAMES.registry, "-inf", now_ms)) == {b"today"}

            await until(is_tidied)
            # The registry outlives the last registration by a day.
            assert await probe.call("PTTL", NAMES.registry) > DAY_MS
            assert await probe.call("PTTL", NAMES.presence_prefix + "stays") > DAY_MS
        assert await probe.call("EXISTS", NAMES.presence_prefix + "stays") == 0


@pytest.mark.parametrize("may_serve", [False, True])
async def test_the_registry_is_bounded_and_says_what_it_has_forgotten(redis_url: str, may_serve: bool) -> None:
    async with (
        Publisher(redis_url) as publisher,
        redis_probe(redis_url) as probe,
        Subscriber(redis_url, caches={"products": new_cache()}, replica_id="stays", **FAST),
    ):
        await make_registry_old(redis_url)
        seconds, _ = await probe.call("TIME")
        first_ms = int(seconds) * 1_000 - 100_000 + (0 if may_serve else 0.5)
        rows = [each for number in range(1_020) for each in (first_ms + number, f"gone-{number:04}")]
        await probe.call("ZADD", NAMES.registry, *rows)
        await probe.call("SET", NAMES.presence_prefix + "gone-0000", "{}")
        async with Subscriber(redis_url, caches={"products": new_cache()}, replica_id="another", **FAST):
            silent = [name for name, each in (await listed(publisher)).items() if each.is_silent]
            assert (len(silent), silent[0]) == (1_000, "gone-0020")
            assert await probe.call("EXISTS", NAMES.presence_prefix + "gone-0000") == 0
            await probe.call("ZREMRANGEBYSCORE", NAMES.registry, "-inf", int(first_ms) + 2_000)
            confirmation = await confirmed(publisher)
            assert confirmation.missing == ()
            if may_serve:
                assert "too many replicas of 'products' fell silent within a day" in (confirmation.doubt or "")
            else:
                assert confirmation.is_complete


async def test_an_id_that_two_live_processes_have_is_seen_and_confirms_nothing(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        Publisher(redis_url) as publisher,
        child_replica(redis_url, "products", "web-1", **FAST) as child,
    ):
        await make_registry_old(redis_url)
        assert (await confirmed(publisher)).is_complete
        with caplog.at_level(logging.WARNING, logger="broadcache"):
            async with Subscriber(
                redis_url, caches={"products": new_cache()}, replica_id="web-1", **FAST
            ) as subscriber:
                # From its first echo on: the word of one says nothing about the other.
                confirmation = await confirmed(publisher)
                assert (confirmation.confirmed, confirmation.is_complete) == (("web-1",), False)
                assert "more than one process may have the replica id web-1" in (confirmation.doubt or "")

                async def is_named() -> bool:
                    return bool((await listed(publisher))["web-1"].conflict)

                await until(is_named)
                await until(lambda: "has the same replica id 'web-1'" in caplog.text)
                echoes = subscriber.stats().echoes
                await until(lambda: subscriber.stats().echoes > echoes + 3)
                assert caplog.text.count("has the same replica id 'web-1' in 'products'") == 1
                assert f"pid {child.pid}" in caplog.text
        # One leaves in order. The other one stays registered, and is alone again.
        web_1 = (await listed(publisher))["web-1"]
        assert not web_1.is_silent

        async def is_complete() -> bool:
            return (await confirmed(publisher)).is_complete

        await until(is_complete)
        assert list(await listed(publisher)) == ["web-1"]


async def test_an_id_that_two_processes_have_is_also_seen_where_presences_are_only_renewed(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With many namespaces, a presence that has not changed is not written again."""
    namespaces = [f"n{number}" for number in range(20)]
    options: dict[str, Any] = {**FAST, "replica_id": "web-1"}
    async with (
        Publisher(redis_url) as publisher,
        Subscriber(redis_url, caches={name: new_cache() for name in namespaces}, **options) as one,
    ):
        echoes = one.stats().echoes
        await until(lambda: one.stats().echoes > echoes + 20)
        with caplog.at_level(logging.WARNING, logger="broadcache"):
            async with Subscriber(redis_url, caches={name: new_cache() for name in namespaces}, **options):
                await make_registry_old(redis_url, "n7")
                receipt = await publisher.publish(Keys(KEY), namespace="n7", confirm=PATIENT)
                assert receipt.confirmation is not None
                assert "more than one process" in (receipt.confirmation.doubt or "")
                for name in namespaces:
                    await until(lambda name=name: caplog.text.count(f"replica id 'web-1' in '{name}'") == 2)  # type: ignore[misc]

        async def are_alone() -> bool:
            listed = [each for name in namespaces for each in await publisher.replicas(name)]
            return len(listed) == 20 and not any(each.conflict or each.is_silent for each in listed)

        await until(are_alone)
        for name in namespaces:

            async def is_undoubted(name: str = name) -> bool:
                receipt = await publisher.publish(Keys(KEY), namespace=name, confirm=PATIENT)
                assert receipt.confirmation is not None
                return "more than one process" not in (receipt.confirmation.doubt or "")

            await until(is_undoubted)


async def test_a_process_that_takes_the_place_of_a_killed_one_is_doubted_for_a_lease_and_no_longer(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Publisher(redis_url) as publisher:
        async with child_replica(redis_url, "products", "web-1", max_staleness_seconds=2.0, **FAST) as child:
            await make_registry_old(redis_url)
            child.kill()
        with caplog.at_level(logging.WARNING, logger="broadcache"):
            async with Subscriber(redis_url, caches={"products": new_cache(**BRIEF)}, replica_id="web-1", **FAST):
                # The killed one might have been cut off only, with a lease.
                assert "more than one process" in ((await confirmed(publisher)).doubt or "")

                async def is_complete() -> bool:
                    return (await confirmed(publisher)).is_complete

                await until(is_complete)
                assert (await listed(publisher))["web-1"].conflict == ""
        assert "same replica id" not in caplog.text


@pytest.mark.parametrize("end", ["forgotten", "left"])
async def test_a_process_that_takes_the_id_of_one_that_may_serve_is_doubted_until_that_one_is_forgotten(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    """As a StatefulSet does that replaces a pod on a node which is cut off."""
    async with cut_off(own_server, when_incoherent="serve") as (proxy, cache), Publisher(own_server.url) as publisher:
        proxy.black_hole()
        await until(is_silent(publisher, "cut"))
        with caplog.at_level(logging.WARNING, logger="broadcache"):
            async with Subscriber(
                own_server.url, caches={"products": new_cache(**BRIEF)}, replica_id="cut", **FAST
            ) as second:
                confirmation = await confirmed(publisher)  # from its first echo on
                assert cache.get(KEY) == "old"
                assert (confirmation.missing, confirmation.is_complete) == ((), False)
                echoes = second.stats().echoes
                await until(lambda: second.stats().echoes > echoes + 20)  # for longer than a lease
                assert not (await confirmed(publisher)).is_complete
                assert "more than one process may have the replica id cut" in (confirmation.doubt or "")
                assert caplog.text.count("had the same replica id 'cut' in 'products'") == 1
                if end == "forgotten":

                    async def is_complete() -> bool:
                        return (await confirmed(publisher)).is_complete

                    assert await publisher.forget_replica("cut", "products") == "forgotten"
                    await until(is_complete)
                    assert await publisher.forget_replica("cut", "products") == "registered"
                    assert (await listed(publisher))["cut"].conflict == ""
        if end == "left":
            # The word of the one that has left is not that of the other.
            assert (await confirmed(publisher, IMPATIENT)).missing == ("cut",)
            await until(is_silent(publisher, "cut"))
            assert (await confirmed(publisher, IMPATIENT)).missing == ("cut",)


async def test_a_process_that_starts_again_does_not_wait_for_itself(own_server: EmbeddedServer) -> None:
    async with Publisher(own_server.url) as publisher, TcpProxy("127.0.0.1", own_server.port) as proxy:
        caches = {"products": new_cache(when_incoherent="serve", **BRIEF)}
        subscriber = Subscriber(proxy.url, caches=caches, replica_id="web-1", **FAST)
        async with subscriber:
            await make_registry_old(own_server.url)
            await proxy.refuse()
            await proxy.cut()
        await proxy.accept()
        async with subscriber:
            assert (await confirmed(publisher)).is_complete


@pytest.mark.parametrize("name", ["valkey", "redis", "redis-6.2"])
async def test_the_documented_rights_are_enough_on_every_server(
    name: ServerName, caplog: pytest.LogCaptureFixture
) -> None:
    if not is_installed(name):
        pytest.skip(f"{name} is not installed")
    with Server(name) as server:
        async with redis_probe(server.url) as probe:
            for line in ACL_LINES:
                await probe.call(*line.split())
        as_replica = server.url.replace("redis://", "redis://replica:secret@")
        as_publisher = server.url.replace("redis://", "redis://publisher:secret@")
        caches = {"products": new_cache(**BRIEF)}
        with caplog.at_level(logging.WARNING, logger="broadcache"):
            async with Publisher(as_publisher) as publisher:
                async with child_replica(as_replica, "products", "web-2", **BRIEF, **FAST) as child:
                    async with (
                        Subscriber(as_replica, caches=caches, replica_id="web-1", **FAST),
                        Subscriber(as_replica, caches={"products": new_cache()}, replica_id="web-1", **FAST),
                    ):
                        await until(lambda: "has the same replica id 'web-1'" in caplog.text)
                    child.kill()
                    await until(is_silent(publisher, "web-2"))
                assert list(await listed(publisher)) == ["web-2"]
                assert await publisher.forget_replica("web-2", "products") == "forgotten"
                assert await listed(publisher) == {}
        assert {record.message.partition(" has the same")[2][:3] for record in caplog.records} == {" re"}


async def test_subscribers_of_one_id_with_different_namespaces_are_no_conflict(redis_url: str) -> None:
    async with (
        Publisher(redis_url) as publisher,
        Subscriber(redis_url, caches={"products": new_cache()}, replica_id="web-1", **FAST) as one,
        Subscriber(redis_url, caches={"users": new_cache()}, replica_id="web-1", **FAST) as other,
    ):
        await make_registry_old(redis_url)
        echoes = one.stats().echoes, other.stats().echoes
        await until(lambda: one.stats().echoes > echoes[0] + 2 and other.stats().echoes > echoes[1] + 2)
        assert (await confirmed(publisher)).is_complete
        assert [each.conflict for each in await publisher.replicas("users")] == [""]


async def test_a_presence_of_another_type_costs_neither_the_proof_nor_the_registration(redis_url: str) -> None:
    cache = new_cache()
    async with redis_probe(redis_url) as probe, Publisher(redis_url) as publisher:
        await probe.call("LPUSH", NAMES.presence_prefix + "web-1", "x")
        async with Subscriber(redis_url, caches={"products": cache}, replica_id="web-1", **FAST):
            assert cache.is_coherent
            assert list(await listed(publisher)) == ["web-1"]
            said = msgspec.json.decode(await probe.call("GET", NAMES.presence_prefix + "web-1"))
            assert (said["conflict"], len(said["life"])) == ("", 16)
