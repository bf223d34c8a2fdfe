"""Who has dropped it: each replica says so itself, and whoever does not is named.

The negative control of all of it is the receivers count of PUBLISH: it counts a replica that is frozen.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import msgspec
import pytest
from tests.support.child_replica import KEY, child_replica
from tests.support.redis_probe import redis_probe
from tests.support.registry import make_registry_old
from tests.support.replicas import FAST, fill, new_cache, reached
from tests.support.tcp_proxy import TcpProxy
from tests.support.topologies import cluster_of_three, watched
from tests.support.waiting import until

from broadcache.publisher import Confirm, Publisher
from broadcache.publisher.publishing.confirmations import Wait
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
from broadcache.shared.errors import MalformedFrame
from broadcache.shared.invalidation import Anchor, Invalidation, invalidation_of
from broadcache.shared.presence import Presence
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.link import Link, Refused
from broadcache.shared.transport.redis.log import Entry, read_after
from broadcache.shared.transport.redis.names import names_of
from broadcache.shared.transport.redis.registry import Registries, Registry
from broadcache.shared.wire import decode, digest_of, encode, encode_tails, frame_at
from broadcache.subscriber import LocalCache, Subscriber
from broadcache.subscriber.following.reporter import Reporter
from broadcache.subscriber.following.sequencer import Sequencer

pytestmark = pytest.mark.anyio

PATIENT = Confirm(timeout_seconds=20.0)
"""For who is sure to confirm: the test ends when they have."""
IMPATIENT = Confirm(timeout_seconds=1.0)
"""For who is sure not to."""
SELDOM = {**FAST, "echo_interval_seconds": 4.0}
"""Echoes that do not come before the test is over: only a report can confirm."""
LISTED_LONG = {**FAST, "echo_timeout_seconds": 30.0}
"""A replica that is listed for long after its last echo."""


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
        await make_registry_old(url, namespace)
        yield caches


async def logged(publisher: Publisher, sequence: int = 1) -> None:
    """Return when the log has so many invalidations."""
    while (position := await publisher.head("products")) is None or position.sequence < sequence:
        await asyncio.sleep(0.01)


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


async def test_where_no_replica_has_ever_been_a_confirmation_is_empty_and_not_complete(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        confirmation = confirmation_of(await publisher.publish(Keys("a"), confirm=PATIENT))
        assert (confirmation.replicas, confirmation.is_complete) == ((), False)
        assert confirmation.doubt is not None
        assert "the registry of 'default' is missing" in confirmation.doubt


async def test_where_the_last_replica_has_closed_a_confirmation_is_complete_and_empty(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        async with replicas(redis_url, "one"):
            pass
        confirmation = confirmation_of(await publisher.publish(Keys("a"), namespace="products", confirm=PATIENT))
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
        # While it is registered, it is seen to be behind; then it is silent, and serves nothing any more.
        [seen] = [each for each in await publisher.replicas("products") if each.replica == "frozen"]
        assert seen.behind == 1
        while [each.replica for each in await publisher.replicas("products") if not each.is_silent] != ["awake"]:
            await asyncio.sleep(0.01)
        again = confirmation_of(await publisher.publish(Keys(KEY), namespace="products", confirm=PATIENT))
        assert (again.expected, again.silent, again.is_complete) == (("awake",), ("frozen",), True)
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
        await logged(publisher)
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


async def test_a_replica_that_registers_while_the_invalidation_is_logged_is_expected(
    own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have loaded before the acceptance what the invalidation names, and have been cut off before it came."""
    read, looks = Registries.read, 0
    async with (
        Publisher(own_server.url) as publisher,
        replicas(own_server.url, "one"),
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        AsyncExitStack() as stack,
    ):

        async def read_before_another_comes(registries: Registries, link: Link, namespace: str) -> Registry:
            nonlocal looks
            looks += 1
            registry = await read(registries, link, namespace)
            if looks == 1:
                late = Subscriber(proxy.url, caches={namespace: new_cache()}, replica_id="late", **LISTED_LONG)
                await stack.enter_async_context(late)
                proxy.black_hole()
            return registry

        monkeypatch.setattr(Registries, "read", read_before_another_comes)
        confirmation = confirmation_of(await publisher.publish(Keys("a"), namespace="products", confirm=IMPATIENT))
        assert (confirmation.expected, confirmation.missing) == (("late", "one"), ("late",))
        assert not confirmation.is_complete


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
    monkeypatch.setattr(Reporter, "record", lambda self, sequencer: sequencer.reports.clear())
    async with Publisher(redis_url) as publisher, replicas(redis_url, "mute"):
        confirmation = confirmation_of(await publisher.publish(Keys("a"), namespace="products", confirm=PATIENT))
        assert [(each.outcome, each.how, each.dropped) for each in confirmation.replicas] == [
            ("confirmed", "echo", None)
        ]


async def test_without_report_and_echo_nothing_is_confirmed(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reporter, "record", lambda self, sequencer: sequencer.reports.clear())
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
        assert receipt.position is not None
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
        await publisher.publish(Keys("z"), namespace="products")
        async with replicas(proxy.url, "away", **SELDOM) as [cache]:
            fill(cache, "a", "b")
            proxy.black_hole("to_client")
            publishing = asyncio.create_task(publisher.publish(Keys("a"), namespace="products", confirm=PATIENT))
            await logged(publisher, 2)
            assert set(cache) == {"a", "b"}
            proxy.heal()
            await proxy.cut()
            [away] = confirmation_of(await publishing).replicas
            assert (away.replica, away.outcome) == ("away", "confirmed")
            # It was replayed, not cleared. The report may lose its race against the echo with which a new link begins.
            await until(lambda: set(cache) == {"b"})


# --- what confirms ---------------------------------------------------------------------------------------------------


def sent_as(id: str = "id", *targets: Target) -> Invalidation:
    return invalidation_of(targets or [Keys("a")], namespace="products", id=id, confirm=True)


def frames_of(sent: Invalidation, last: int, epoch: str = "e") -> dict[int, bytes]:
    """The frames that the log has of it, by sequence, when it has the last of them at `last`."""
    tails = encode_tails(sent)
    first = last - len(tails) + 1
    return {first + place: frame_at(Position(epoch, first + place), tail) for place, tail in enumerate(tails)}


def entries_of(frames: dict[int, bytes]) -> dict[int, Entry]:
    return {sequence: Entry(sequence, decode(frame, "products"), frame) for sequence, frame in frames.items()}


def receipt_at(sent: Invalidation, sequence: int, *, is_repeat: bool = False) -> Receipt:
    return Receipt(sent.id, "products", Position("e", sequence), receivers=1, is_repeat=is_repeat)


def waiting_for(sent: Invalidation, *replicas: str) -> Wait:
    wait = Wait(sent, clock=lambda: 0.0)
    wait.expect(replicas)
    return wait


def proven(replica: str, epoch: str, sequence: int, digest: str | None) -> Presence:
    return Presence(replica=replica, position=Position(epoch, sequence), digest=digest)


def test_a_proven_position_confirms_only_in_the_history_that_the_log_has() -> None:
    sent, later = sent_as(), sent_as("later", Keys("b"))
    ours, at_nine = frames_of(sent, 5), frames_of(later, 9)
    digest, digest_at_nine = digest_of(ours[5]), digest_of(at_nine[9])
    confirming = [proven("there", "e", 5, digest), proven("ahead", "e", 9, digest_at_nine)]
    others = [
        proven("another history", "e", 9, digest),
        proven("another frame", "e", 5, digest_at_nine),
        proven("trimmed", "e", 7, digest),
        proven("unknown", "e", 9, None),
        proven("elsewhere", "f", 9, digest_at_nine),
        proven("behind", "e", 4, digest),
        Presence(replica="nowhere"),
    ]
    wait = waiting_for(sent, *(each.replica for each in (*confirming, *others)))
    assert wait.reaching(confirming) == []  # it is not known yet where the log has it
    wait.accept(receipt_at(sent, 5))
    reaching = wait.reaching([*confirming, *others])
    assert set(wait.sequences(reaching)) == {5, 7, 9}
    wait.record_positions(reaching, entries_of(ours | at_nine))
    assert wait.missing == [each.replica for each in others]
    assert [each.how for each in wait.confirmation().replicas if each.outcome == "confirmed"] == ["echo", "echo"]


@pytest.mark.parametrize("stands_there", [None, sent_as("another"), sent_as("id", Keys("b"))])
@pytest.mark.parametrize("is_repeat", [False, True])
def test_no_position_confirms_what_the_log_does_not_have(stands_there: Invalidation | None, is_repeat: bool) -> None:
    sent, later = sent_as(), sent_as("later")
    at_nine = frames_of(later, 9)
    ahead = proven("ahead", "e", 9, digest_of(at_nine[9]))
    wait = waiting_for(sent, "ahead")
    wait.accept(receipt_at(sent, 5, is_repeat=is_repeat))
    found = {} if stands_there is None else frames_of(stands_there, 5)
    wait.record_positions([ahead], entries_of(found | at_nine))
    assert wait.missing == ["ahead"]
    # The negative control: what it has is this invalidation.
    wait.record_positions([ahead], entries_of(frames_of(sent, 5) | at_nine))
    assert wait.missing == []


def test_a_repeat_is_compared_by_its_id_and_targets() -> None:
    first = msgspec.structs.replace(sent_as(), source="another", sent_at_ms=1, reason="the first attempt")
    again = sent_as()
    logged = frames_of(first, 5)
    assert logged != frames_of(again, 5)
    there = proven("there", "e", 5, digest_of(logged[5]))
    wait = waiting_for(again, "there", "reporting")
    wait.accept(receipt_at(again, 5, is_repeat=True))
    wait.record_report("reporting", Report(id="id", epoch="e", seq=5, digest=digest_of(logged[5])))
    assert wait.missing == ["there", "reporting"]
    wait.record_positions([there], entries_of(logged))
    assert wait.missing == []
    # The negative control: what was logged by this publish is compared byte for byte.
    wait = waiting_for(again, "there")
    wait.accept(receipt_at(again, 5))
    wait.record_positions([there], entries_of(logged))
    assert wait.missing == ["there"]


def test_a_report_confirms_only_with_the_digest_of_the_frame() -> None:
    sent = sent_as()
    wait = waiting_for(sent, "one")
    wait.accept(receipt_at(sent, 5))
    forged = digest_of(frames_of(sent_as("id", Keys("b")), 5)[5])
    for epoch, digest in (("e", None), ("e", forged), ("e", ""), ("f", digest_of(frames_of(sent, 5, "f")[5]))):
        wait.record_report("one", Report(id="id", epoch=epoch, seq=5, digest=digest))
    assert wait.missing == ["one"]
    # The negative control.
    wait.record_report("one", Report(id="id", epoch="e", seq=5, digest=digest_of(frames_of(sent, 5)[5]), dropped=2))
    assert [(each.outcome, each.dropped) for each in wait.confirmation().replicas] == [("confirmed", 2)]


def test_a_split_invalidation_is_not_confirmed_by_the_report_of_one_part() -> None:
    sent = sent_as("id", Keys(*(f"{number:04}".ljust(1_000, "x") for number in range(150))))
    frames = frames_of(sent, 5)
    assert list(frames) == [3, 4, 5]
    for left_out in frames:
        wait = waiting_for(sent, "one")
        wait.accept(receipt_at(sent, 5))
        reports = {
            sequence: Report(id=f"id.{sequence - 2}", epoch="e", seq=sequence, digest=digest_of(frame), dropped=1)
            for sequence, frame in frames.items()
        }
        last = reports.pop(left_out)
        for report in reports.values():
            wait.record_report("one", report)
        assert wait.missing == ["one"]
        wait.record_report("one", last)
        assert [(each.outcome, each.dropped) for each in wait.confirmation().replicas] == [("confirmed", 3)]


def test_a_frame_that_came_twice_is_counted_as_it_was_dropped_first() -> None:
    sent = sent_as()
    wait = waiting_for(sent, "one", "two")
    wait.accept(receipt_at(sent, 5))
    for dropped in (3, 0):
        wait.record_report("two", Report(id="id", digest=digest_of(frames_of(sent, 5)[5]), dropped=dropped))
    assert wait.confirmation().replicas[1].dropped == 3


async def test_reports_heard_before_the_log_has_answered_count() -> None:
    sent = sent_as()
    wait = waiting_for(sent, "one")
    wait.record_report("one", Report(id="id", epoch="e", seq=5, digest=digest_of(frames_of(sent, 5)[5])))
    assert wait.missing == ["one"]
    wait.accept(receipt_at(sent, 5))
    await wait.until_complete()


def test_an_own_invalidation_confirms_and_a_forged_one_with_its_id_does_not() -> None:
    own = sent_as("own")
    for sent, missing in ((own, []), (sent_as("own", Keys("b")), ["one"])):
        sequencer = Sequencer("products", [new_cache()])
        sequencer.restart(Anchor("e", 4, ""), "subscribed")
        sequencer.apply_own(own)
        sequencer.receive(frames_of(sent, 5)[5])
        wait = waiting_for(own, "one")
        wait.accept(receipt_at(own, 5))
        for report, _ in sequencer.reports:
            wait.record_report("one", report)
        assert wait.missing == missing


async def frozen_and_waited_for(publisher: Publisher, *targets: Target) -> asyncio.Task[Receipt]:
    """A publish that waits, once the log has it."""
    publishing = asyncio.create_task(
        publisher.publish(*targets, namespace="products", id="x", confirm=Confirm(timeout_seconds=1.5))
    )
    await logged(publisher)
    return publishing


@pytest.mark.parametrize("is_forged", [True, False])
async def test_a_report_of_the_right_id_with_another_digest_confirms_nothing(redis_url: str, is_forged: bool) -> None:
    async with (
        Publisher(redis_url) as publisher,
        redis_probe(redis_url) as probe,
        child_replica(redis_url, "products", "frozen", **LISTED_LONG) as child,
    ):
        await make_registry_old(redis_url)
        child.freeze()
        publishing = await frozen_and_waited_for(publisher, Keys("a"))
        [entry] = await read_after(probe, "products", after=0, count=2)
        digest = "0" * 40 if is_forged else entry.digest
        head = await publisher.head("products")
        assert head is not None
        report = Report(id="x", epoch=head.epoch, seq=1, digest=digest)
        await probe.call("PUBLISH", names_of("products").confirmed, encode_reports("frozen", [report]))
        confirmation = confirmation_of(await publishing)
        assert (confirmation.missing, confirmation.is_complete) == (("frozen",) if is_forged else (), not is_forged)


@pytest.mark.parametrize("parts_reported", [1, 2])
async def test_reports_of_some_parts_confirm_nothing(redis_url: str, parts_reported: int) -> None:
    names = Keys(*(f"{number:04}".ljust(1_000, "x") for number in range(100)))
    async with (
        Publisher(redis_url) as publisher,
        redis_probe(redis_url) as probe,
        child_replica(redis_url, "products", "frozen", **LISTED_LONG) as child,
    ):
        await make_registry_old(redis_url)
        child.freeze()
        publishing = await frozen_and_waited_for(publisher, names)
        entries = await read_after(probe, "products", after=0, count=10)
        assert len(entries) == 2
        reports = [
            Report(id=entry.invalidation.id, epoch=entry.invalidation.epoch, seq=entry.sequence, digest=entry.digest)
            for entry in entries[-parts_reported:]
            if entry.invalidation is not None
        ]
        await probe.call("PUBLISH", names_of("products").confirmed, encode_reports("frozen", reports))
        confirmation = confirmation_of(await publishing)
        assert confirmation.missing == (("frozen",) if parts_reported == 1 else ())


@pytest.mark.parametrize("is_of_this_history", [False, True])
async def test_a_replica_in_another_history_is_missing_although_its_number_is_higher(
    redis_url: str, is_of_this_history: bool
) -> None:
    names = names_of("products")
    async with (
        Publisher(redis_url) as publisher,
        redis_probe(redis_url) as probe,
        child_replica(redis_url, "products", "frozen", **LISTED_LONG) as child,
    ):
        await make_registry_old(redis_url)
        child.freeze()
        publishing = await frozen_and_waited_for(publisher, Keys("a"))
        later = (await publisher.publish(Keys("b"), namespace="products")).position
        assert later is not None
        [entry] = await read_after(probe, "products", after=1, count=2)
        # As if it were at a primary that was demoted, and had other frames there under the same numbers.
        digest = entry.digest if is_of_this_history else "0" * 40
        presence = proven("frozen", later.epoch, later.sequence, digest)
        await probe.call("SET", names.presence_prefix + "frozen", msgspec.json.encode(presence), "PX", 60_000)
        confirmation = confirmation_of(await publishing)
        assert confirmation.missing == (() if is_of_this_history else ("frozen",))
        assert [each.how for each in confirmation.replicas] == ["echo" if is_of_this_history else None]


# --- whether every replica is known ----------------------------------------------------------------------------------


async def flush(probe: Link) -> None:
    await probe.call("FLUSHALL")


async def delete(probe: Link) -> None:
    assert await probe.call("DEL", names_of("products").registry) == 1


async def evict(probe: Link) -> None:
    """Have the server evict what it may: all that is kept for a time only, like the registry."""
    registry = names_of("products").registry
    await probe.call("CONFIG", "SET", "maxmemory-policy", "volatile-ttl")
    await probe.call("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(Refused, match="OOM"):
        await probe.call("SET", "one", "more")
    assert not await probe.call("EXISTS", registry)
    await probe.call("CONFIG", "SET", "maxmemory", "0")


@pytest.mark.parametrize("lose", [delete, evict, flush])
async def test_with_the_registry_lost_a_confirmation_is_not_complete_while_a_stalled_replica_serves(
    own_server: EmbeddedServer, lose: Callable[[Link], Awaitable[None]]
) -> None:
    cache = new_cache(max_staleness_seconds=30.0)
    options = {**FAST, "echo_timeout_seconds": 30.0}
    async with (
        TcpProxy("127.0.0.1", own_server.port) as proxy,
        Publisher(own_server.url) as publisher,
        redis_probe(own_server.url) as probe,
        Subscriber(proxy.url, caches={"products": cache}, replica_id="stalled", **options),
        replicas(own_server.url, "awake"),
    ):
        fill(cache, "a")
        proxy.black_hole("to_client")
        # The negative control: while it is registered, it is named.
        before = confirmation_of(await publisher.publish(Keys("b"), namespace="products", confirm=IMPATIENT))
        assert (before.missing, before.doubt, before.is_complete) == (("stalled",), None, False)
        await lose(probe)
        while not await probe.call("ZSCORE", names_of("products").registry, "awake"):
            pass
        confirmation = confirmation_of(await publisher.publish(Keys("a"), namespace="products", confirm=PATIENT))
        assert (cache.get("a"), confirmation.missing) == ("old", ())
        assert confirmation.confirmed == ("awake",)
        assert not confirmation.is_complete
        assert confirmation.doubt is not None
        assert "has existed for only" in confirmation.doubt


@pytest.mark.parametrize("lose", [delete, flush])
async def test_with_no_registry_at_all_a_confirmation_is_not_complete(
    own_server: EmbeddedServer, lose: Callable[[Link], Awaitable[None]]
) -> None:
    async with (
        Publisher(own_server.url) as publisher,
        redis_probe(own_server.url) as probe,
        child_replica(own_server.url, "products", "stalled", **LISTED_LONG) as child,
    ):
        child.freeze()
        await lose(probe)
        confirmation = confirmation_of(await publisher.publish(Keys(KEY), namespace="products", confirm=PATIENT))
        assert (confirmation.replicas, confirmation.is_complete) == ((), False)
        assert confirmation.doubt is not None
        assert "is missing" in confirmation.doubt


async def test_the_doubt_ends_when_the_registry_is_older_than_the_longest_lease(redis_url: str) -> None:
    cache = new_cache(max_staleness_seconds=0.5)
    async with (
        Publisher(redis_url) as publisher,
        Subscriber(redis_url, caches={"products": cache}, replica_id="one", **FAST),
    ):
        publish = partial(publisher.publish, Keys("a"), namespace="products", confirm=PATIENT)
        first = confirmation_of(await publish())
        assert (first.confirmed, first.is_complete) == (("one",), False)
        while not (last := confirmation_of(await publish())).is_complete:
            pass
        assert (last.confirmed, last.doubt) == (("one",), None)


async def test_the_longest_lease_that_a_publisher_has_seen_counts_when_the_log_has_lost_it(
    own_server: EmbeddedServer,
) -> None:
    patient, quick = new_cache(max_staleness_seconds=60.0), new_cache(max_staleness_seconds=0.5)
    async with Publisher(own_server.url) as old, Publisher(own_server.url) as new, redis_probe(own_server.url) as probe:
        async with Subscriber(own_server.url, caches={"products": patient}, replica_id="patient", **FAST):
            await old.publish(Keys("a"), namespace="products", confirm=PATIENT)
        await probe.call("FLUSHALL")
        async with Subscriber(own_server.url, caches={"products": quick}, replica_id="quick", **FAST):
            publish = partial(new.publish, Keys("a"), namespace="products", confirm=PATIENT)
            while not confirmation_of(await publish()).is_complete:
                pass
            confirmation = confirmation_of(await old.publish(Keys("a"), namespace="products", confirm=PATIENT))
            assert confirmation.doubt is not None


@pytest.mark.parametrize(
    ("command", "doubt"),
    [
        (("ZREMRANGEBYSCORE", names_of("products").registry, "9e15", "+inf"), "has no creation time"),
        (("HDEL", names_of("products").head, "lease_ms"), "does not have the longest lease"),
    ],
)
async def test_a_registry_that_does_not_tell_its_age_or_lease_is_a_doubt(
    redis_url: str, command: tuple[str, ...], doubt: str
) -> None:
    async with Publisher(redis_url) as publisher, redis_probe(redis_url) as probe, replicas(redis_url, "one", **SELDOM):
        publish = partial(publisher.publish, Keys("a"), namespace="products", confirm=PATIENT)
        assert confirmation_of(await publish()).is_complete
        assert await probe.call(*command) == 1
        confirmation = confirmation_of(await publish())
        assert (confirmation.confirmed, confirmation.is_complete) == (("one",), False)
        assert confirmation.doubt is not None
        assert doubt in confirmation.doubt


@pytest.mark.parametrize(
    ("age_ms", "lease_ms", "doubt"),
    [
        (5_000, 5_000, None),
        (4_999, 5_000, "for up to 0.0 s more"),
        (1_250, 5_000, "for up to 3.8 s more"),
        (-3_000, 5_000, "has existed for only 0.0 s"),
        (None, 5_000, "no creation time"),
        (5_000, None, "lease_ms"),
    ],
)
def test_a_registry_is_believed_once_it_is_as_old_as_the_longest_lease(
    age_ms: int | None, lease_ms: int | None, doubt: str | None
) -> None:
    said = Registry("products", is_there=True, left_ms={}, age_ms=age_ms, lease_ms=lease_ms).doubt
    assert said is None if doubt is None else doubt in (said or "")


async def test_since_when_the_registry_exists_is_no_replica(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher, replicas(redis_url, "one"):
        assert [each.replica for each in await publisher.replicas("products")] == ["one"]
        confirmation = confirmation_of(await publisher.publish(Keys("a"), namespace="products", confirm=PATIENT))
        assert confirmation.expected == ("one",)


# --- the replica's side ----------------------------------------------------------------------------------------------


def test_own_and_repeated_messages_are_reported_too() -> None:
    sequencer = Sequencer("products", [new_cache()])
    sequencer.restart(Anchor("e", 0, ""), "subscribed")
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
        ("own", 1, "applied"),
        ("other", 2, "applied"),
        ("other", 2, "applied"),
        ("ahead", 4, "applied"),
        ("ahead", 4, "applied"),
    ]


async def test_more_reports_than_there_is_room_for_are_left_out_and_never_block(redis_url: str) -> None:
    sequencer = Sequencer("products", [new_cache()])
    reporter = Reporter("one", unix_ms=lambda: 1_000.0)
    for number in range(12_000):
        sequencer.reports.append((Report(id=f"{number}", epoch="e", seq=number), 990))
        reporter.record(sequencer)
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
            await logged(publisher)
            for text in ("yes", '{"replica":"frozen","reports":[{"id":"another"}]}', '{"replica":"frozen"}'):
                await probe.call("PUBLISH", names_of("products").confirmed, text)
            assert confirmation_of(await publishing).missing == ("frozen",)
        assert "ignored a message on the channel for confirmations" in caplog.text


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
        # The link for reports delivers none any more, until its channel is subscribed to again over a new link.
        confirmations = publisher._confirmations
        assert confirmations is not None
        confirmations._namespaces.clear()
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
            await logged(publisher)
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
