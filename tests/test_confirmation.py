"""Who has dropped it: each replica says so itself, and whoever does not is named.

The negative control of all of it is the receivers count of PUBLISH: it counts a replica that is frozen.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from tests.support.child_replica import KEY, child_replica
from tests.support.redis_probe import redis_probe
from tests.support.replicas import FAST, fill, new_cache, reached
from tests.support.tcp_proxy import TcpProxy
from tests.support.topologies import cluster_of_three, watched
from tests.support.waiting import until

from broadcache.publisher import Confirm, Publisher
from broadcache.publisher.confirmations import Wait
from broadcache.shared import (
    Confirmation,
    Everything,
    InvalidSettings,
    Keys,
    LogRefused,
    Position,
    Prefixes,
    Receipt,
    ReplicaConfirmation,
    ReplicaPresence,
    Tags,
    Target,
)
from broadcache.shared.confirmation import Report, decode_reports, encode_reports
from broadcache.shared.embedded import EmbeddedServer
from broadcache.shared.errors import MalformedFrame
from broadcache.shared.invalidation import invalidation_of
from broadcache.shared.names import names_of
from broadcache.shared.presence import Presence
from broadcache.shared.wire import encode
from broadcache.subscriber import LocalCache, Subscriber
from broadcache.subscriber.reporter import Reporter
from broadcache.subscriber.sequencer import Sequencer

pytestmark = pytest.mark.anyio

PATIENT = Confirm(timeout_seconds=20.0)
"""For who is sure to confirm: the test ends when they have."""
IMPATIENT = Confirm(timeout_seconds=1.0)
"""For who is sure not to."""
SELDOM = {**FAST, "echo_interval_seconds": 4.0}
"""Echoes that do not come before the test is over: only a report can confirm."""


def confirmation_of(receipt: Receipt) -> Confirmation:
    assert receipt.confirmation is not None
    return receipt.confirmation


@asynccontextmanager
async def replicas(
    url: str, *names: str, namespace: str = "products", **options: Any
) -> AsyncIterator[list[LocalCache]]:
    async with AsyncExitStack() as stack:
        caches = []
        for name in names:
            caches.append(new_cache())
            await stack.enter_async_context(
                Subscriber(url, caches={namespace: caches[-1]}, replica_id=name, **(options or FAST))
            )
        yield caches


async def seen_at(publisher: Publisher, replica: str, position: Position | None) -> ReplicaPresence:
    """What a replica says once its echo has told that it is coherent and at `position`."""
    while True:
        for each in await publisher.replicas("products"):
            if (each.replica, each.position, each.state) == (replica, position, "coherent"):
                return each
        await asyncio.sleep(0.01)


async def test_a_publish_that_is_not_asked_to_confirm_does_not(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher, replicas(redis_url, "one"):
        assert (await publisher.publish(Keys("a"), namespace="products")).confirmation is None


async def test_every_live_replica_confirms_with_what_it_dropped(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher, replicas(redis_url, "one", "two", **SELDOM) as caches:
        fill(caches[0], "a", "b")
        fill(caches[1], "a")
        receipt = await publisher.publish(Keys("a", "b", "c"), namespace="products", confirm=PATIENT)
        assert [set(cache) for cache in caches] == [set(), set()]
        confirmation = confirmation_of(receipt)
        assert confirmation.expected == confirmation.confirmed == ("one", "two")
        assert (confirmation.missing, confirmation.is_complete) == ((), True)
        assert [(each.replica, each.outcome, each.how, each.dropped) for each in confirmation.replicas] == [
            ("one", "confirmed", "message", 2),
            ("two", "confirmed", "message", 1),
        ]
        for each in confirmation.replicas:
            assert each.latency_ms is not None
            assert each.latency_ms > 0


@pytest.mark.parametrize(
    ("target", "dropped"), [(Keys("a"), 1), (Tags("red"), 2), (Prefixes("a"), None), (Everything(), 3)]
)
async def test_what_was_dropped_is_counted_where_it_can_be(redis_url: str, target: Target, dropped: int | None) -> None:
    async with Publisher(redis_url) as publisher, replicas(redis_url, "one") as [cache]:
        for key in ("a", "ab", "c"):
            assert cache.store(cache.begin_load(key), 1, tags=("red",) if key != "c" else ())
        [one] = confirmation_of(await publisher.publish(target, namespace="products", confirm=PATIENT)).replicas
        assert (one.outcome, one.dropped) == ("confirmed", dropped)


async def test_with_nobody_there_a_confirmation_is_complete_and_empty(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        confirmation = confirmation_of(await publisher.publish(Keys("a"), confirm=PATIENT))
        assert (confirmation.replicas, confirmation.is_complete) == ((), True)


async def test_a_frozen_replica_is_named_and_when_thawed_it_bypasses_and_catches_up(redis_url: str) -> None:
    async with (
        Publisher(redis_url) as publisher,
        replicas(redis_url, "awake") as [cache],
        child_replica(redis_url, "products", "frozen", max_staleness_seconds=3.0, **FAST) as child,
    ):
        first = await publisher.publish(Keys(KEY), namespace="products", confirm=PATIENT)
        assert confirmation_of(first).confirmed == ("awake", "frozen")
        before = await seen_at(publisher, "frozen", first.position)
        fill(cache, KEY)
        child.freeze()
        receipt = await publisher.publish(Keys(KEY), namespace="products", confirm=IMPATIENT)
        # The negative control: PUBLISH says that two have received it, and one of them serves the old value.
        assert receipt.receivers == 2
        confirmation = confirmation_of(receipt)
        assert (confirmation.expected, confirmation.confirmed) == (("awake", "frozen"), ("awake",))
        assert (confirmation.missing, confirmation.is_complete) == (("frozen",), False)
        missing = confirmation.replicas[1]
        assert missing == ReplicaConfirmation(replica="frozen", outcome="missing")
        # While it is listed, it is seen to be behind; then it is gone, and serves nothing any more.
        [seen] = [each for each in await publisher.replicas("products") if each.replica == "frozen"]
        assert seen.behind == 1
        while len(await publisher.replicas("products")) > 1:
            await asyncio.sleep(0.01)
        again = confirmation_of(await publisher.publish(Keys(KEY), namespace="products", confirm=PATIENT))
        assert again.expected == ("awake",)
        child.wake()
        thawed = await seen_at(publisher, "frozen", await publisher.head("products"))
        assert (thawed.is_coherent, thawed.behind) == (True, 0)
        assert thawed.bypassed > before.bypassed
        last = await publisher.publish(Keys(KEY), namespace="products", confirm=PATIENT)
        assert confirmation_of(last).confirmed == ("awake", "frozen")


async def test_a_replica_that_thaws_within_the_time_confirms(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher, child_replica(redis_url, "products", "slow", **SELDOM) as child:
        child.freeze()
        publishing = asyncio.create_task(publisher.publish(Keys(KEY), namespace="products", confirm=PATIENT))
        while await publisher.head("products") is None:
            await asyncio.sleep(0.01)
        assert not publishing.done()
        child.wake()
        confirmation = confirmation_of(await publishing)
        assert [(each.replica, each.outcome, each.dropped) for each in confirmation.replicas] == [
            ("slow", "confirmed", 1)
        ]


async def test_a_killed_replica_is_missing_as_long_as_it_is_expected(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        async with child_replica(redis_url, "products", "doomed", **FAST) as child:
            child.kill()
        confirmation = confirmation_of(await publisher.publish(Keys("a"), namespace="products", confirm=IMPATIENT))
        assert (confirmation.expected, confirmation.missing) == (("doomed",), ("doomed",))


async def test_a_replica_that_is_not_registered_and_confirms_is_listed_too(redis_url: str) -> None:
    async with (
        Publisher(redis_url) as publisher,
        redis_probe(redis_url) as probe,
        replicas(redis_url, "known", "unknown", **SELDOM),
        child_replica(redis_url, "products", "frozen", **SELDOM) as child,
    ):
        child.freeze()
        assert await probe.call("ZREM", names_of("products").registry, "unknown") == 1
        confirmation = confirmation_of(await publisher.publish(Keys("a"), namespace="products", confirm=IMPATIENT))
        assert confirmation.expected == ("frozen", "known")
        assert confirmation.confirmed == ("known", "unknown")
        assert [each.is_expected for each in confirmation.replicas] == [True, True, False]


async def test_a_report_that_is_lost_is_made_up_for_by_an_echo(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reporter, "take", lambda self, sequencer: sequencer.reports.clear())
    async with Publisher(redis_url) as publisher, replicas(redis_url, "mute"):
        confirmation = confirmation_of(await publisher.publish(Keys("a"), namespace="products", confirm=PATIENT))
        assert [(each.outcome, each.how, each.dropped) for each in confirmation.replicas] == [
            ("confirmed", "echo", None)
        ]


async def test_without_report_and_echo_nothing_is_confirmed(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reporter, "take", lambda self, sequencer: sequencer.reports.clear())
    async with Publisher(redis_url) as publisher, replicas(redis_url, "mute", **SELDOM) as [cache]:
        fill(cache, "a")
        confirmation = confirmation_of(await publisher.publish(Keys("a"), namespace="products", confirm=IMPATIENT))
        assert set(cache) == set()  # it was applied, and nobody knows
        assert confirmation.missing == ("mute",)


async def test_a_repeat_is_confirmed_by_positions(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher, replicas(redis_url, "one"):
        first = await publisher.publish(Keys("a"), namespace="products", id="the same")
        again = await publisher.publish(Keys("a"), namespace="products", id="the same", confirm=PATIENT)
        assert (again.is_repeat, again.position) == (True, first.position)
        assert [(each.outcome, each.how) for each in confirmation_of(again).replicas] == [("confirmed", "echo")]


async def test_a_split_invalidation_is_confirmed_when_its_last_part_is_applied(redis_url: str) -> None:
    names = [f"{number:04}".ljust(1_000, "x") for number in range(200)]
    async with Publisher(redis_url) as publisher, replicas(redis_url, "one", **SELDOM) as [cache]:
        fill(cache, names[0], names[100], names[-1])
        receipt = await publisher.publish(Keys(*names), namespace="products", confirm=PATIENT)
        assert receipt.position.sequence > 3
        [one] = confirmation_of(receipt).replicas
        assert (one.outcome, one.how, one.dropped) == ("confirmed", "message", 3)
        assert set(cache) == set()


async def test_many_confirmed_publishes_at_once_are_told_apart(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher, replicas(redis_url, "one", "two") as caches:
        for cache in caches:
            fill(cache, *(f"k{number}" for number in range(0, 200, 2)))
        receipts = await asyncio.gather(
            *[publisher.publish(Keys(f"k{number}"), namespace="products", confirm=PATIENT) for number in range(200)]
        )
        for number, receipt in enumerate(receipts):
            expected = 0 if number % 2 else 1
            confirmation = confirmation_of(receipt)
            assert confirmation.confirmed == ("one", "two")
            for each in confirmation.replicas:
                assert (each.dropped, each.how) in {(expected, "message"), (None, "echo")}


async def test_a_replica_that_was_away_confirms_after_it_has_replayed(own_server: EmbeddedServer) -> None:
    async with TcpProxy("127.0.0.1", own_server.port) as proxy, Publisher(own_server.url) as publisher:
        first = await publisher.publish(Keys("z"), namespace="products")
        async with replicas(proxy.url, "away", **SELDOM) as [cache]:
            fill(cache, "a", "b")
            proxy.black_hole("to_client")
            publishing = asyncio.create_task(publisher.publish(Keys("a"), namespace="products", confirm=PATIENT))
            while await publisher.head("products") == first.position:
                await asyncio.sleep(0.01)
            assert set(cache) == {"a", "b"}
            proxy.heal()
            await proxy.cut()
            [away] = confirmation_of(await publishing).replicas
            assert (away.replica, away.outcome) == ("away", "confirmed")
            # It was replayed, not cleared. The report may lose its race against the echo with which a new link begins.
            await until(lambda: set(cache) == {"b"})


async def test_a_clear_that_covers_it_confirms_it(redis_url: str) -> None:
    wait = Wait("id", clock=lambda: 0.0)
    wait.expect(["ahead", "elsewhere", "behind"])
    wait.take_position(Presence(replica="ahead", position=Position("e", 9)))
    assert wait.missing == ["ahead", "elsewhere", "behind"]  # nobody knows yet where the log has it
    wait.accept(Position("e", 5))
    wait.take_position(Presence(replica="ahead", position=Position("e", 5)))
    wait.take_position(Presence(replica="elsewhere", position=Position("f", 9)))
    wait.take_position(Presence(replica="behind", position=Position("e", 4)))
    assert wait.missing == ["elsewhere", "behind"]


def test_a_report_of_a_part_or_of_another_epoch_confirms_nothing() -> None:
    wait = Wait("id", clock=lambda: 0.0)
    wait.expect(["one"])
    wait.take("one", Report(id="id.1", epoch="e", seq=4, dropped=1))
    wait.accept(Position("e", 5))
    wait.take("one", Report(id="id.2", epoch="f", seq=5, dropped=1))
    wait.take("one", Report(id="id.2", dropped=1))
    assert wait.missing == ["one"]
    wait.take("one", Report(id="id.2", epoch="e", seq=5, dropped=2))
    assert wait.confirmation().replicas[0].outcome == "confirmed"


async def test_reports_heard_before_the_log_has_answered_count(redis_url: str) -> None:
    wait = Wait("id", clock=lambda: 0.0)
    wait.expect(["one"])
    wait.take("one", Report(id="id", epoch="e", seq=5))
    assert wait.missing == ["one"]
    wait.accept(Position("e", 5))
    await wait.until_complete()


# --- the replica's side ----------------------------------------------------------------------------------------------


def test_own_and_repeated_messages_are_reported_too() -> None:
    sequencer = Sequencer("products", [new_cache()])
    sequencer.restart(Position("e", 0), "subscribed")
    own = invalidation_of([Keys("a")], namespace="products", id="own", confirm=True)
    sequencer.apply_own(own)

    def frame(seq: int, id: str, *, confirm: bool = True) -> bytes:
        sent = invalidation_of([Keys("a")], namespace="products", id=id, confirm=confirm)
        return encode(sent)[:-1].replace(b'"epoch":null,"seq":null', b'"epoch":"e","seq":%d' % seq) + b"}"

    for seq, id in ((1, "own"), (2, "other"), (2, "other"), (4, "ahead")):
        sequencer.receive(frame(seq, id))
    sequencer.receive(frame(3, "unasked", confirm=False))
    sequencer.receive(frame(4, "ahead"))
    assert [(report.id, report.seq, report.outcome) for report, _ in sequencer.reports] == [
        ("own", 1, "own"),
        ("other", 2, "applied"),
        ("other", 2, "duplicate"),
        ("ahead", 4, "applied"),
    ]


async def test_more_reports_than_there_is_room_for_are_left_out_and_never_block(redis_url: str) -> None:
    sequencer = Sequencer("products", [new_cache()])
    reporter = Reporter("one", unix_ms=lambda: 1_000.0)
    for number in range(12_000):
        sequencer.reports.append((Report(id=f"{number}", epoch="e", seq=number), 990))
        reporter.take(sequencer)
    assert (reporter.left_out, reporter.lag_ms("products"), reporter.lag_ms("users")) == (2_000, 10.0, None)
    heard: list[bytes] = []
    async with (
        redis_probe(redis_url) as link,
        redis_probe(redis_url, on_message=lambda _, frame: heard.append(frame)) as ear,
    ):
        await ear.subscribe(names_of("products").confirmed)
        sending = asyncio.create_task(reporter.send_for_ever(link))
        await until(lambda: len(heard) == 100)
        sending.cancel()
        await asyncio.wait([sending])
    ids = [report.id for frame in heard for report in decode_reports(frame).reports]
    assert ids == [f"{number}" for number in range(10_000)]
    assert max(map(len, heard)) < 65_536


@pytest.mark.parametrize(
    "frame", [b"", b"now", b"[]", b"{}", b'{"replica":7}', b"\xff", b'{"replica":"a","reports":[1]}']
)
def test_a_confirmation_that_cannot_be_read_is_an_error_of_one_kind(frame: bytes) -> None:
    with pytest.raises(MalformedFrame, match=r"^invalid confirmation"):
        decode_reports(frame)


def test_a_confirmation_is_read_back_and_what_is_new_in_it_is_skipped() -> None:
    reports = [Report(id="a", epoch="e", seq=1, dropped=2), Report(id="b")]
    assert decode_reports(encode_reports("one", reports)).reports == tuple(reports)
    read = decode_reports(b'{"replica":"one","mood":1,"reports":[{"id":"a","outcome":"dreamt","new":[]}]}')
    assert [report.outcome for report in read.reports] == ["dreamt"]


async def test_rubbish_on_the_channel_confirms_nothing(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with (
        Publisher(redis_url) as publisher,
        redis_probe(redis_url) as probe,
        child_replica(redis_url, "products", "frozen", **FAST) as child,
    ):
        child.freeze()
        with caplog.at_level(logging.WARNING, logger="broadcache"):
            publishing = asyncio.create_task(
                publisher.publish(Keys("a"), namespace="products", id="x", confirm=Confirm(timeout_seconds=0.5))
            )
            while await publisher.head("products") is None:
                await asyncio.sleep(0.01)
            for text in ("yes", '{"replica":"frozen","reports":[{"id":"another"}]}', '{"replica":"frozen"}'):
                await probe.call("PUBLISH", names_of("products").confirmed, text)
            assert confirmation_of(await publishing).missing == ("frozen",)
        assert "proves nothing" in caplog.text


# --- when something fails --------------------------------------------------------------------------------------------


async def test_a_link_for_reports_that_is_lost_is_made_anew(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher, redis_probe(redis_url) as probe, replicas(redis_url, "one"):
        for _ in range(3):
            receipt = await publisher.publish(Keys("a"), namespace="products", confirm=PATIENT)
            assert confirmation_of(receipt).is_complete
            clients: bytes = await probe.call("CLIENT", "LIST")
            assert clients.count(b"name=broadcache:confirmations ") == 1
            [line] = [line for line in clients.splitlines() if b"name=broadcache:confirmations " in line]
            await probe.call("CLIENT", "KILL", "ID", line.partition(b" ")[0].removeprefix(b"id=").decode())
    async with redis_probe(redis_url) as probe:
        await until_gone(probe)


async def until_gone(probe: object) -> None:
    while b"name=broadcache:" in await probe.call("CLIENT", "LIST"):  # type: ignore[attr-defined]
        await asyncio.sleep(0.01)


async def test_a_silent_link_for_reports_is_not_trusted_twice(own_server: EmbeddedServer) -> None:
    async with (
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        Publisher(proxy.url) as publisher,
        replicas(own_server.url, "one"),
    ):
        await publisher.publish(Keys("a"), namespace="products", confirm=PATIENT)
        # Both links of the publisher fall silent; the one that is asked something finds out, the other one cannot.
        confirmations = publisher._confirmations
        silent = confirmations._heard_over["products"]
        silent._on_message = lambda channel, frame: None
        silent._reader.cancel()
        await asyncio.wait([silent._reader])
        confirmation = confirmation_of(await publisher.publish(Keys("b"), namespace="products", confirm=PATIENT))
        assert [each.how for each in confirmation.replicas] == ["echo"]
        confirmation = confirmation_of(await publisher.publish(Keys("c"), namespace="products", confirm=PATIENT))
        assert [each.how for each in confirmation.replicas] == ["message"]


async def test_a_publisher_that_closes_while_it_waits_ends_and_leaves_no_connection(redis_url: str) -> None:
    async with redis_probe(redis_url) as probe, child_replica(redis_url, "products", "frozen") as child:
        publisher = Publisher(redis_url)
        async with publisher:
            child.freeze()
            publishing = asyncio.create_task(publisher.publish(Keys("a"), namespace="products", confirm=PATIENT))
            while await publisher.head("products") is None:
                await asyncio.sleep(0.01)
        assert confirmation_of(await publishing).missing == ("frozen",)
        while b"name=broadcache:publisher" in (clients := await probe.call("CLIENT", "LIST")):
            await asyncio.sleep(0.01)
        assert b"name=broadcache:confirmations" not in clients


async def test_a_registry_that_cannot_be_read_is_told_before_anything_is_published(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher, redis_probe(redis_url) as probe:
        await probe.call("SET", names_of("products").registry, "somebody else's")
        with pytest.raises(LogRefused, match="replicas of 'products'"):
            await publisher.publish(Keys("a"), namespace="products", confirm=PATIENT)
        assert await publisher.head("products") is None


@pytest.mark.parametrize("timeout_seconds", [0, -1, 61, float("nan")])
def test_a_time_to_wait_that_makes_no_sense_is_refused(timeout_seconds: float) -> None:
    with pytest.raises(InvalidSettings, match="timeout_seconds"):
        Confirm(timeout_seconds=timeout_seconds)


# --- several servers -------------------------------------------------------------------------------------------------


async def test_replicas_in_a_cluster_confirm_over_the_slot_of_their_namespace() -> None:
    with cluster_of_three() as cluster:
        namespaces = cluster.namespaces()
        caches = {namespace: new_cache() for namespace in namespaces}
        async with (
            Publisher(cluster.url) as publisher,
            Subscriber(cluster.url, caches=caches, replica_id="one", **SELDOM),
        ):
            for namespace in namespaces:
                fill(caches[namespace], "a")
                receipt = await publisher.publish(Keys("a"), namespace=namespace, confirm=PATIENT)
                [one] = confirmation_of(receipt).replicas
                assert (one.replica, one.how, one.dropped) == ("one", "message", 1)


async def test_behind_sentinels_replicas_confirm_before_and_after_a_failover(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with watched(tmp_path_factory.mktemp("sentinels")) as servers:
        async with (
            Publisher(servers.url, timeout_seconds=30) as publisher,
            Subscriber(servers.url, caches={"products": new_cache()}, replica_id="one", **FAST) as subscriber,
        ):
            first = await publisher.publish(Keys("a"), namespace="products", confirm=PATIENT)
            assert confirmation_of(first).confirmed == ("one",)
            await asyncio.to_thread(servers.fail_over)
            await reached(subscriber, await publisher.publish(Keys("a"), namespace="products"))
            last = await publisher.publish(Keys("a"), namespace="products", confirm=PATIENT)
            assert confirmation_of(last).confirmed == ("one",)
