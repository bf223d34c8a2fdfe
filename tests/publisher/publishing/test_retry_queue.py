"""The retry_queue: what it holds is logged in the end, or something coarser is, and it never holds too much."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.waiting import until

from broadcache.publisher.publishing.backlog import Backlog, Pending
from broadcache.publisher.publishing.retry_queue import RetryQueue
from broadcache.shared import (
    Everything,
    IdempotencyConflict,
    Invalidation,
    Keys,
    LinkLost,
    LogRefused,
    Prefixes,
    Tags,
    Target,
)
from broadcache.shared.invalidation import Position, invalidation_of
from broadcache.shared.receipt import Receipt

pytestmark = pytest.mark.anyio

REPRODUCIBLE = settings(derandomize=True, database=None, deadline=None, max_examples=300)


def pending_of(*targets: Target, namespace: str = "products", id: str | None = None) -> Pending:
    return Pending(invalidation_of(targets, namespace=namespace, id=id), 30.0)


def backlog_of(*pending: Pending, names_max: int = 100) -> Backlog:
    backlog = Backlog(names_max=names_max, source="desk")
    for each in pending:
        assert backlog.add(each)
    return backlog


def targets_in(backlog: Backlog) -> list[tuple[Any, ...]]:
    held = [pending.invalidation for _, pending in backlog.first(1_000)]
    return [(each.keys, each.tags, each.prefixes, each.everything) for each in held]


# What is left to something newer


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        (Keys("a"), Everything()),
        (Tags("a"), Everything()),
        (Prefixes("a"), Everything()),
        (Everything(), Everything()),
        (Keys("user:7:name"), Prefixes("user:")),
        (Keys("user:"), Prefixes("user:")),
        (Prefixes("user:7:"), Prefixes("user:")),
        (Prefixes("user:"), Prefixes("user:")),
        (Keys("a", "b"), Keys("b", "c", "a")),
        (Tags("a"), Tags("b", "a")),
    ],
)
def test_what_something_newer_covers_is_left_to_it(older: Target, newer: Target) -> None:
    backlog = backlog_of(pending_of(older, id="older"), pending_of(newer, id="newer"))
    assert [pending.invalidation.id for _, pending in backlog.first(10)] == ["newer"]


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        (Keys("a", "b"), Keys("a")),
        (Keys("a"), Tags("a")),
        (Tags("a"), Keys("a")),
        (Tags("user:7"), Prefixes("user:")),
        (Keys("user"), Prefixes("user:")),
        (Prefixes("user:"), Prefixes("user:7:")),
        (Prefixes("user:"), Keys("user:")),
        (Everything(), Prefixes("a")),
        # It may have been logged, and only its answer lost, before the newer one was asked for.
        (Everything(), Keys("a")),
        (Prefixes("user:"), Keys("user:7")),
    ],
)
def test_what_nothing_newer_covers_stays(older: Target, newer: Target) -> None:
    assert len(backlog_of(pending_of(older), pending_of(newer))) == 2


def test_namespaces_do_not_cover_each_other() -> None:
    assert len(backlog_of(pending_of(Keys("a")), pending_of(Everything(), namespace="users"))) == 2


# When it is full


def test_keys_that_begin_alike_become_one_prefix_when_it_is_full() -> None:
    keys = [f"product:{number}" for number in range(6)]
    backlog = backlog_of(*[pending_of(Keys(key)) for key in keys], pending_of(Keys("alone"), Tags("t")), names_max=7)
    assert sorted(targets_in(backlog)) == [((), (), ("product:",), False), (("alone",), ("t",), (), False)]
    assert backlog.names_count == 3


def test_prefixes_that_begin_alike_become_a_shorter_one_when_it_is_full_again() -> None:
    keys = [f"user:{number}:{field}" for number in range(20) for field in ("name", "mail")]
    backlog = backlog_of(*[pending_of(Keys(key)) for key in keys], names_max=8)
    assert {prefix for _, _, prefixes, _ in targets_in(backlog) for prefix in prefixes} == {"user:"}


def test_a_namespace_without_common_prefixes_becomes_everything_and_others_stay_as_they_are() -> None:
    backlog = backlog_of(
        pending_of(Keys("a"), namespace="users"), *[pending_of(Tags(f"t{number}")) for number in range(6)], names_max=6
    )
    assert targets_in(backlog) == [(("a",), (), (), False), ((), (), (), True)]


def test_one_that_is_larger_than_all_there_is_room_for_is_held_as_something_coarser() -> None:
    backlog = backlog_of(pending_of(Keys("a", "b", "c")), names_max=2)
    assert targets_in(backlog) == [((), (), (), True)]


def test_what_is_widened_has_a_new_id_and_what_is_not_keeps_its_own() -> None:
    backlog = backlog_of(
        pending_of(Keys(*[f"p:{number}" for number in range(6)]), Tags("t"), id="part"),
        pending_of(Tags("u"), id="kept"),
        pending_of(Keys("p:6"), id="last"),
        names_max=8,
    )
    ids = {pending.invalidation.id for _, pending in backlog.first(10)}
    assert backlog.names_count == 3
    assert "kept" in ids
    # A part of it under the same id would be taken for the whole of it by a log that has that already.
    assert "part" not in ids


def test_more_namespaces_than_there_is_room_for_are_refused_and_nothing_that_is_held_is_lost() -> None:
    backlog = backlog_of(pending_of(Keys("a"), namespace="one"), pending_of(Keys("b"), namespace="two"), names_max=2)
    before = targets_in(backlog)
    assert not backlog.add(pending_of(Everything(), namespace="three"))
    assert targets_in(backlog) == before
    assert backlog.add(pending_of(Keys("c"), namespace="two"))
    assert backlog.names_count == 2


# The task


class FakeLog:
    """What the log would do, attempt by attempt. It remembers ids as append.lua does."""

    def __init__(self, *faults: str) -> None:
        self.faults = list(faults)
        self.attempts = 0
        self.logged: list[Invalidation] = []
        self.targets_by_id: dict[str, tuple[Any, ...]] = {}

    async def append(self, pending: Pending) -> Receipt:
        self.attempts += 1
        invalidation = pending.invalidation
        fault = self.faults.pop(0) if self.faults else "none"
        await asyncio.sleep(0)
        if fault == "lost":
            raise LinkLost("gone")
        if fault == "refused":
            raise LogRefused("OOM")
        if fault == "mistake":
            raise RuntimeError("ours")
        targets = (invalidation.keys, invalidation.tags, invalidation.prefixes, invalidation.everything)
        if self.targets_by_id.setdefault(invalidation.id, targets) != targets:
            raise IdempotencyConflict("other targets")
        is_repeat = invalidation.id in {each.id for each in self.logged}
        if not is_repeat:
            self.logged.append(invalidation)
        if fault == "answer lost":
            raise LinkLost("gone, and it was logged")
        return Receipt(invalidation.id, invalidation.namespace, Position("E", len(self.logged)), 0, is_repeat)


async def at_once(seconds: float) -> None:
    await asyncio.sleep(0)


async def test_what_waits_is_tried_until_it_is_logged_under_its_own_id() -> None:
    log = FakeLog("lost", "refused", "mistake", "answer lost")
    retry_queue = RetryQueue(log.append, sleep=at_once)
    assert retry_queue.offer(pending_of(Keys("a"), id="mine")) is None
    assert (len(retry_queue), retry_queue.is_stuck) == (1, True)
    await until(lambda: not len(retry_queue))
    assert ([each.id for each in log.logged], log.attempts, retry_queue.is_stuck) == (["mine"], 5, False)
    await retry_queue.close(1)


async def test_an_id_that_was_used_for_something_else_is_replaced() -> None:
    log = FakeLog()
    log.targets_by_id["taken"] = ("others",)
    retry_queue = RetryQueue(log.append, sleep=at_once)
    retry_queue.offer(pending_of(Keys("a"), id="taken"))
    await until(lambda: not len(retry_queue))
    [logged] = log.logged
    assert (logged.keys, logged.id != "taken") == (("a",), True)
    await retry_queue.close(1)


async def test_a_repeat_of_what_was_logged_before_voids_nothing_newer_that_was_left_to_it() -> None:
    log = FakeLog()
    before = pending_of(Keys("a"), id="before")
    await log.append(before)
    retry_queue = RetryQueue(log.append, sleep=at_once)
    retry_queue.offer(pending_of(Keys("a"), id="newer"))
    retry_queue.offer(before)
    await until(lambda: not len(retry_queue))
    first, second = log.logged
    assert (first.id, second.keys, second.id != "before") == ("before", ("a",), True)
    await retry_queue.close(1)


@pytest.mark.parametrize("faults", [(), ("answer lost",)])
async def test_a_repeat_that_nothing_was_left_to_is_logged_once(faults: tuple[str, ...]) -> None:
    log = FakeLog(*faults)
    retry_queue = RetryQueue(log.append, sleep=at_once)
    for _ in range(2):
        retry_queue.offer(pending_of(Keys("a"), id="mine"))
    await until(lambda: not len(retry_queue))
    assert [each.id for each in log.logged] == ["mine"]
    await retry_queue.close(1)


async def test_what_stands_for_others_is_logged_again_when_its_answer_was_lost_and_only_then() -> None:
    log = FakeLog("answer lost", "answer lost")
    retry_queue = RetryQueue(log.append, sleep=at_once)
    retry_queue.offer(pending_of(Keys("a"), id="older"))
    retry_queue.offer(pending_of(Everything(), id="newer"))
    await until(lambda: not len(retry_queue))
    # Whether the first answer was that of an earlier publish cannot be told: twice costs loads, never a stale value.
    assert [each.everything for each in log.logged] == [True, True]
    await retry_queue.close(1)


async def test_attempts_are_further_and_further_apart() -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await asyncio.sleep(0)

    log = FakeLog(*["lost"] * 12)
    retry_queue = RetryQueue(log.append, sleep=sleep, uniform=lambda: 1.0)
    retry_queue.offer(pending_of(Keys("a")))
    await until(lambda: not len(retry_queue))
    assert slept == [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert log.attempts == len(slept) + 1
    await retry_queue.close(1)


async def test_what_is_refused_for_ever_does_not_keep_others_from_the_log() -> None:
    log = FakeLog()

    async def append(pending: Pending) -> None:
        if pending.invalidation.namespace == "forbidden":
            raise LogRefused("NOPERM")
        await log.append(pending)

    retry_queue = RetryQueue(append, sleep=at_once)
    for number in range(300):
        retry_queue.offer(pending_of(Keys(f"k{number}"), namespace="forbidden"))
    retry_queue.offer(pending_of(Keys("a")))
    await until(lambda: len(retry_queue) == 300)
    assert [each.keys for each in log.logged] == [("a",)]
    await retry_queue.close(1)


async def test_what_comes_when_all_has_been_logged_is_logged_as_well() -> None:
    log = FakeLog()
    retry_queue = RetryQueue(log.append, sleep=at_once)
    for number in range(5):
        retry_queue.offer(pending_of(Keys(f"k{number}")))
        await until(lambda: not len(retry_queue))
    assert len(log.logged) == 5
    await retry_queue.close(1)


async def test_closing_tries_once_more() -> None:
    log = FakeLog("lost")
    retry_queue = RetryQueue(log.append, sleep=lambda _: asyncio.Event().wait())
    for number in range(250):
        retry_queue.offer(pending_of(Keys(f"k{number}")))
    await retry_queue.close(30)
    assert len(log.logged) == 250


async def test_closing_tells_what_is_left_and_takes_nothing_more(caplog: pytest.LogCaptureFixture) -> None:
    async def append(pending: Pending) -> None:
        await asyncio.Event().wait()

    retry_queue = RetryQueue(append)
    retry_queue.offer(pending_of(Keys("a")))
    retry_queue.offer(pending_of(Keys("b"), namespace="users"))
    await retry_queue.close(0)
    await retry_queue.close(0)
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.name == "broadcache.publisher"
    assert "2 invalidations that Redis has not logged, of the namespaces products, users:" in record.getMessage()
    assert retry_queue.offer(pending_of(Keys("a"))) == "the publisher was closed"
    assert len(retry_queue) == 0


async def test_closing_that_is_cancelled_tells_what_is_left_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    has_begun = asyncio.Event()

    async def append(pending: Pending) -> None:
        has_begun.set()
        await asyncio.Event().wait()

    retry_queue = RetryQueue(append)
    retry_queue.offer(pending_of(Keys("a")))
    await has_begun.wait()
    has_begun.clear()
    closing = asyncio.create_task(retry_queue.close(60))
    await has_begun.wait()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert "1 invalidations that Redis has not logged" in caplog.text


async def test_a_prefix_covers_thousands_of_keys_at_once() -> None:
    backlog = backlog_of(*[pending_of(Keys(f"product:{number}")) for number in range(5_000)], names_max=10_000)
    assert backlog.add(pending_of(Prefixes("product:", "x", "product:7")))
    assert len(backlog) == 1


# Whatever happens

names = st.lists(st.sampled_from(["a", "p:1", "p:2", "p:q:1", "p:q:2", "p/", "z.1", "z.2"]), min_size=1, max_size=3)
targets = st.one_of(
    st.builds(lambda found: Keys(*found), names),
    st.builds(lambda found: Tags(*found), names),
    st.builds(lambda found: Prefixes(*found), names),
    st.just(Everything()),
)
offers = st.tuples(st.sampled_from(["one", "two", "three"]), targets, st.sampled_from([None, "same", "other"]))
steps = st.lists(st.one_of(offers, st.integers(min_value=1, max_value=5)), max_size=40)
faults = st.lists(st.sampled_from(["none", "lost", "answer lost", "refused", "mistake"]), max_size=40)


def assert_covers(logged: Sequence[Invalidation], offered: Invalidation) -> None:
    """Whatever `offered` drops, these drop between them. Said here anew, as a replica would see it."""
    of_namespace = [each for each in logged if each.namespace == offered.namespace]
    if any(each.everything for each in of_namespace):
        return
    prefixes = [prefix for each in of_namespace for prefix in each.prefixes]
    assert not offered.everything
    for key in offered.keys:
        assert any(key in each.keys for each in of_namespace) or any(map(key.startswith, prefixes)), key
    for tag in offered.tags:
        assert any(tag in each.tags for each in of_namespace), tag
    for prefix in offered.prefixes:
        assert any(map(prefix.startswith, prefixes)), prefix


@REPRODUCIBLE
@given(steps=steps, faults=faults, names_max=st.integers(min_value=1, max_value=12))
def test_whatever_was_offered_is_dropped_by_what_is_logged_after_it_and_the_bound_holds(
    steps: list[tuple[str, Target, str | None] | int], faults: list[str], names_max: int
) -> None:
    async def story() -> None:
        log = FakeLog(*faults)
        retry_queue = RetryQueue(log.append, names_max=names_max, sleep=at_once)
        offered: list[tuple[int, Invalidation]] = []
        for step in steps:
            if isinstance(step, int):
                for _ in range(step):
                    await asyncio.sleep(0)
            else:
                namespace, target, id = step
                pending = pending_of(target, namespace=namespace, id=None if id is None else f"{namespace} {id}")
                if id is not None and pending.invalidation.id in {each.id for each in log.logged}:
                    continue  # a retry of what is in the log already: the publish itself would have been told so
                refusal = retry_queue.offer(pending)
                assert refusal is None or len({namespace for namespace, *_ in namespaces_of(steps)}) > names_max
                if refusal is None:
                    offered.append((len(log.logged), pending.invalidation))
            assert retry_queue.names_count <= names_max
            assert len(retry_queue) <= retry_queue.names_count
        await until(lambda: not len(retry_queue))
        await retry_queue.close(0)
        for place, invalidation in offered:
            assert_covers(log.logged[place:], invalidation)

    asyncio.run(story())


def namespaces_of(steps: list[tuple[str, Target, str | None] | int]) -> list[tuple[str, Target, str | None]]:
    return [step for step in steps if not isinstance(step, int)]
