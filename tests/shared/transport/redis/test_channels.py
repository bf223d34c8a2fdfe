"""Databases and prefixes separate channels: what is published in one reaches no cache of another."""

import itertools
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import pytest
from tests.support.replicas import FAST, fill, new_cache, reached
from tests.support.topologies import asked, cluster_of_three
from tests.support.waiting import until

from broadcache.publisher import Confirm, Publisher
from broadcache.publisher.doctor.diagnosis import Diagnosis
from broadcache.publisher.history.feed import Feed
from broadcache.shared import Everything, InvalidSettings, Keys
from broadcache.shared.transport.redis.address import RedisAddress
from broadcache.shared.transport.redis.names import Naming, names_of
from broadcache.subscriber import Subscriber

pytestmark = pytest.mark.anyio

PLACES = ("/0", "/1", "/2", "/0?prefix=staging", "/1?prefix=staging", "/0?prefix=acme:staging")


def received(subscriber: Subscriber) -> dict[str, int]:
    return dict(subscriber.stats().received)


def has_more_echoes(subscriber: Subscriber, than: int) -> bool:
    return subscriber.stats().echoes > than


@pytest.mark.parametrize("published_at", PLACES)
async def test_a_publish_reaches_the_replicas_of_its_database_and_prefix_alone(
    redis_url: str, published_at: str
) -> None:
    async with AsyncExitStack() as stack:
        subscribers = {each: Subscriber(redis_url + each, caches={"products": new_cache()}, **FAST) for each in PLACES}
        for subscriber in subscribers.values():
            await stack.enter_async_context(subscriber)
            fill(subscriber.caches_by_namespace["products"], "key")
        publisher = await stack.enter_async_context(Publisher(redis_url + published_at))
        before = {place: received(subscriber) for place, subscriber in subscribers.items()}
        receipt = await publisher.publish(Everything(), namespace="products")
        await reached(of_publisher := subscribers.pop(published_at), receipt)
        assert set(of_publisher.caches_by_namespace["products"]) == set()
        for place, subscriber in subscribers.items():
            await until(partial(has_more_echoes, subscriber, subscriber.stats().echoes + 1))
            assert received(subscriber) == before[place], place
            assert set(subscriber.caches_by_namespace["products"]) == {"key"}
        assert receipt.receivers == 1


async def test_the_feed_and_the_doctor_take_a_prefix(redis_url: str) -> None:
    cache = new_cache()
    async with Subscriber(redis_url, caches={"products": cache}, prefix="acme", replica_id="web-1", **FAST):
        findings = await Diagnosis(redis_url, namespaces=["products"], prefix="acme").findings()
        [replicas] = [each for each in findings if each.check == "replicas"]
        assert replicas.what.startswith("1 "), replicas
    feed = Feed(redis_url, "products", prefix="acme")
    assert feed._address.names_of("products").channel == "acme:cache-invalidation:products"
    read_before = RedisAddress(redis_url, prefix="acme")
    assert Publisher(read_before).address is read_before
    with pytest.raises(InvalidSettings, match=r"expected no options for redis://.*, which was read before"):
        Publisher(read_before, prefix="other")


def test_no_two_names_of_different_databases_prefixes_and_namespaces_are_equal() -> None:
    prefixes = ("", "a", "a:b", "b", "a:1", "1", "a/b", "cache", "cache-invalidatio", "invalidation")
    namespaces = ("default", "b", "c", "b.c", "replicas", "cache-invalidation", "head", "1", "a")
    seen: dict[str, tuple[Any, ...]] = {}
    for database, prefix, namespace in itertools.product((0, 1, 10, 11), prefixes, namespaces):
        names = Naming(database, prefix).of(namespace)
        for name in names:
            assert seen.setdefault(name, (database, prefix, namespace)) == (database, prefix, namespace), name
        assert all(name.startswith(f"{{{names.channel}}}:") for name in names[1:])
    assert Naming().of("products") == names_of("products")
    assert names_of("products").channel == "cache-invalidation:products"
    assert names_of("default").head == "{cache-invalidation}:head"


@pytest.mark.parametrize(
    ("url", "naming"),
    [
        ("redis://h/3", Naming(3)),
        ("redis://h?db=3", Naming(3)),
        ("unix:///run/redis.sock?db=2&prefix=a", Naming(2, "a")),
        ("redis+sentinel://h/service/2", Naming(2)),
        ("redis+sentinel://h/service?prefix=a%3Ab", Naming(0, "a:b")),
        ("redis+cluster://h?prefix=a/b", Naming(0, "a/b")),
    ],
)
def test_each_kind_of_url_names_database_and_prefix(url: str, naming: Naming) -> None:
    assert RedisAddress(url).naming == naming
    assert RedisAddress(url).of("products").naming == naming


@pytest.mark.parametrize(
    "prefix",
    [
        *" *?[]{}-:",
        "a b",
        "a{b",
        "a}b",
        "a*",
        "a\\",
        "ä",
        "a\n",
        "a\0",
        ":a",
        "a:",
        "a" * 65,
        "a@1",
        "cache-invalidation",
    ],
)
def test_a_prefix_that_is_not_valid_is_refused(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSettings, match=r"^prefix is not valid: expected 1 to 64 of the characters") as error:
        RedisAddress("redis://h", prefix=prefix)
    assert len(prefix) < 3 or prefix == "cache-invalidation" or prefix not in str(error.value)
    if prefix.strip() and "\0" not in prefix:
        monkeypatch.setenv("BROADCACHE_PREFIX", f"{prefix} x")
        with pytest.raises(InvalidSettings, match=r"^BROADCACHE_PREFIX is not valid"):
            RedisAddress("redis://h")


def test_an_invalid_prefix_in_the_url_is_not_shown() -> None:
    with pytest.raises(InvalidSettings, match="the option prefix expects 1 to 64 of the characters") as error:
        RedisAddress("redis://h?prefix=s3cret*")
    assert "s3cret" not in str(error.value)
    with pytest.raises(InvalidSettings, match="write prefix=staging"):
        RedisAddress("redis://h?key_prefix=a")


def test_explicit_prefixes_come_before_the_environment_and_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROADCACHE_PREFIX", "environment")
    for of_url, given, prefix in (
        ("", None, "environment"),
        ("?prefix=url", None, "url"),
        ("", "argument", "argument"),
        ("", "", ""),
        ("?prefix=url", "url", "url"),
    ):
        assert RedisAddress(f"redis://h{of_url}", prefix=given).naming.prefix == prefix
    for given in ("argument", ""):
        with pytest.raises(InvalidSettings, match=f"the argument has '{given}', the URL has 'url'"):
            RedisAddress("redis://h?prefix=url", prefix=given)
    monkeypatch.setenv("BROADCACHE_PREFIX", " ")
    assert RedisAddress("redis://h").naming.prefix == ""
    assert RedisAddress("redis://u:p@h/1", prefix="a").label == "redis://…@h/1?prefix=a"


async def test_everything_that_reads_a_namespace_uses_the_prefix(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROADCACHE_PREFIX", "staging")
    async with (
        Publisher(redis_url) as publisher,
        Subscriber(redis_url, caches={"products": new_cache()}, **FAST) as subscriber,
    ):
        await reached(subscriber, await subscriber.invalidate(Keys("key"), namespace="products"))
        receipt = await publisher.publish(Keys("key"), namespace="products", confirm=Confirm(timeout_seconds=10))
        assert receipt.confirmation is not None
        assert receipt.confirmation.missing == ()
        assert [each.replica for each in await publisher.replicas("products")] == [subscriber.replica_id]
        assert (await publisher.preview(Keys("key"), namespace="products")).missing == ()
        assert len(await publisher.history("products")) == 2
        findings = await Diagnosis(redis_url, namespaces=["products"]).findings()
        assert [each.what for each in findings if each.severity == "problem"] == []
        keys = asked(int(redis_url.rpartition(":")[2].partition("/")[0]), "KEYS", "*")
        assert keys
        assert all(key.startswith(b"{staging:cache-invalidation:products}:") for key in keys), keys
    assert Feed(redis_url, "products")._address.naming == Naming(0, "staging")


async def test_in_a_cluster_a_prefix_selects_the_slot() -> None:
    with cluster_of_three() as cluster:
        namespaces = [f"n{number}" for number in range(6)]
        async with (
            Subscriber(cluster.url, prefix="a:b", caches={each: new_cache() for each in namespaces}, **FAST) as replica,
            Publisher(cluster.url, prefix="a:b") as publisher,
        ):
            for namespace in namespaces:
                receipt = await publisher.publish(Keys("key"), namespace=namespace, confirm=Confirm(timeout_seconds=10))
                assert receipt.confirmation is not None
                assert receipt.confirmation.missing == ()
                await reached(replica, receipt)
            assert replica.stats().lost == 0
