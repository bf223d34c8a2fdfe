"""RecordingPublisher: it accepts what the real publishers accept, refuses what they refuse, and records the rest."""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from broadcache.publisher import Publisher, SyncPublisher
from broadcache.shared import (
    Confirm,
    Everything,
    IdempotencyConflict,
    InvalidNamespace,
    InvalidSettings,
    InvalidTarget,
    Keys,
    LinkLost,
    Prefixes,
    Receipt,
    Tags,
)
from broadcache.testing import RecordingPublisher

pytestmark = pytest.mark.anyio

NAMES = 10_000


async def real(url: str, publish: Callable[[Any], Any]) -> Receipt:
    async with Publisher(url, source="recording-publisher") as publisher:
        receipt: Receipt = await publish(publisher)
        return receipt


CALLS: list[Callable[[Any], Any]] = [
    lambda publisher: publisher.publish(Keys("product:42"), namespace="products", reason="price"),
    lambda publisher: publisher.publish(Keys("a", "b"), Tags("shop:7"), Prefixes("user:")),
    lambda publisher: publisher.publish(Everything(), namespace="users"),
    lambda publisher: publisher.publish(Keys(*(f"product:{number}" for number in range(NAMES)))),
]


@pytest.mark.parametrize("call", CALLS)
async def test_a_receipt_is_that_of_the_real_publisher(call: Callable[[Any], Any], redis_url: str) -> None:
    recorder = RecordingPublisher()
    expected, receipt = await real(redis_url, call), await call(recorder)
    assert type(receipt) is Receipt
    assert expected.position is not None
    assert receipt.position is not None
    assert (receipt.namespace, receipt.position.sequence) == (expected.namespace, expected.position.sequence)
    assert (receipt.is_logged, receipt.is_repeat, receipt.pending, receipt.fanout) == (True, False, False, None)
    assert len(receipt.position.epoch) == len(expected.position.epoch)
    [published] = recorder.published
    assert (published.id, published.position, published.source) == (receipt.id, receipt.position, recorder.source)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda publisher: publisher.publish(), InvalidTarget),
        (lambda publisher: publisher.publish("product:42"), InvalidTarget),
        (lambda publisher: publisher.publish(Everything(), Keys("a")), InvalidTarget),
        (lambda publisher: publisher.publish(Keys("a"), reason="x" * 10_000), InvalidTarget),
        (lambda publisher: publisher.publish(Keys("a"), id=""), InvalidTarget),
        (lambda publisher: publisher.publish(Keys("a"), scope="x" * 10_000), InvalidTarget),
        (lambda publisher: publisher.publish(Keys("a"), namespace="not valid"), InvalidNamespace),
        (lambda publisher: publisher.publish(Keys("a"), confirm=True), InvalidSettings),
        (lambda publisher: publisher.publish(Keys("a"), receipt_seconds=float("nan")), InvalidSettings),
        (lambda publisher: publisher.publish(Keys("a"), receipt_seconds="60"), InvalidSettings),
        (lambda publisher: publisher.publish(Keys("a"), nmaespace="products"), TypeError),
    ],
)
async def test_what_the_real_publisher_refuses_is_refused_with_the_same_text(
    call: Callable[[Any], Any], error: type[Exception], redis_url: str
) -> None:
    recorder = RecordingPublisher()
    with pytest.raises(error) as expected:
        await real(redis_url, call)
    with pytest.raises(error) as got:
        await call(recorder)
    assert str(got.value).replace("RecordingPublisher", "Publisher") == str(expected.value)
    assert recorder.published == []


async def test_an_id_is_published_once_in_its_scope() -> None:
    recorder = RecordingPublisher()
    first = recorder.publish(Keys("a"), id="order-1")
    again = recorder.publish(Keys("a"), id="order-1")
    other = recorder.publish(Keys("a"), id="order-1", scope="orders")
    assert (first.is_repeat, again.is_repeat, other.is_repeat) == (False, True, False)
    assert (first.position, len(recorder.published)) == (again.position, 2)
    with pytest.raises(IdempotencyConflict, match="used before for other targets"):
        recorder.publish(Keys("b"), id="order-1")


def test_publish_takes_what_both_publishers_take() -> None:
    parameters = [dict(inspect.signature(kind.publish).parameters) for kind in (Publisher, SyncPublisher)]
    assert (
        parameters[0].keys() == parameters[1].keys() == inspect.signature(RecordingPublisher.publish).parameters.keys()
    )


def test_one_publisher_serves_code_with_and_without_an_event_loop() -> None:
    recorder = RecordingPublisher()
    with recorder as entered:
        assert entered is recorder
        assert recorder.publish(Keys("a")).is_logged

    async def use() -> None:
        async with recorder:
            assert (await recorder.publish(Keys("b"))).is_logged
            together = await asyncio.gather(recorder.publish(Keys("c")), asyncio.create_task(_published(recorder)))
            async with asyncio.TaskGroup() as tasks:
                task = tasks.create_task(recorder.publish(Keys("e")))
            assert [each.is_logged for each in (*together, task.result())] == [True] * 3
            await recorder.close()

    asyncio.run(use())
    recorder.close()
    assert [each.keys for each in recorder.published] == [("a",), ("b",), ("c",), ("d",), ("e",)]
    with pytest.raises(InvalidSettings, match="the publisher is closed"):
        recorder.publish(Keys("f"))


async def _published(recorder: RecordingPublisher) -> Receipt:
    return await recorder.publish(Keys("d"))


def test_a_failure_is_raised_and_nothing_is_recorded() -> None:
    recorder = RecordingPublisher()
    recorder.failure = LinkLost("Redis is away")
    with pytest.raises(LinkLost, match="Redis is away"):
        recorder.publish(Keys("a"))
    recorder.failure = None
    receipt = recorder.publish(Keys("a"), confirm=Confirm())
    assert receipt.confirmation is not None
    assert (len(recorder.published), receipt.confirmation.expected) == (1, ())
    assert repr(recorder) == "<RecordingPublisher 'recording-publisher', 1 published>"
