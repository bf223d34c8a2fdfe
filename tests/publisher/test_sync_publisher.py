"""The synchronous publisher: what `Publisher` does, for code without an event loop, from any thread."""

import asyncio
import gc
import inspect
import multiprocessing
import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest
from tests.support.waiting import wait_until

from broadcache.publisher import Confirm, Publisher, SyncPublisher
from broadcache.shared import InvalidSettings, InvalidTarget, Keys, NotConnected, Receipt
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.subscriber import LocalCache, Subscriber

FORK = multiprocessing.get_context("fork")


def threads_of_publishers() -> int:
    return sum(thread.name == "broadcache publisher" for thread in threading.enumerate())


def sequence_of(receipt: Receipt) -> int:
    assert receipt.position is not None
    return receipt.position.sequence


def test_it_does_all_that_a_publisher_does(redis_url: str) -> None:
    cache = LocalCache({})
    with (
        Subscriber(redis_url, caches={"products": cache}, replica_id="one"),
        SyncPublisher(redis_url, source="desk") as publisher,
    ):
        cache.store(cache.begin_load("a"), "old")
        assert publisher.preview(Keys("a"), namespace="products").entries == 1
        receipt = publisher.publish(Keys("a"), namespace="products", reason="price", confirm=Confirm())
        assert receipt.confirmation is not None
        assert receipt.confirmation.confirmed == ("one",)
        assert cache.get("a") is None
        assert publisher.head("products") == receipt.position
        assert [replica.replica for replica in publisher.replicas("products")] == ["one"]
        [entry] = publisher.history("products", key="a")
        assert entry.invalidation is not None
        assert (entry.invalidation.source, entry.invalidation.reason) == ("desk", "price")
        assert publisher.history_page("products").entries == [entry]
        assert (publisher.source, publisher.delivery, publisher.has_log) == ("desk", "redis", True)
        assert publisher.retry_queue_length == 0
        with pytest.raises(InvalidTarget):
            publisher.publish(Keys(""))
    assert threads_of_publishers() == 0


@pytest.mark.parametrize(
    "name", ["__init__", "publish", "history", "history_page", "head", "replicas", "forget_replica", "preview", "close"]
)
def test_its_arguments_are_those_of_a_publisher(name: str) -> None:
    mine, theirs = (inspect.signature(getattr(kind, name)) for kind in (SyncPublisher, Publisher))
    old_names = {"outbox_names_max"}  # until 0.2
    assert mine.parameters == {each: kind for each, kind in theirs.parameters.items() if each not in old_names}
    assert mine.return_annotation == theirs.return_annotation


def test_threads_share_it(redis_url: str) -> None:
    receipts: list[Receipt] = []
    with SyncPublisher(redis_url) as publisher:

        def publish() -> None:
            receipts.extend(publisher.publish(Keys("a")) for _ in range(20))

        threads = [threading.Thread(target=publish) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert threads_of_publishers() == 1
    assert sorted(map(sequence_of, receipts)) == list(range(1, 201))


def test_it_needs_no_with_and_closing_is_for_good_and_harmless_twice(redis_url: str) -> None:
    publisher = SyncPublisher(redis_url)
    assert threads_of_publishers() == 0, "expected no thread before the first call"
    assert sequence_of(publisher.publish(Keys("a"))) == 1
    publisher.close()
    publisher.close()
    assert threads_of_publishers() == 0
    with pytest.raises(InvalidSettings, match="closed"):
        publisher.publish(Keys("a"))
    with publisher:
        assert sequence_of(publisher.publish(Keys("a"))) == 2
    SyncPublisher(redis_url).close()


def test_it_works_inside_an_event_loop_too_which_it_then_blocks(redis_url: str) -> None:
    async def view() -> int:
        with SyncPublisher(redis_url) as publisher:
            return sequence_of(publisher.publish(Keys("a")))

    assert asyncio.run(view()) == 1


def test_a_call_from_its_own_thread_is_refused(redis_url: str) -> None:
    errors: list[BaseException] = []

    class Eager:
        """An observer that publishes as soon as something was published."""

        def __getattr__(self, name: str) -> Any:
            def observe(*_: object, **__: object) -> None:
                try:
                    publisher.publish(Keys("b"))
                except InvalidSettings as error:
                    errors.append(error)

            return observe

    eager: Any = Eager()
    publisher = SyncPublisher(redis_url, observer=eager)
    with publisher:
        publisher.publish(Keys("a"))
    assert errors
    assert "own thread" in str(errors[0])


def test_without_redis_it_raises_what_a_publisher_raises() -> None:
    with (
        SyncPublisher("redis://127.0.0.1:1", timeout_seconds=0.2) as publisher,
        pytest.raises(NotConnected, match="nothing was logged"),
    ):
        publisher.publish(Keys("a"))
    with pytest.raises(InvalidSettings):
        SyncPublisher("redis://127.0.0.1:1", timeout_seconds=0)


def test_closing_ends_the_calls_of_other_threads(own_server: EmbeddedServer) -> None:
    publisher = SyncPublisher(own_server.url, timeout_seconds=60)
    publisher.publish(Keys("a"))
    errors: list[BaseException] = []

    def publish() -> None:
        try:
            publisher.publish(Keys("b"))
        except ConnectionError as error:
            errors.append(error)

    own_server.pause()
    try:
        thread = threading.Thread(target=publish)
        thread.start()
        links = publisher._publisher._calls._links
        assert links is not None
        link = links._links[None]._link
        assert link is not None
        wait_until(lambda: link._waiting, "the call")
        publisher.close()
        thread.join()
    finally:
        own_server.resume()
    assert len(errors) == 1


def test_one_that_is_forgotten_ends_its_thread(redis_url: str) -> None:
    SyncPublisher(redis_url).publish(Keys("a"))
    gc.collect()
    wait_until(lambda: threads_of_publishers() == 0, "the end of the thread")


def publish_in_a_child(publisher: SyncPublisher, results: Any) -> None:
    try:
        results.put([sequence_of(publisher.publish(Keys("child"))) for _ in range(2)])
        publisher.close()
    except BaseException as error:  # noqa: BLE001
        results.put(repr(error))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_publishes_over_a_connection_of_its_own(redis_url: str) -> None:
    results = FORK.SimpleQueue()
    with SyncPublisher(redis_url) as publisher:
        assert sequence_of(publisher.publish(Keys("a"))) == 1
        for number in range(2):
            child = FORK.Process(target=publish_in_a_child, args=(publisher, results))
            child.start()
            assert results.get() == [3 * number + 2, 3 * number + 3]
            child.join()
            assert sequence_of(publisher.publish(Keys("a"))) == 3 * number + 4


def test_at_the_end_of_the_interpreter_it_is_closed_and_reports_what_is_lost(own_server: EmbeddedServer) -> None:
    program = """
        import sys
        from broadcache.publisher import SyncPublisher
        from broadcache.shared import FanoutReport, Keys, NotDelivered

        class Nowhere:
            async def __aenter__(self): return self
            async def close(self): pass
            async def send(self, frames):
                return FanoutReport(service="web", total=1, succeeded=0, failed=1, complete=True, discovery=None,
                                    elapsed_ms=0.0, outcomes=())

        publisher = SyncPublisher(sys.argv[1], delivery="redis-then-fanout", fanout=Nowhere(), timeout_seconds=0.2)
        try:
            publisher.publish(Keys("a"), namespace="products")
        except NotDelivered:
            print("waits:", publisher.retry_queue_length)
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), "redis://127.0.0.1:1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout == "waits: 1\n"
    assert "closed with 1 invalidations that Redis has not logged" in finished.stderr
    assert finished.returncode == 0


WHILE_OBJECTS_ARE_COLLECTED = """
    import sys
    from broadcache.publisher import SyncPublisher
    from broadcache.shared import Keys, LinkLost

    class Basket:
        def __del__(self, Keys=Keys, LinkLost=LinkLost):
            try:
                publisher.publish(Keys("a"))
            except LinkLost as error:
                print(error, flush=True)

    publisher = SyncPublisher(sys.argv[1])
    {before}
    sys.modules["basket"] = Basket()  # collected when the interpreter ends
"""


@pytest.mark.parametrize(
    ("before", "expected"),
    [("pass", "the interpreter is ending, and nothing was published"), ("publisher.publish(Keys('b'))", "")],
    ids=["at its first call", "after others"],
)
def test_a_call_while_the_interpreter_ends_is_refused_and_never_waits(
    before: str, expected: str, redis_url: str
) -> None:
    """At its first call it waited for ever, on Python 3.11: a thread that begins so late does not run."""
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WHILE_OBJECTS_ARE_COLLECTED).format(before=before), redis_url],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert expected in finished.stdout
    assert finished.returncode == 0


def test_its_representation_shows_where_it_publishes_and_no_password(redis_url: str) -> None:
    publisher = SyncPublisher("redis://user:hunter2@127.0.0.1:1", source="desk")
    assert repr(publisher) == "<SyncPublisher at redis://…@127.0.0.1:1, source 'desk'>"
    publisher.close()
    assert repr(publisher) == "<SyncPublisher at redis://…@127.0.0.1:1, source 'desk', closed>"
    assert repr(Publisher(redis_url, source="desk")) == f"<Publisher at {redis_url}, source 'desk'>"
    subscriber = Subscriber("redis://user:hunter2@127.0.0.1:1", caches={"products": LocalCache({})})
    assert repr(subscriber) == "<Subscriber of namespace products at redis://…@127.0.0.1:1, closed>"
