"""A publisher that is used from one event loop after another, as asgiref's `async_to_sync` does, or from several."""

import asyncio
import gc
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest
from tests.support.redis_probe import redis_probe

from broadcache.publisher import Confirm, Publisher
from broadcache.shared import FanoutReport, InvalidSettings, Keys, LinkLost, NotConnected, NotDelivered
from broadcache.shared.errors import BroadcacheError
from broadcache.shared.transport.redis.embedded import EmbeddedServer

T = TypeVar("T")

FORK = multiprocessing.get_context("fork")


class Sender:
    """A fan-out that reaches no replica, and belongs to the event loop that it was entered on."""

    def __init__(self) -> None:
        self.loops: list[asyncio.AbstractEventLoop] = []
        self.closed = 0

    async def __aenter__(self) -> "Sender":
        self.loops.append(asyncio.get_running_loop())
        return self

    async def close(self) -> None:
        self.closed += 1

    async def send(self, frames: object) -> FanoutReport:
        assert self.loops[-1] is asyncio.get_running_loop(), "a sender that is used on the loop it was entered on"
        return FanoutReport(
            service="web",
            total=1,
            succeeded=0,
            failed=1,
            complete=True,
            discovery="dns",
            elapsed_ms=0.0,
            outcomes=(),
        )


def in_a_loop_of_its_own(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Do `work` as `async_to_sync` does: on a new event loop, in a thread that ends with it."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(asyncio.run(work())))
    thread.start()
    thread.join()
    [result] = results
    return result


def links_of_publishers(url: str) -> int:
    async def count() -> int:
        async with redis_probe(url) as probe:
            clients: bytes = await probe.call("CLIENT", "LIST")
            return clients.count(b"name=broadcache:publisher ") + clients.count(b"name=broadcache:confirmations ")

    return asyncio.run(count())


def test_a_publisher_goes_on_over_three_loops_one_after_another(redis_url: str) -> None:
    publisher = Publisher(redis_url)
    asyncio.run(publisher.__aenter__())
    for run in (asyncio.run, lambda work: in_a_loop_of_its_own(lambda: work), asyncio.run):

        async def everything(number: int = 0) -> tuple[int, int]:
            receipt = await publisher.publish(Keys("a"), confirm=Confirm(timeout_seconds=0.1))
            assert receipt.position is not None
            assert await publisher.head() == receipt.position
            assert len(await publisher.history()) == receipt.position.sequence
            assert await publisher.replicas() == []
            assert (await publisher.preview(Keys("a"), timeout_seconds=0.1)).replicas == 0
            return receipt.position.sequence, number

        assert run(everything())[0] >= 1
        assert links_of_publishers(redis_url) == 0, "expected the end of a loop to close its links"
    asyncio.run(publisher.close())
    asyncio.run(publisher.close())
    with pytest.raises(InvalidSettings, match="not open"):
        asyncio.run(publisher.publish(Keys("a")))


def test_a_loop_that_was_closed_under_its_tasks_leaves_no_link_that_is_used_again(redis_url: str) -> None:
    publisher = Publisher(redis_url)
    careless = asyncio.new_event_loop()
    careless.run_until_complete(publisher.__aenter__())
    careless.run_until_complete(publisher.publish(Keys("a")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # asyncio's, of what the closing of this loop leaves behind
        careless.close()
        receipt = asyncio.run(publisher.publish(Keys("b")))
        asyncio.run(publisher.close())
        del careless
        gc.collect()
    assert receipt.position is not None
    assert receipt.position.sequence == 2


def test_two_loops_that_take_turns_both_publish(redis_url: str) -> None:
    publisher = Publisher(redis_url)
    with asyncio.Runner() as first, asyncio.Runner() as second:
        first.run(publisher.__aenter__())
        sequences = [
            receipt.position.sequence
            for runner in (first, second, first, second)
            if (receipt := runner.run(publisher.publish(Keys("a")))).position is not None
        ]
        second.run(publisher.close())
    assert sequences == [1, 2, 3, 4]


def test_what_waits_in_the_retry_queue_is_logged_from_the_next_loop(own_server: EmbeddedServer) -> None:
    sender = Sender()
    publisher = Publisher(own_server.url, delivery="redis-then-fanout", fanout=sender, timeout_seconds=0.5)
    asyncio.run(publisher.__aenter__())

    async def publish_in_vain(id: str) -> None:
        with pytest.raises(NotDelivered):
            await publisher.publish(Keys(id), id=id)

    own_server.pause()
    try:
        asyncio.run(publish_in_vain("one"))
        in_a_loop_of_its_own(lambda: publish_in_vain("two"))
        assert publisher.retry_queue_length == 2
    finally:
        own_server.resume()

    async def until_logged() -> set[str]:
        await publisher.head()
        while publisher.retry_queue_length:
            await asyncio.sleep(0.01)
        return {entry.invalidation.id for entry in await publisher.history() if entry.invalidation}

    # No publish: the queue goes on as soon as a loop uses the publisher at all.
    assert asyncio.run(until_logged()) == {"one", "two"}
    assert (len(sender.loops), sender.closed) == (4, 3)
    asyncio.run(publisher.close())


def test_close_on_another_loop_tries_what_waits_once_more(own_server: EmbeddedServer) -> None:
    publisher = Publisher(own_server.url, delivery="redis-then-fanout", fanout=Sender(), timeout_seconds=0.5)
    asyncio.run(publisher.__aenter__())

    async def publish_in_vain() -> None:
        with pytest.raises(NotDelivered):
            await publisher.publish(Keys("a"), id="late")

    own_server.pause()
    try:
        asyncio.run(publish_in_vain())
    finally:
        own_server.resume()
    asyncio.run(publisher.close(last_attempt_seconds=20))

    async def ids() -> list[str]:
        async with Publisher(own_server.url) as other:
            return [entry.invalidation.id for entry in await other.history() if entry.invalidation]

    assert asyncio.run(ids()) == ["late"]


def test_two_loops_in_two_threads_share_the_link_of_the_first(redis_url: str) -> None:
    publisher = Publisher(redis_url)
    count = 50
    barrier = threading.Barrier(4, timeout=20)
    failures: list[BaseException] = []
    done: list[int] = []

    async def publish_many() -> None:
        await publisher.__aenter__()
        await asyncio.to_thread(barrier.wait)
        receipts = await asyncio.gather(*[publisher.publish(Keys("a")) for _ in range(count)])
        done.append(len(receipts))
        # The loop that the links belong to may be the first to end: the others go on over links of their own.

    def run() -> None:
        try:
            asyncio.run(publish_many())
        except BaseException as error:  # noqa: BLE001  (shown below)
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert done == [count] * 4

    async def length() -> int:
        head = await publisher.head()
        await publisher.close()
        return head.sequence if head else 0

    # An append that a loop took along as it ended was repeated with the same id: nothing is logged twice.
    assert asyncio.run(length()) == 4 * count


def test_a_call_to_a_loop_that_is_blocked_ends_with_what_to_do(redis_url: str) -> None:
    publisher = Publisher(redis_url, timeout_seconds=0.5)

    async def block() -> None:
        async with publisher:
            await publisher.publish(Keys("a"))
            # What a user should not do: the thread's result is awaited without letting the loop run.
            errors: list[BaseException] = []
            thread = threading.Thread(target=lambda: errors.append(error_of(publisher.publish(Keys("b")))))
            thread.start()
            thread.join()
            [error] = errors
            assert isinstance(error, NotConnected)
            assert "do not block it" in str(error)

    asyncio.run(block())


def error_of(work: Coroutine[Any, Any, object]) -> BaseException:
    try:
        result = asyncio.run(work)
    except BroadcacheError as error:
        return error
    raise AssertionError(result)


def publish_in_a_child(publisher: Publisher, results: Any) -> None:
    async def publish() -> int:
        receipt = await publisher.publish(Keys("child"))
        await publisher.close()
        return receipt.position.sequence if receipt.position else 0

    try:
        results.put(asyncio.run(publish()))
    except BaseException as error:  # noqa: BLE001
        results.put(repr(error))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_has_links_of_its_own_although_its_parents_loop_seems_to_run(redis_url: str) -> None:
    publisher = Publisher(redis_url)
    results = FORK.SimpleQueue()
    ready, end = threading.Event(), threading.Event()

    async def live() -> None:
        async with publisher:
            await publisher.publish(Keys("a"))
            ready.set()
            await asyncio.to_thread(end.wait)
            # The child has closed its copy of the socket, and has sent nothing over it.
            receipt = await publisher.publish(Keys("b"))
            assert receipt.position is not None
            assert receipt.position.sequence == 3

    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(live())
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(20)
    child = FORK.Process(target=publish_in_a_child, args=(publisher, results))
    child.start()
    assert results.get() == 2
    child.join()
    end.set()
    thread.join()
    assert failures == []
    assert os.getpid() != child.pid


def test_a_publish_without_a_connection_says_that_it_was_not_logged() -> None:
    error = error_of(published_to("redis://127.0.0.1:1"))
    assert isinstance(error, NotConnected)
    assert isinstance(error, LinkLost)
    assert "nothing was logged" in str(error)
    assert "may have been" not in str(error)


def test_a_publish_without_an_answer_says_that_it_may_have_been_logged(own_server: EmbeddedServer) -> None:
    async def publish() -> None:
        async with Publisher(own_server.url, timeout_seconds=0.5) as publisher:
            await publisher.publish(Keys("a"))
            own_server.pause()
            try:
                await publisher.publish(Keys("b"))
            finally:
                own_server.resume()

    error = error_of(publish())
    assert isinstance(error, LinkLost)
    assert not isinstance(error, NotConnected)
    assert "may have been logged" in str(error)


async def published_to(url: str) -> None:
    async with Publisher(url, timeout_seconds=0.3) as publisher:
        await publisher.publish(Keys("a"))
