"""The publisher, against a real server: what it says was logged was logged, once."""

import asyncio
from collections.abc import Callable

import pytest
from tests.support.receipts import position_of
from tests.support.redis_probe import redis_probe
from tests.support.tcp_proxy import TcpProxy

from broadcache.publisher import Publisher
from broadcache.shared import (
    Everything,
    IdempotencyConflict,
    InvalidNamespace,
    InvalidSettings,
    InvalidTarget,
    Keys,
    LinkLost,
    LogRefused,
    Prefixes,
    Tags,
)
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.link import Link
from broadcache.shared.transport.redis.log import Entry, names_of

pytestmark = pytest.mark.anyio

LOG = names_of("default").log


async def log_length_of(url: str, log: str = LOG) -> int:
    async with redis_probe(url) as probe:
        length = await probe.call("XLEN", log)
        assert isinstance(length, int)
        return length


async def client_count_of(probe: Link, name: str = "broadcache:publisher") -> int:
    clients: bytes = await probe.call("CLIENT", "LIST")
    return clients.count(f"name={name} ".encode())


async def test_a_receipt_says_where_the_log_holds_it(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        first = await publisher.publish(Keys("product:42"), Tags("catalogue"), namespace="products", reason="price")
        second = await publisher.publish(Everything(), namespace="products")
        assert first.namespace == "products"
        assert (position_of(first).sequence, position_of(second).sequence) == (1, 2)
        assert position_of(first).epoch == position_of(second).epoch
        assert first.id != second.id
        assert (first.receivers, first.is_repeat) == (0, False)
        assert await publisher.head("products") == second.position
        assert await publisher.head("others") is None


async def test_history_shows_what_was_published_newest_first(redis_url: str) -> None:
    async with Publisher(redis_url, source="desk") as publisher:
        for number in range(5):
            await publisher.publish(Keys(f"product:{number}"), reason=f"reason {number}")
        newest = await publisher.history(count=2)
        older = await publisher.history(count=10, before=newest[-1].sequence)
    assert [entry.sequence for entry in newest + older] == [5, 4, 3, 2, 1]
    invalidation = newest[0].invalidation
    assert invalidation is not None
    assert (invalidation.keys, invalidation.reason, invalidation.source) == (("product:4",), "reason 4", "desk")


async def test_a_long_history_is_read_in_pages_that_leave_nothing_out(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        await asyncio.gather(*[publisher.publish(Keys("k")) for _ in range(250)])
        entries: list[Entry] = await publisher.history(count=1_000)
        assert [entry.sequence for entry in entries] == list(range(250, 0, -1))
        assert len(await publisher.history(count=201)) == 201


async def test_what_is_in_the_log_and_no_invalidation_is_shown_as_such(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher, redis_probe(redis_url) as probe:
        await publisher.publish(Keys("k"))
        await probe.call("XADD", LOG, "2-0", "f", "now")
        entries = await publisher.history()
    assert [(entry.sequence, entry.invalidation is None) for entry in entries] == [(2, True), (1, False)]


async def test_a_publisher_that_was_not_entered_says_so(redis_url: str) -> None:
    with pytest.raises(InvalidSettings, match=r"use it within `async with`"):
        await Publisher(redis_url).publish(Keys("k"))


async def test_closing_is_harmless_at_any_time(redis_url: str) -> None:
    publisher = Publisher(redis_url)
    await publisher.close()
    async with publisher:
        await publisher.publish(Keys("k"))
        await publisher.close()
        await publisher.close()
    with pytest.raises(InvalidSettings):
        await publisher.publish(Keys("k"))


async def test_a_closed_publisher_can_be_entered_again(redis_url: str) -> None:
    publisher = Publisher(redis_url)
    for sequence in (1, 2):
        async with publisher:
            assert position_of(await publisher.publish(Keys("k"))).sequence == sequence


async def test_a_publish_that_is_under_way_when_the_publisher_closes_raises_and_leaves_no_connection(
    own_server: EmbeddedServer,
) -> None:
    async with TcpProxy("127.0.0.1", own_server.port) as proxy, Publisher(proxy.url) as publisher:
        await publisher.publish(Keys("k"))
        proxy.black_hole("to_client")
        publishing = asyncio.create_task(publisher.publish(Keys("k")))
        await proxy.has_discarded(1)
        await publisher.close()
        with pytest.raises(LinkLost, match="closed"):
            await publishing
        assert proxy.connections_accepted == 1


async def test_a_publish_that_is_connecting_when_the_publisher_closes_raises_link_lost(
    own_server: EmbeddedServer,
) -> None:
    async with TcpProxy("127.0.0.1", own_server.port) as proxy, Publisher(proxy.url) as publisher:
        proxy.black_hole("to_client")
        publishing = asyncio.create_task(publisher.publish(Keys("k")))
        await proxy.has_discarded(1)
        await publisher.close()
        with pytest.raises(LinkLost, match="closed"):
            await publishing


async def test_a_cancelled_publish_is_cancelled(own_server: EmbeddedServer) -> None:
    async with TcpProxy("127.0.0.1", own_server.port) as proxy, Publisher(proxy.url) as publisher:
        proxy.black_hole("to_client")
        publishing = asyncio.create_task(publisher.publish(Keys("k")))
        await proxy.has_discarded(1)
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publishing


async def test_concurrent_publishes_share_one_connection_and_get_a_sequence_each(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher, redis_probe(redis_url) as probe:
        receipts = await asyncio.gather(*[publisher.publish(Keys(f"k{number}")) for number in range(100)])
        assert await client_count_of(probe) == 1
    assert sorted(position_of(receipt).sequence for receipt in receipts) == list(range(1, 101))
    assert len({receipt.id for receipt in receipts}) == 100


async def test_publishing_again_with_the_same_id_logs_once(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        first = await publisher.publish(Keys("k"), id="order-7")
        again = await publisher.publish(Keys("k"), id="order-7", reason="a retry may say so")
    assert again == first._replace(is_repeat=True)
    assert await log_length_of(redis_url) == 1


async def test_the_same_id_with_other_targets_is_a_conflict(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        await publisher.publish(Keys("k"), id="order-7")
        for target in (Keys("other"), Tags("k"), Prefixes("k"), Everything()):
            with pytest.raises(IdempotencyConflict, match="order-7"):
                await publisher.publish(target, id="order-7")
        await publisher.publish(Keys("other"), id="order-7", namespace="another")
    assert await log_length_of(redis_url) == 1


async def test_a_publish_whose_answer_is_lost_is_tried_again_and_logged_once(own_server: EmbeddedServer) -> None:
    async with TcpProxy("127.0.0.1", own_server.port) as proxy, Publisher(proxy.url) as publisher:
        await publisher.publish(Keys("before"))
        proxy.black_hole("to_client")
        publishing = asyncio.create_task(publisher.publish(Keys("k")))
        await proxy.has_discarded(1)  # the server has run it, and its answer is gone
        proxy.heal()
        receipt = await publishing
        assert (position_of(receipt).sequence, receipt.is_repeat) == (2, True)
        assert proxy.connections_accepted >= 2
    assert await log_length_of(own_server.url) == 2


async def test_publishes_survive_killed_connections_and_are_logged_once(own_server: EmbeddedServer) -> None:
    sequences: list[int] = []
    async with Publisher(own_server.url) as publisher, redis_probe(own_server.url) as probe:
        for _ in range(5):
            batch = [asyncio.create_task(publisher.publish(Keys(f"k{number}"))) for number in range(20)]
            await probe.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            sequences += [position_of(receipt).sequence for receipt in await asyncio.gather(*batch)]
    assert sorted(sequences) == list(range(1, 101))
    assert await log_length_of(own_server.url) == 100


@pytest.mark.parametrize("timeout_seconds", [0.3, 3.0])
async def test_a_link_that_keeps_silent_is_given_up_for_a_new_one(
    own_server: EmbeddedServer, timeout_seconds: float
) -> None:
    async with (
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        Publisher(proxy.url, timeout_seconds=timeout_seconds) as publisher,
    ):
        await publisher.publish(Keys("k"))
        proxy.black_hole()
        with pytest.raises(LinkLost):
            await publisher.publish(Keys("k"))
        assert proxy.connections_accepted >= 2
        proxy.heal()
        await publisher.publish(Keys("k"))


async def test_a_redis_that_is_away_is_told_with_what_to_do_and_publishing_goes_on_when_it_is_back(
    own_server: EmbeddedServer,
) -> None:
    async with Publisher(own_server.url, timeout_seconds=0.3) as publisher:
        await publisher.publish(Keys("k"))
        own_server.kill()
        with pytest.raises(LinkLost) as caught:
            await publisher.publish(Keys("k"), id="order-7")
        assert "within 0.3 s" in str(caught.value)
        assert "publish again with id='order-7', which is harmless" in str(caught.value)
        for read in (publisher.head, publisher.history):
            with pytest.raises(LinkLost):
                await read()
        own_server.restart()
        assert position_of(await publisher.publish(Keys("k"), id="order-7")).sequence == 1


async def test_a_redis_that_starts_late_is_waited_for(own_server: EmbeddedServer) -> None:
    await asyncio.to_thread(own_server.kill)
    async with Publisher(own_server.url, timeout_seconds=20) as publisher:
        publishing = asyncio.create_task(publisher.publish(Keys("k")))
        await asyncio.to_thread(own_server.restart)
        assert position_of(await publishing).sequence == 1


async def test_a_full_redis_refuses_and_nothing_is_logged(own_server: EmbeddedServer) -> None:
    async with Publisher(own_server.url) as publisher, redis_probe(own_server.url) as probe:
        before = await publisher.publish(Keys("k"))
        await probe.call("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(LogRefused, match="OOM"):
            await publisher.publish(Keys("k"))
        assert await publisher.head() == before.position
        assert await probe.call("XLEN", LOG) == 1
        await probe.call("CONFIG", "SET", "maxmemory", "0")
        assert position_of(await publisher.publish(Keys("k"))).sequence == 2


async def test_a_read_only_replica_refuses(own_server: EmbeddedServer) -> None:
    async with Publisher(own_server.url) as publisher, redis_probe(own_server.url) as probe:
        await probe.call("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(LogRefused, match="READONLY"):
            await publisher.publish(Keys("k"))


async def test_what_was_lost_on_the_way_and_what_was_refused_are_both_told(own_server: EmbeddedServer) -> None:
    async with (
        redis_probe(own_server.url) as probe,
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        Publisher(proxy.url, timeout_seconds=1.0) as publisher,
    ):
        await publisher.publish(Keys("k"))
        await probe.call("REPLICAOF", "127.0.0.1", "1")
        proxy.black_hole("to_server")
        publishing = asyncio.create_task(publisher.publish(Keys("k2")))
        await proxy.has_discarded(1)
        proxy.heal()  # which ends the link that lost something
        # It may have been logged: that comes first, and it is the kind of error.
        with pytest.raises(LinkLost, match=r"publish again with id=.* besides: .*READONLY"):
            await publishing


async def test_a_user_without_the_right_is_refused_and_no_password_is_shown(own_server: EmbeddedServer) -> None:
    async with redis_probe(own_server.url) as probe:
        await probe.call("ACL", "SETUSER", "limited", "on", ">hunter2", "~other:*", "&*", "+@all")
    url = own_server.url.replace("redis://", "redis://limited:hunter2@")
    async with Publisher(url) as publisher:
        calls: list[Callable[[], object]] = [lambda: publisher.publish(Keys("k")), publisher.head, publisher.history]
        for call in calls:
            with pytest.raises(LogRefused, match="NOPERM") as caught:
                await call()  # type: ignore[misc]
            assert "hunter2" not in str(caught.value)


async def test_a_wrong_password_is_told_and_not_shown(own_server: EmbeddedServer) -> None:
    url = own_server.url.replace("redis://", "redis://:hunter2@")
    async with redis_probe(own_server.url) as probe:
        await probe.call("CONFIG", "SET", "requirepass", "swordfish")
    async with Publisher(url, timeout_seconds=0.3) as publisher:
        with pytest.raises(LinkLost, match=r"(?i)password|WRONGPASS") as caught:
            await publisher.publish(Keys("k"))
    assert "hunter2" not in str(caught.value)


async def test_the_parts_of_a_large_invalidation_stand_together_in_the_log(redis_url: str) -> None:
    large = Keys(*[f"{number:04}" + "x" * 1_000 for number in range(200)])
    async with Publisher(redis_url) as publisher, Publisher(redis_url) as other:
        receipts = await asyncio.gather(
            *[publisher.publish(large, id=f"large-{number}") for number in range(3)],
            *[other.publish(Keys("small"), id=f"small-{number}") for number in range(50)],
        )
        entries = await publisher.history(count=1_000)
    ids = [entry.invalidation.id for entry in reversed(entries) if entry.invalidation is not None]
    for receipt in receipts[:3]:
        parts = [place for place, id in enumerate(ids, start=1) if id.startswith(f"{receipt.id}.")]
        assert len(parts) >= 4
        assert parts == list(range(parts[0], parts[0] + len(parts)))
        assert position_of(receipt).sequence == parts[-1]
        assert [ids[place - 1] for place in parts] == [f"{receipt.id}.{number}" for number in range(1, len(parts) + 1)]


async def test_users_mistakes_raise_before_anything_is_sent(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        with pytest.raises(InvalidTarget, match="at least one target"):
            await publisher.publish()
        with pytest.raises(InvalidTarget, match="at reason"):
            await publisher.publish(Keys("k"), reason="x" * 2_000)
        for id in ("", "x" * 129):
            with pytest.raises(InvalidTarget, match="at id"):
                await publisher.publish(Keys("k"), id=id)
        with pytest.raises(InvalidNamespace):
            await publisher.publish(Keys("k"), namespace="no spaces")
        with pytest.raises(InvalidNamespace):
            await publisher.history("no spaces")
    assert await log_length_of(redis_url) == 0


@pytest.mark.parametrize(
    "arguments",
    [{"timeout_seconds": 0}, {"timeout_seconds": -1}, {"timeout_seconds": float("nan")}, {"log_length": 0}],
)
def test_settings_that_make_no_sense_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(InvalidSettings, match=next(iter(arguments))):
        Publisher("redis://127.0.0.1:6379", **arguments)  # type: ignore[arg-type]


def test_a_url_that_is_none_is_refused_without_its_password() -> None:
    with pytest.raises(InvalidSettings, match="expected a URL") as caught:
        Publisher("http://user:hunter2@example.test")
    assert "hunter2" not in str(caught.value)


# Whose id it is


async def test_an_id_that_two_publishers_use_stands_for_two_invalidations(redis_url: str) -> None:
    async with (
        Publisher(redis_url, source="orders") as orders,
        Publisher(redis_url, source="prices") as prices,
    ):
        first = await orders.publish(Keys("a"), id="change-7")
        second = await prices.publish(Keys("a"), id="change-7")
        assert [receipt.is_repeat for receipt in (first, second)] == [False, False]
        assert [position_of(receipt).sequence for receipt in (first, second)] == [1, 2]
        # Nor does one stand in the way of the other's with other targets.
        await orders.publish(Keys("b"), id="change-8")
        assert position_of(await prices.publish(Keys("c"), id="change-8")).sequence == 4


async def test_a_publisher_that_was_restarted_repeats_its_own_ids(redis_url: str) -> None:
    receipts = []
    for _ in range(2):
        async with Publisher(redis_url, source="orders") as publisher:
            receipts.append(await publisher.publish(Keys("a"), id="change-7"))
    assert [receipt.is_repeat for receipt in receipts] == [False, True]
    assert receipts[0].position == receipts[1].position


async def test_those_who_share_a_publisher_have_scopes_of_their_own(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        scopes = ("orders", "prices", None, "orders")
        receipts = [await publisher.publish(Keys("a"), id="change-7", scope=scope) for scope in scopes]
        assert [receipt.is_repeat for receipt in receipts] == [False, False, False, True]
        with pytest.raises(IdempotencyConflict):
            await publisher.publish(Keys("b"), id="change-7", scope="orders")
        with pytest.raises(InvalidTarget, match="not empty, got '' at scope"):
            await publisher.publish(Keys("b"), id="change-7", scope="")
