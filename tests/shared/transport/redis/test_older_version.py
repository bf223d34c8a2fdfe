"""Databases other than 0 during an upgrade: no version proves what the other one no longer writes, or never wrote."""

import logging
from collections.abc import Iterator

import pytest
from tests.support.older_version import as_older_version, without_guard
from tests.support.replicas import FAST, fill, new_cache, reached
from tests.support.servers import Server, is_installed
from tests.support.topologies import asked
from tests.support.waiting import until

from broadcache.publisher import Publisher
from broadcache.publisher.doctor.diagnosis import Diagnosis
from broadcache.publisher.doctor.findings import Finding
from broadcache.shared import Keys, LogRefused
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.subscriber import LocalCache, Subscriber

pytestmark = pytest.mark.anyio

OLDER_HEAD, OLDER_LOG = "{cache-invalidation:products}:head", "{cache-invalidation:products}:log"
BOUND_SECONDS = 0.6


def subscriber_of(url: str) -> Subscriber:
    return Subscriber(url, caches={"products": new_cache(max_staleness_seconds=BOUND_SECONDS)}, **FAST_START)


FAST_START = {**FAST, "start_timeout_seconds": 0}


def older_subscriber(url: str) -> Subscriber:
    with as_older_version():
        return subscriber_of(url)


def older_publisher(url: str) -> Publisher:
    with as_older_version():
        return Publisher(url)


def cache_of(subscriber: Subscriber) -> LocalCache:
    return subscriber.caches_by_namespace["products"]


async def coherent(subscriber: Subscriber) -> None:
    await until(lambda: subscriber.state == "coherent")


async def some_echoes(subscriber: Subscriber) -> None:
    echoes = subscriber.stats().echoes
    await until(lambda: subscriber.stats().echoes > echoes + 3)


async def older_version_finding(url: str) -> Finding:
    findings = await Diagnosis(url, namespaces=["products"]).findings()
    [finding] = [each for each in findings if each.check == "older-version"]
    return finding


@pytest.fixture(params=["valkey", "redis", "redis-6.2"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    if not is_installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    with Server(request.param) as server:
        yield f"{server.url.rstrip('/')}/1"


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


def asked_in(url: str, *command: str) -> object:
    """What the database 1 of the server answers."""
    return asked(port_of(url), "EVAL", "redis.call('SELECT', 1) return redis.call(unpack(ARGV))", "0", *command)


async def test_this_version_is_refused_while_replicas_of_an_older_one_are_registered(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Publisher(url) as publisher, older_publisher(url) as older:
        async with older_subscriber(url) as older_replica:
            await coherent(older_replica)
            fill(cache_of(older_replica), "key", "other")
            with caplog.at_level(logging.WARNING, logger="broadcache"):
                async with subscriber_of(url) as replica:
                    message = f"an older version uses database 1: its replicas {older_replica.replica_id} are"
                    await until(lambda: message in caplog.text)
                    assert not cache_of(replica).is_coherent
                    with pytest.raises(LogRefused, match=message):
                        await publisher.publish(Keys("key"), namespace="products")
                    # Nothing of it has reached, or harmed, those of the older version.
                    await reached(older_replica, await older.publish(Keys("key"), namespace="products"))
                    assert set(cache_of(older_replica)) == {"other"}
                    finding = await older_version_finding(url)
                    assert finding.severity == "problem"
                    assert older_replica.replica_id in finding.what
        async with subscriber_of(url) as replica:
            await coherent(replica)
            await reached(replica, await publisher.publish(Keys("key"), namespace="products"))
            assert (await older_version_finding(url)).severity == "ok"


@pytest.mark.parametrize("is_guarded", [True, False], ids=["", "negative control"])
async def test_an_older_replica_proves_nothing_beside_publishers_of_this_version(url: str, is_guarded: bool) -> None:
    async def serves_beside_this_version() -> bool:
        async with subscriber_of(url) as replica, Publisher(url) as publisher:
            await coherent(replica)
            async with older_subscriber(url) as older_replica:
                if not is_guarded:
                    await coherent(older_replica)
                    fill(cache_of(older_replica), "key")
                await publisher.publish(Keys("key"), namespace="products")
                await some_echoes(replica)
                echoes = older_replica.stats().echoes
                if not is_guarded:
                    await some_echoes(older_replica)
                    return "key" in cache_of(older_replica)
                # Its last proof began before the publish.
                await until(lambda: not cache_of(older_replica).is_coherent)
                await until(lambda: older_replica.stats().lost > 5)
                assert older_replica.stats().echoes == echoes
                assert (await older_version_finding(url)).severity == "problem"
                return cache_of(older_replica).is_coherent

    if is_guarded:
        assert not await serves_beside_this_version()
    else:
        with without_guard():
            assert await serves_beside_this_version(), "expected the older replica to serve what was invalidated"


@pytest.mark.parametrize("is_guarded", [True, False], ids=["", "negative control"])
async def test_what_an_older_publisher_writes_clears_replicas_of_this_version(url: str, is_guarded: bool) -> None:
    async def serves_what_the_older_invalidated() -> bool:
        async with subscriber_of(url) as replica, subscriber_of(url) as other, older_publisher(url) as older:
            for each in (replica, other):
                await coherent(each)
                fill(cache_of(each), "key")
            receipt = await older.publish(Keys("key"), namespace="products")
            assert receipt.receivers == 0
            for each in (replica, other):
                await some_echoes(each)
            return any("key" in cache_of(each) for each in (replica, other))

    if is_guarded:
        assert not await serves_what_the_older_invalidated()
        # From now on older publishers are refused, for as long as the seal is there.
        async with older_publisher(url) as older:
            with pytest.raises(LogRefused, match="exhausted the last possible ID"):
                await older.publish(Keys("key"), namespace="products")
            async with Publisher(url) as publisher:
                await publisher.publish(Keys("key"), namespace="products")
            with pytest.raises(LogRefused, match="exhausted the last possible ID"):
                await older.publish(Keys("key"), namespace="products")
    else:
        with without_guard():
            assert await serves_what_the_older_invalidated(), "expected a replica to serve what was invalidated"


async def test_an_older_publisher_on_a_seal_without_its_log_clears_replicas_of_this_version(url: str) -> None:
    """As where the replicas may not XADD: the older publisher heals its log, and breaks the seal."""
    async with older_publisher(url) as older:
        await older.publish(Keys("key"), namespace="products")
        async with subscriber_of(url) as replica:
            await coherent(replica)
            for command in (("DEL", OLDER_LOG), ("DEL", OLDER_HEAD, OLDER_LOG)):
                asked_in(url, *command)
                fill(cache_of(replica), "key")
                await older.publish(Keys("key"), namespace="products")
                await until(lambda: "key" not in cache_of(replica))
                await coherent(replica)


async def test_a_publisher_alone_takes_the_database_over_when_no_older_replica_runs(url: str) -> None:
    async with older_publisher(url) as older, Publisher(url) as publisher:
        await older.publish(Keys("key"), namespace="products")
        await publisher.publish(Keys("key"), namespace="products")
        with pytest.raises(LogRefused, match="exhausted the last possible ID"):
            await older.publish(Keys("key"), namespace="products")


async def test_without_the_right_to_check_for_older_replicas_a_publisher_is_refused_and_says_why(url: str) -> None:
    rights = "~* &* +client|setname +evalsha +eval +get +set +hset +xadd +del +publish +hmget +xrevrange +select"
    asked(port_of(url), "ACL", "SETUSER", "app", "reset", "resetchannels", "on", ">secret", *rights.split())
    async with older_publisher(url) as older, Publisher(url.replace("://", "://app:secret@")) as publisher:
        await older.publish(Keys("key"), namespace="products")
        with pytest.raises(LogRefused, match=r"may not check.*grant \+time \+zrangebyscore"):
            await publisher.publish(Keys("key"), namespace="products")


async def test_database_0_and_prefixes_run_the_scripts_as_they_are(own_server: EmbeddedServer) -> None:
    for place in ("/0", "/1?prefix=a"):
        async with Publisher(own_server.url + place) as publisher, subscriber_of(own_server.url + place) as replica:
            await coherent(replica)
            await publisher.publish(Keys("key"), namespace="products")
    stats = asked(own_server.port, "INFO", "commandstats").decode()
    echoes_and_publishes = int(stats.partition("cmdstat_evalsha:calls=")[2].partition(",")[0])
    assert echoes_and_publishes > 0
    async with Publisher(own_server.url + "/1") as publisher:
        await publisher.publish(Keys("key"), namespace="products")
    assert asked(own_server.port, "EXISTS", OLDER_HEAD) == 1
