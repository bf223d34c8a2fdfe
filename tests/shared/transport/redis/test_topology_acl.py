"""The least rights that work, as docs/redis.md has them: each of them is needed, and is named when it is missing."""

import logging
import re
from collections.abc import Iterator

import pytest
from tests.support.paths import ROOT
from tests.support.receipts import position_of
from tests.support.replicas import FAST, fill, new_cache, reached
from tests.support.servers import Server, is_installed
from tests.support.topologies import asked, cluster_of_three
from tests.support.waiting import until

from broadcache.publisher import Confirm, Publisher
from broadcache.shared import Keys, LinkLost, LogRefused, Receipt, ReplicaConfirmation
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.subscriber import Subscriber

pytestmark = pytest.mark.anyio

PAGE = ROOT / "docs" / "redis.md"


def rights_of(user: str) -> list[str]:
    """The rights that the page gives to a user, without `resetchannels`: `allow` has it."""
    found = re.search(rf"^ACL SETUSER {user} on >\S+((?:.*\\\n)*.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    first, *rights = found[1].replace("\\", "").split()
    assert first == "resetchannels"  # Redis 6.2 rejects a pattern after `allchannels`, which its new users have
    return rights


@pytest.fixture(params=["valkey", "redis", "redis-6.2"])
def any_server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """A server of each supported kind and version that is installed here."""
    if not is_installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    with Server(request.param) as server:
        yield server


async def test_every_server_accepts_the_lines_of_the_page_as_they_are(any_server: EmbeddedServer) -> None:
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^ACL SETUSER .*$", text, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        assert asked(any_server.port, *line.split()) in (b"OK", True)
    channels = re.search(r"`(~\{cache-invalidation\}:\* [^`]*)`", text)
    assert channels is not None
    assert asked(any_server.port, "ACL", "SETUSER", "one", "resetchannels", *channels[1].split()) in (b"OK", True)


async def test_in_a_cluster_the_rights_of_the_page_are_enough() -> None:
    more = rights_in("A cluster")
    with cluster_of_three() as cluster:
        urls = dict.fromkeys(("replica", "publisher"), "")
        for user in urls:
            for node in cluster.nodes:
                allow(node, user, [*rights_of(user), *more])
            urls[user] = cluster.url.replace("://", f"://{user}:secret@")
        namespaces = cluster.namespaces()
        async with (
            Subscriber(urls["replica"], caches={each: new_cache() for each in namespaces}, **FAST) as subscriber,
            Publisher(urls["publisher"]) as publisher,
        ):
            for namespace in namespaces:
                await reached(subscriber, await publisher.publish(Keys("key"), namespace=namespace))
            assert subscriber.stats().lost == 0


def rights_in(beginning: str) -> list[str]:
    """The rights that the page adds in the sentence that begins so."""
    found = re.search(rf"^{beginning}[^`]*`([^`]+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1].split()


def allow(server: EmbeddedServer, user: str, rights: list[str]) -> str:
    """Make a user with these rights and no others; return the URL to connect with."""
    asked(server.port, "ACL", "SETUSER", user, "reset", "resetchannels", "on", ">secret", *rights)
    return f"redis://{user}:secret@127.0.0.1:{server.port}"


async def test_the_rights_of_the_page_are_enough(any_server: EmbeddedServer) -> None:
    subscriber_url = allow(any_server, "replica", rights_of("replica"))
    publisher_url = allow(any_server, "publisher", rights_of("publisher"))
    cache = new_cache()
    async with (
        Subscriber(subscriber_url, caches={"default": cache}, **FAST) as subscriber,
        Publisher(publisher_url) as publisher,
    ):
        await subscriber.attach("products", new_cache())
        for namespace in ("default", "products"):
            fill(subscriber.caches_by_namespace[namespace], "key", "other")
            await reached(subscriber, await publisher.publish(Keys("key"), namespace=namespace))
            assert set(subscriber.caches_by_namespace[namespace]) == {"other"}
            assert (await publisher.head(namespace), len(await publisher.history(namespace)))[1] == 1
        await subscriber.detach("products")
        echoes = subscriber.stats().echoes
        await until(lambda: subscriber.stats().echoes > echoes + 1)
        assert subscriber.stats().lost == 0
        # What was missed is read from the log.
        asked(any_server.port, "CLIENT", "KILL", "TYPE", "pubsub")
        await reached(subscriber, await publisher.publish(Keys("key")))
        with pytest.raises(LogRefused, match=r"'get' command|can't run this command"):
            await subscriber.invalidate(Keys("key"), namespace="default")


async def test_with_a_prefix_the_rights_of_the_page_are_enough_and_those_without_it_are_not(
    any_server: EmbeddedServer,
) -> None:
    def with_prefix(user: str) -> list[str]:
        return [each.replace("cache-invalidation", "staging:cache-invalidation") for each in rights_of(user)]

    page = PAGE.read_text(encoding="utf-8")
    assert {each for each in with_prefix("replica") if "echo" in each or "~" in each} <= {*re.findall(r"`(.*?)`", page)}
    subscriber_url = f"{allow(any_server, 'replica', with_prefix('replica'))}?prefix=staging"
    publisher_url = f"{allow(any_server, 'publisher', with_prefix('publisher'))}?prefix=staging"
    async with (
        Subscriber(subscriber_url, caches={"default": new_cache(), "products": new_cache()}, **FAST) as subscriber,
        Publisher(publisher_url) as publisher,
    ):
        for namespace in ("default", "products"):
            await reached(subscriber, await publisher.publish(Keys("key"), namespace=namespace))
        allow(any_server, "publisher", rights_of("publisher"))
        with pytest.raises(LogRefused, match=r"staging:cache-invalidation|No permissions|no permissions"):
            await publisher.publish(Keys("key"))


async def test_in_another_database_the_rights_of_the_page_to_one_namespace_are_enough(
    any_server: EmbeddedServer,
) -> None:
    text = PAGE.read_text(encoding="utf-8").replace("\n", " ")
    found = re.search(r"`(~\{cache-invalidation@1:products\}:\* [^`]*)`, with `([^`]*)`", text)
    assert found is not None
    reach, urls = [*found[1].split(), found[2]], {}
    for user in ("replica", "publisher"):
        rights = [each for each in rights_of(user) if each.startswith("+")]
        urls[user] = f"{allow(any_server, user, [*reach, *rights, '+select'])}/1"
    async with (
        Subscriber(urls["replica"], caches={"products": new_cache()}, **FAST) as subscriber,
        Publisher(urls["publisher"]) as publisher,
    ):
        await reached(subscriber, await publisher.publish(Keys("key"), namespace="products"))


async def test_a_replica_that_publishes_has_the_rights_of_both(any_server: EmbeddedServer) -> None:
    url = allow(any_server, "both", [*rights_of("replica"), *rights_of("publisher")])
    async with Subscriber(url, caches={"default": new_cache()}, **FAST) as subscriber:
        await reached(subscriber, await subscriber.invalidate(Keys("key"), namespace="default"))


@pytest.mark.parametrize("right", rights_of("replica"))
async def test_a_replica_without_one_of_its_rights_bypasses_and_says_which(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture, right: str
) -> None:
    url = allow(own_server, "replica", rights_of("replica"))
    with caplog.at_level(logging.DEBUG, logger="broadcache"):
        async with (
            Publisher(own_server.url) as publisher,
            Subscriber(url, caches={"default": new_cache()}, **FAST) as subscriber,
        ):
            await subscriber.attach("products", new_cache())
            await reached(subscriber, await publisher.publish(Keys("key")))
            allow(own_server, "replica", [each for each in rights_of("replica") if each != right])
            # Some are needed only now and then: to load a script, to read what was missed, to detach.
            await subscriber.detach("products")
            if right != "+unsubscribe":
                asked(own_server.port, "SCRIPT", "FLUSH")
                if right == "+hset":
                    asked(own_server.port, "DEL", "{cache-invalidation}:head")
                asked(own_server.port, "CLIENT", "KILL", "TYPE", "pubsub")
                await publisher.publish(Keys("key"), confirm=Confirm(timeout_seconds=0.01))
            await until(lambda: named(right) in caplog.text.lower(), f"a text that names {right}")
            assert any(word in caplog.text for word in ("expected", "cannot", "may not"))


CONFIRMING = rights_in("A publisher that asks")
SELDOM = {**FAST, "echo_interval_seconds": 4.0}


def confirmed_by(receipt: Receipt) -> list[ReplicaConfirmation]:
    assert receipt.confirmation is not None
    return list(receipt.confirmation.replicas)


async def test_the_rights_of_the_page_are_enough_to_confirm(any_server: EmbeddedServer) -> None:
    replica_url = allow(any_server, "replica", rights_of("replica"))
    publisher_url = allow(any_server, "publisher", [*rights_of("publisher"), *CONFIRMING])
    async with (
        Publisher(publisher_url) as publisher,
        Subscriber(replica_url, caches={"default": new_cache()}, replica_id="web-1", **SELDOM),
    ):
        receipt = await publisher.publish(Keys("key"), confirm=Confirm(timeout_seconds=20))
        assert [(each.replica, each.how) for each in confirmed_by(receipt)] == [("web-1", "message")]
        assert [each.replica for each in await publisher.replicas()] == ["web-1"]


@pytest.mark.parametrize("right", CONFIRMING)
async def test_a_publisher_without_a_right_to_confirm_is_told_which(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture, right: str
) -> None:
    rights = [*rights_of("publisher"), *(each for each in CONFIRMING if each != right)]
    url = allow(own_server, "publisher", rights)
    async with (
        Publisher(url, timeout_seconds=5) as publisher,
        Subscriber(own_server.url, caches={"default": new_cache()}, replica_id="web-1", **FAST),
    ):
        if right in {"+subscribe", CONFIRMING[0]}:
            # It hears no reports; echoes tell as well.
            receipt = await publisher.publish(Keys("key"), confirm=Confirm(timeout_seconds=20))
            assert [(each.replica, each.how) for each in confirmed_by(receipt)] == [("web-1", "echo")]
            assert named(right) in caplog.text.lower()
            return
        with pytest.raises(LogRefused) as refused:
            await publisher.replicas()
        assert named(right) in str(refused.value).lower()


async def test_a_replica_that_may_not_confirm_is_missing_and_not_confirmed(own_server: EmbeddedServer) -> None:
    rights = [right for right in rights_of("replica") if not right.endswith(":confirmed")]
    cache = new_cache()
    async with (
        Publisher(own_server.url) as publisher,
        Subscriber(
            allow(own_server, "replica", rights), caches={"default": cache}, replica_id="web-1", **SELDOM
        ) as subscriber,
    ):
        fill(cache, "key")
        receipt = await publisher.publish(Keys("key"), confirm=Confirm(timeout_seconds=0.5))
        assert confirmed_by(receipt) == [ReplicaConfirmation(replica="web-1", outcome="missing")]
        # It has dropped it, and cannot report that.
        await reached(subscriber, receipt)
        assert set(cache) == set()


async def test_a_replica_with_the_rights_of_before_is_not_listed_and_works_all_the_same(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    new = {"+time", "+zadd", "+zrangebyscore", "+zrem", "+pexpire", "+del", "&{cache-invalidation*}:confirmed"}
    rights = [right for right in rights_of("replica") if right not in new]
    async with (
        Publisher(own_server.url) as publisher,
        Subscriber(allow(own_server, "replica", rights), caches={"default": new_cache()}, **FAST) as subscriber,
    ):
        await reached(subscriber, await publisher.publish(Keys("key")))
        await until(lambda: subscriber.stats().echoes > 2)
        assert (subscriber.stats().lost, await publisher.replicas()) == (0, [])
    assert caplog.text.count("expected Redis to list replica") == 1


@pytest.mark.parametrize("right", rights_of("publisher"))
async def test_a_publisher_without_one_of_its_rights_is_told_which(own_server: EmbeddedServer, right: str) -> None:
    url = allow(own_server, "publisher", [each for each in rights_of("publisher") if each != right])
    # Entries of another program, so that the script deletes and begins the log again.
    asked(own_server.port, "XADD", "{cache-invalidation}:log", "7-0", "f", "x")
    async with Publisher(url, timeout_seconds=0.5) as publisher:

        async def do_all() -> None:
            await publisher.publish(Keys("key"))
            await publisher.head()
            await publisher.history()

        with pytest.raises((LogRefused, LinkLost)) as refused:
            await do_all()
    assert named(right) in str(refused.value).lower()


async def test_a_publisher_that_may_not_append_leaves_the_log_as_it_is(any_server: EmbeddedServer) -> None:
    """To delete it would hide what its replicas have yet to read."""
    rights = [each for each in rights_of("publisher") if each != "+xadd"]
    cache = new_cache()
    async with (
        Publisher(any_server.url) as publisher,
        Publisher(allow(any_server, "publisher", rights)) as refused,
        Subscriber(any_server.url, caches={"default": cache}, **FAST) as subscriber,
    ):
        accepted = [await publisher.publish(Keys("key")) for _ in range(5)]
        before = await publisher.history()
        for _ in range(2):
            with pytest.raises(LogRefused, match="xadd"):
                await refused.publish(Keys("key"))
        assert await publisher.history() == before
        assert asked(any_server.port, "XLEN", "{cache-invalidation}:log") == 5
        await until(lambda: subscriber.state == "coherent")
        fill(cache, "key")
        receipt = await publisher.publish(Keys("key"))
        await reached(subscriber, receipt)
        assert cache.get("key") is None
        assert position_of(receipt).epoch == position_of(accepted[-1]).epoch


NEEDED_TO_LOG = ["+xadd", "+hset", "+set", "+del", "+publish", "&cache-invalidation*"]


@pytest.mark.parametrize("right", NEEDED_TO_LOG)
async def test_a_refused_publish_has_logged_nothing_or_says_what_it_has_logged(
    any_server: EmbeddedServer, right: str
) -> None:
    url = allow(any_server, "publisher", [each for each in rights_of("publisher") if each != right])
    keys = [Keys(*(f"{number}:{'k' * 1_000}" for number in range(start, start + 60))) for start in (0, 60)]
    async with Publisher(any_server.url) as other, Publisher(url) as publisher:
        before = await other.publish(Keys("before"))
        with pytest.raises(LogRefused) as refused:
            await publisher.publish(*keys, id="once")
        assert named(right) in str(refused.value).lower() or "the user executing" in str(refused.value).lower()
        logged = [each.invalidation.id for each in await other.history() if each.invalidation is not None]
        if logged == [before.id]:
            assert await other.head() == before.position
            assert "It is in the log" not in str(refused.value)
            return
        # Redis 6 cannot tell in advance: then every part is in the log, the error says so, and a repeat adds nothing.
        assert "It is in the log" in str(refused.value)
        repeated = await publisher.publish(*keys, id="once")
        assert (repeated.is_repeat, repeated.position) == (True, await other.head())
        assert len(await other.history()) == len(logged) == 3
        assert position_of(repeated).epoch == position_of(before).epoch


async def test_what_was_logged_and_not_published_reaches_replicas_with_their_next_echo(
    any_server: EmbeddedServer,
) -> None:
    rights = [each for each in rights_of("publisher") if each != "&cache-invalidation*"]
    cache = new_cache()
    async with (
        Publisher(allow(any_server, "publisher", rights)) as publisher,
        Subscriber(any_server.url, caches={"default": cache}, **FAST) as subscriber,
    ):
        fill(cache, "key", "other")
        with pytest.raises(LogRefused) as refused:
            await publisher.publish(Keys("key"), id="once")
        if "It is in the log" in str(refused.value):
            await until(lambda: cache.get("key") is None)
            assert subscriber.stats().lost == 0
        else:
            assert cache.get("key") is not None
        assert cache.get("other") is not None


def named(right: str) -> str:
    """What Redis says when this right is missing."""
    if right.startswith("+"):
        return f"'{right[1:]}'"
    return "channel" if right.startswith("&") else "key"
