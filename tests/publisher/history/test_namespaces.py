"""Namespaces are listed with their logs and replicas, and forgotten when no replica may serve from its caches."""

import re
from collections.abc import Iterator

import pytest
from tests.shared.transport.redis.test_topology_acl import rights_of
from tests.support.child_replica import KEY, child_replica
from tests.support.paths import ROOT
from tests.support.redis_probe import redis_probe
from tests.support.replicas import FAST, fill, new_cache, reached
from tests.support.servers import Server, is_installed
from tests.support.tcp_proxy import TcpProxy
from tests.support.topologies import cluster_of_three
from tests.support.waiting import until

from broadcache.publisher import ForgetResult, Publisher, SyncPublisher
from broadcache.shared import Everything, InvalidNamespace, InvalidSettings, Keys, LogRefused
from broadcache.shared.transport.redis.names import Naming, names_of
from broadcache.subscriber import Subscriber
from broadcache.subscriber.following.sequencer import Sequencer

pytestmark = pytest.mark.anyio

BOUND_SECONDS = 0.6
FORGOTTEN = ForgetResult("forgotten")


@pytest.fixture(params=["valkey", "redis", "redis-6.2"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    if not is_installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    with Server(request.param) as server:
        yield server.url.rstrip("/")


async def names_in(publisher: Publisher) -> list[str]:
    page = await publisher.namespaces()
    assert page.next_after is None
    return [each.namespace for each in page.namespaces]


async def keys_of(url: str) -> set[str]:
    async with redis_probe(url) as probe:
        return {key.decode() for key in await probe.call("KEYS", "*")}


async def test_namespaces_are_listed_by_name_with_their_logs_and_replicas(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        assert await publisher.namespaces() == ((), None)
        receipts = [await publisher.publish(Keys("key"), namespace="users") for _ in range(3)]
        async with Subscriber(redis_url, caches={"products": new_cache(), "default": new_cache()}, **FAST):
            page = await publisher.namespaces()
            assert [each.namespace for each in page.namespaces] == ["default", "products", "users"]
            users, products = page.namespaces[2], page.namespaces[1]
            [entry] = await publisher.history("users", count=1)
            assert entry.invalidation is not None
            assert (users.head, users.log_length) == (receipts[-1].position, 3)
            assert users.last_sent_at_ms == entry.invalidation.sent_at_ms
            assert users.memory_bytes is not None
            assert users.memory_bytes > 100
            assert sum(users.replicas) == 0
            assert (products.log_length, products.last_sent_at_ms, products.replicas.registered) == (0, None, 1)
            assert products.head is not None


@pytest.mark.parametrize("place", ["/0", "/1", "/0?prefix=staging", "/1?prefix=staging", "/0?prefix=staging:a"])
async def test_only_the_namespaces_of_the_database_and_prefix_are_listed(redis_url: str, place: str) -> None:
    for each in ("/0", "/1", "/0?prefix=staging", "/1?prefix=staging", "/0?prefix=staging:a"):
        async with Publisher(redis_url + each) as publisher:
            await publisher.publish(Everything())
            await publisher.publish(Everything(), namespace="n" + each.translate(str.maketrans("/?=:", "----")))
    async with Publisher(redis_url + place) as publisher:
        own = "n" + place.translate(str.maketrans("/?=:", "----"))
        assert await names_in(publisher) == ["default", own]
        assert await publisher.forget_namespace(own) == FORGOTTEN
        assert await names_in(publisher) == ["default"]


async def test_what_other_programs_wrote_is_no_namespace_and_fails_no_listing(redis_url: str) -> None:
    async with redis_probe(redis_url) as probe, Publisher(redis_url) as publisher:
        for key in ("{cache-invalidation:a b}:head", "{cache-invalidationx}:log", "{cache-invalidation:a}:heads"):
            await probe.call("SET", key, "")
        await probe.call("SET", names_of("head").head, "")
        await probe.call("SET", names_of("both").log, "")
        await probe.call("SET", names_of("both").registry, "")
        await publisher.publish(Keys("key"), namespace="products")
        await probe.call("SET", names_of("products").registry, "")
        await probe.call("DEL", names_of("products").head)
        [products] = (await publisher.namespaces()).namespaces
        assert (products.namespace, products.head, products.log_length) == ("products", None, 1)
        assert await publisher.forget_namespace("products") == FORGOTTEN
        assert await publisher.forget_namespace("both") == FORGOTTEN


async def test_pages_cover_all_namespaces_in_order_each_once(redis_url: str) -> None:
    many = 100_000
    begin = "{cache-invalidation:n"
    script = "for i = 1, ARGV[1] do redis.call('HSET', ARGV[2] .. i .. '}:head', 'epoch', 'E', 'seq', i) end"
    async with redis_probe(redis_url) as probe, Publisher(redis_url, timeout_seconds=30) as publisher:
        await probe.call("CONFIG", "RESETSTAT")
        await probe.call("EVAL", script, 0, many, begin)
        expected = sorted(f"n{number}" for number in range(1, many + 1))
        page = await publisher.namespaces(count=250)
        assert [each.namespace for each in page.namespaces] == expected[:250]
        page = await publisher.namespaces(after=page.next_after or "", count=250)
        assert [each.namespace for each in page.namespaces] == expected[250:500]
        page = await publisher.namespaces(after=expected[-251], count=250)
        assert [each.namespace for each in page.namespaces] == expected[-250:]
        assert page.next_after is None
        stats = (await probe.call("INFO", "commandstats")).decode()
        assert "cmdstat_keys:" not in stats


async def test_arguments_of_pages_are_checked(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        for count in (0, 10_001):
            with pytest.raises(InvalidSettings, match="expected count to be from 1 to 10000"):
                await publisher.namespaces(count=count)
        for name in ("a b", "{"):
            with pytest.raises(InvalidNamespace):
                await publisher.namespaces(after=name)
            with pytest.raises(InvalidNamespace):
                await publisher.forget_namespace(name)
        for name in ("a", "b", "c"):
            await publisher.publish(Everything(), namespace=name)
        page = await publisher.namespaces(count=1, among=["c", "x", "b"])
        assert ([each.namespace for each in page.namespaces], page.next_after) == (["b"], "b")
    with pytest.raises(InvalidSettings, match="not open"):
        await publisher.namespaces()


async def test_in_a_cluster_the_namespaces_of_all_primaries_are_listed_and_forgotten() -> None:
    with cluster_of_three() as cluster:
        names = sorted(f"n{number}" for number in range(12))
        for prefix in ("", "staging"):
            async with Publisher(cluster.url, prefix=prefix) as publisher:
                for name in names:
                    await publisher.publish(Keys("key"), namespace=name)
                assert await names_in(publisher) == names
                for name in names[:6]:
                    assert await publisher.forget_namespace(name) == FORGOTTEN
                assert await names_in(publisher) == names[6:]


@pytest.mark.parametrize("place", ["/0", "/1", "/0?prefix=staging"])
async def test_a_forgotten_namespace_leaves_no_key(url: str, place: str) -> None:
    async with Publisher(url + place) as publisher:
        async with Subscriber(url + place, caches={"products": new_cache(), "users": new_cache()}, **FAST) as replica:
            for number in range(30):
                await reached(replica, await publisher.publish(Keys("key"), namespace="products", id=f"id-{number}"))
            assert await publisher.forget_namespace("products") == ("in use", (replica.replica_id,), (), False)
        await publisher.publish(Keys("key"), namespace="users")
        assert await publisher.forget_namespace("products") == FORGOTTEN
        channel = Naming(int(place[1]), place.partition("prefix=")[2]).channel_of("users")
        assert {key.partition("}")[0] for key in await keys_of(url + place)} == {f"{{{channel}"}
        assert await publisher.forget_namespace("products") == ForgetResult("unknown")
        # The id is free again: what was logged is gone.
        receipt = await publisher.publish(Keys("key"), namespace="products", id="id-1")
        assert (receipt.is_repeat, receipt.position and receipt.position.sequence) == (False, 1)


async def test_keys_of_another_program_with_the_same_hash_tag_stay(redis_url: str) -> None:
    foreign = [f"{{cache-invalidation:products}}:{name}" for name in ("reports", "re", "replicas2", "replica")]
    async with Publisher(redis_url) as publisher, redis_probe(redis_url) as probe:
        await publisher.publish(Everything(), namespace="products")
        for key in foreign:
            await probe.call("SET", key, "theirs")
        assert await publisher.forget_namespace("products") == FORGOTTEN
    assert await keys_of(redis_url) == set(foreign)


async def test_more_receipts_than_one_step_removes_are_removed_too(redis_url: str) -> None:
    receipts = names_of("products").receipt_prefix
    async with redis_probe(redis_url) as probe, Publisher(redis_url) as publisher:
        await publisher.publish(Everything(), namespace="products")
        await probe.call("EVAL", "for i = 1, 25000 do redis.call('SET', ARGV[1] .. i, 'E 1 1 ') end", 0, receipts)
        assert await publisher.forget_namespace("products") == FORGOTTEN
        assert await keys_of(redis_url) == set()


async def test_replicas_that_are_registered_or_silent_and_may_serve_keep_a_namespace(url: str) -> None:
    async with Publisher(url) as publisher:
        async with (
            child_replica(url, "products", "bypasses", max_staleness_seconds=BOUND_SECONDS, **FAST) as bypasses,
            child_replica(url, "products", "lives", **FAST),
        ):
            assert await publisher.forget_namespace("products") == ("in use", ("bypasses", "lives"), (), False)
            bypasses.freeze()
            silent = ForgetResult("in use", ("lives",))

            async def is_silent() -> bool:
                return await publisher.forget_namespace("products") == silent

            await until(is_silent)
            assert len(await publisher.replicas("products")) == 2
        # Both were killed. The registration of "lives" ends after its bound of 5 s; then it serves nothing either.
        async with redis_probe(url) as probe:
            registry = names_of("products").registry
            await probe.call("ZADD", registry, 1, "long-gone")
            [seconds, _] = await probe.call("TIME")
            await probe.call("ZADD", registry, int(seconds) * 1_000 - 1_000, "serves")
            await probe.call("ZREM", registry, "lives")
            assert await publisher.forget_namespace("products") == ("in use", (), ("serves",), False)
            assert await publisher.forget_replica("serves", "products") == "forgotten"
            await probe.call("ZADD", registry, int(seconds) * 1_000 + 100_000, " forgotten")
            assert await publisher.forget_namespace("products") == ("in use", (), (), True)
            await probe.call("ZREM", registry, " forgotten")
        assert await publisher.forget_namespace("products") == FORGOTTEN


async def test_a_replica_that_was_frozen_while_its_namespace_was_forgotten_follows_the_new_log(url: str) -> None:
    async with (
        Publisher(url) as publisher,
        child_replica(url, "products", "web-1", max_staleness_seconds=BOUND_SECONDS, **FAST) as replica,
    ):
        before = await publisher.publish(Keys(KEY), namespace="products")
        replica.freeze()

        async def is_forgotten() -> bool:
            return await publisher.forget_namespace("products") == FORGOTTEN

        await until(is_forgotten)
        after = await publisher.publish(Keys(KEY), namespace="products")
        assert after.position is not None
        assert before.position is not None
        assert (after.position.sequence, before.position.sequence) == (1, 1)
        assert after.position.epoch != before.position.epoch
        replica.wake()

        async def follows() -> bool:
            found = await publisher.replicas("products")
            return [each.position for each in found if each.is_coherent] == [after.position]

        await until(follows)


@pytest.mark.parametrize("is_naive", [False, True], ids=["", "negative control"])
async def test_a_replica_that_was_cut_off_meanwhile_never_serves_what_was_invalidated(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, is_naive: bool
) -> None:
    cache = new_cache(max_staleness_seconds=BOUND_SECONDS)
    port = int(redis_url.rpartition(":")[2].partition("/")[0])
    async with (
        TcpProxy("127.0.0.1", port) as proxy,
        Publisher(redis_url) as publisher,
        Subscriber(f"redis://127.0.0.1:{proxy.port}", caches={"products": cache}, **FAST) as replica,
    ):
        await reached(replica, await publisher.publish(Keys("other"), namespace="products"))
        fill(cache, "key")
        await proxy.refuse()
        await proxy.cut()
        await until(lambda: not cache.is_coherent)

        async def is_forgotten() -> bool:
            return await publisher.forget_namespace("products") == FORGOTTEN

        await until(is_forgotten)
        after = await publisher.publish(Keys("key"), namespace="products")
        assert after.position is not None
        assert after.position.sequence == 1
        if is_naive:  # it continues wherever it was, whatever the head says
            monkeypatch.setattr(Sequencer, "resume", lambda *_, **__: None)
            monkeypatch.setattr(Sequencer, "compare", lambda *_: None)
        await proxy.accept()
        await until(lambda: cache.is_coherent)
        assert (cache.get("key") == "old") is is_naive


def test_code_without_an_event_loop_lists_and_forgets_too(redis_url: str) -> None:
    with SyncPublisher(redis_url) as publisher:
        publisher.publish(Everything(), namespace="products")
        [products] = publisher.namespaces().namespaces
        assert products.namespace == "products"
        assert publisher.forget_namespace("products") == FORGOTTEN


async def test_the_rights_of_the_page_are_enough_to_list_and_to_forget(url: str) -> None:
    page = (ROOT / "docs" / "redis.md").read_text(encoding="utf-8")
    [more] = re.findall(r"^To list .*? takes `([^`]+)`", page, re.MULTILINE | re.DOTALL)
    rights = [*rights_of("publisher"), *more.split()]
    own = url.replace("://", "://publisher:secret@")
    async with redis_probe(url) as probe, Publisher(own) as publisher:
        await probe.call("ACL", "SETUSER", "publisher", "on", ">secret", "resetchannels", *rights)
        await publisher.publish(Keys("key"), namespace="products")
        [products] = (await publisher.namespaces()).namespaces
        assert products.memory_bytes is not None
        assert await publisher.forget_namespace("products") == FORGOTTEN
        for right in ("scan", "xlen", "zrangebyscore"):
            await publisher.publish(Keys("key"), namespace="products")
            await probe.call("ACL", "SETUSER", "publisher", f"-{right}")
            with pytest.raises(LogRefused, match="expected Redis to"):
                await publisher.namespaces()
            await probe.call("ACL", "SETUSER", "publisher", f"+{right}")
        await probe.call("ACL", "SETUSER", "publisher", "-memory")
        [products] = (await publisher.namespaces()).namespaces
        assert products.memory_bytes is None
