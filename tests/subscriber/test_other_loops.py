"""A subscriber that is used from other event loops and threads than its own."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest
from cachetools import TTLCache
from tests.support.replicas import FAST
from tests.support.waiting import wait_until

from broadcache.shared import InvalidSettings, InvalidTarget, Keys, LinkLost, NotConnected, Receipt
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.subscriber import CacheInvalidationMixin, LocalCache, Subscriber


def new_cache() -> LocalCache:
    return LocalCache(TTLCache(maxsize=100, ttl=600))


def fill(cache: LocalCache, *keys: str) -> None:
    for key in keys:
        assert cache.store(cache.begin_load(key), "old")


def applied_by(subscriber: Subscriber) -> int:
    position = subscriber.position("products")
    return position.sequence if position else 0


@pytest.fixture
def cache() -> LocalCache:
    return new_cache()


@pytest.fixture
def threaded(redis_url: str, cache: LocalCache) -> Iterator[Subscriber]:
    """A subscriber in a thread of its own."""
    with Subscriber(redis_url, caches={"products": cache}, **FAST) as subscriber:
        yield subscriber


def test_invalidate_may_be_awaited_on_any_event_loop(threaded: Subscriber, cache: LocalCache) -> None:
    # Before, each of these took all of `timeout_seconds`, and the first raised although it was logged.
    for number in range(3):
        fill(cache, "a")
        receipt = asyncio.run(threaded.invalidate(Keys("a"), namespace="products", timeout_seconds=60))
        assert receipt.position is not None
        assert receipt.position.sequence == number + 1
        assert cache.get("a") is None
    assert asyncio.run(threaded.wait_coherent(60))


def test_invalidate_sync_drops_here_and_publishes_from_any_thread(
    redis_url: str, threaded: Subscriber, cache: LocalCache
) -> None:
    other_cache = new_cache()
    with Subscriber(redis_url, caches={"products": other_cache}, **FAST) as other:
        fill(cache, "a")
        fill(other_cache, "a")
        receipt = threaded.invalidate_sync(Keys("a"), namespace="products", reason="price")
        assert cache.get("a") is None
        wait_until(lambda: other.position("products") == receipt.position, "the other replica")
        assert other_cache.get("a") is None
    receipts: list[Receipt] = []
    threads = [
        threading.Thread(
            target=lambda key=f"t{number}": receipts.append(threaded.invalidate_sync(Keys(key), namespace="products"))
        )
        for number in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(receipt.position.sequence for receipt in receipts if receipt.position) == list(range(2, 22))
    with pytest.raises(InvalidTarget):
        threaded.invalidate_sync(namespace="products")
    with pytest.raises(InvalidSettings, match="expected one of the namespaces"):
        threaded.invalidate_sync(Keys("a"), namespace="users")


def test_invalidate_sync_works_inside_another_event_loop_which_it_then_blocks(threaded: Subscriber) -> None:
    async def cell_of_a_notebook() -> Receipt:
        return threaded.invalidate_sync(Keys("a"), namespace="products")

    assert asyncio.run(cell_of_a_notebook()).position is not None


def test_invalidate_sync_is_refused_at_once_on_the_subscribers_own_loop(redis_url: str, cache: LocalCache) -> None:
    async def view() -> None:
        async with Subscriber(redis_url, caches={"products": cache}, **FAST) as subscriber:
            fill(cache, "a")
            with pytest.raises(InvalidSettings, match=r"await invalidate.*to_thread"):
                subscriber.invalidate_sync(Keys("a"), namespace="products")
            assert cache.get("a") == "old", "expected a refusal to drop nothing"
            receipt = await asyncio.to_thread(subscriber.invalidate_sync, Keys("a"), namespace="products")
            assert receipt.position is not None
            assert cache.get("a") is None

    asyncio.run(view())


@pytest.mark.parametrize(
    "invalidate",
    [
        lambda subscriber: subscriber.invalidate_sync(Keys("a"), namespace="products", timeout_seconds=3_600),
        lambda subscriber: asyncio.run(subscriber.invalidate(Keys("a"), namespace="products", timeout_seconds=3_600)),
    ],
)
def test_without_a_running_subscriber_it_raises_at_once_and_has_dropped_here(
    redis_url: str,
    cache: LocalCache,
    invalidate: Callable[[Subscriber], Receipt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subscriber = Subscriber(redis_url, caches={"products": cache}, **FAST)
    dropped: list[object] = []
    monkeypatch.setattr(cache, "apply_invalidation", dropped.append)
    with pytest.raises(NotConnected, match="was not published: the subscriber is not running"):
        invalidate(subscriber)
    assert len(dropped) == 1


def test_a_blocked_subscriber_ends_the_call_and_names_the_reason(redis_url: str, cache: LocalCache) -> None:
    async def block() -> None:
        async with Subscriber(redis_url, caches={"products": cache}, **FAST) as subscriber:
            errors: list[LinkLost] = []

            def invalidate() -> None:
                for call in (
                    lambda: subscriber.invalidate_sync(Keys("a"), namespace="products", timeout_seconds=0.1),
                    lambda: asyncio.run(subscriber.invalidate(Keys("a"), namespace="products", timeout_seconds=0.1)),
                ):
                    try:
                        call()
                    except LinkLost as error:
                        errors.append(error)

            thread = threading.Thread(target=invalidate)
            thread.start()
            thread.join()
            assert ["blocked" in str(error) for error in errors] == [True, True]

    asyncio.run(block())


def test_a_subscriber_that_ends_during_the_call_ends_the_call(own_server: EmbeddedServer, cache: LocalCache) -> None:
    errors: list[LinkLost] = []
    with Subscriber(own_server.url, caches={"products": cache}, **FAST) as subscriber:
        own_server.pause()
        try:

            def invalidate() -> None:
                try:
                    subscriber.invalidate_sync(Keys("a"), namespace="products", timeout_seconds=3_600)
                except LinkLost as error:
                    errors.append(error)

            fill(cache, "a")
            thread = threading.Thread(target=invalidate)
            thread.start()
            wait_until(lambda: cache.get("a") is None, "the drop here, which comes first")
            subscriber.__exit__(None, None, None)
            thread.join()
        finally:
            own_server.resume()
    assert len(errors) == 1


def test_a_cancellation_reaches_the_subscribers_loop(own_server: EmbeddedServer, cache: LocalCache) -> None:
    with Subscriber(own_server.url, caches={"products": cache}, **FAST) as subscriber:
        loop = subscriber._loop
        assert loop is not None
        own_server.pause()
        try:

            async def cancel() -> None:
                call = asyncio.create_task(
                    subscriber.invalidate(Keys("a"), namespace="products", timeout_seconds=3_600)
                )
                while not publishing(loop):
                    await asyncio.sleep(0.01)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call

            asyncio.run(cancel())
            wait_until(lambda: not publishing(loop), "the end of the call on the subscriber's loop")
        finally:
            own_server.resume()


def publishing(loop: asyncio.AbstractEventLoop) -> bool:
    return any(getattr(task.get_coro(), "__qualname__", "").startswith("_Call") for task in asyncio.all_tasks(loop))


def test_close_may_be_awaited_on_another_loop(redis_url: str, cache: LocalCache) -> None:
    subscriber = Subscriber(redis_url, caches={"products": cache}, **FAST)
    entered, end = threading.Event(), threading.Event()

    async def live() -> None:
        await subscriber.__aenter__()
        entered.set()
        await asyncio.to_thread(end.wait)

    thread = threading.Thread(target=lambda: asyncio.run(live()))
    thread.start()
    assert entered.wait(20)
    asyncio.run(subscriber.close())
    assert subscriber.state == "closed"
    end.set()
    thread.join()
    asyncio.run(subscriber.close())


def test_after_its_loop_has_ended_a_subscriber_can_be_closed_and_entered_on_the_next(
    redis_url: str, cache: LocalCache
) -> None:
    subscriber = Subscriber(redis_url, caches={"products": cache}, **FAST)
    for _ in range(3):
        asyncio.run(entered_and_left_to_the_loop(subscriber))
    asyncio.run(subscriber.close())
    assert subscriber.state == "closed"


async def entered_and_left_to_the_loop(subscriber: Subscriber) -> None:
    await subscriber.__aenter__()
    assert (await subscriber.invalidate(Keys("a"), namespace="products")).position is not None


class Catalogue(CacheInvalidationMixin):
    namespace = "products"

    def __init__(self, url: str) -> None:
        super().__init__(url, cache=TTLCache(maxsize=100, ttl=600), **FAST)


@pytest.mark.parametrize(
    "invalidate",
    [
        lambda catalogue: catalogue.invalidate_sync(Keys("a"), reason="price"),
        lambda catalogue: asyncio.run(catalogue.invalidate(Keys("a"), reason="price")),
    ],
)
def test_the_mixin_invalidates_from_a_service_without_an_event_loop(
    redis_url: str, invalidate: Callable[[Catalogue], Receipt]
) -> None:
    with Catalogue(redis_url) as catalogue:
        fill(catalogue.cache, "a")
        receipt = invalidate(catalogue)
        assert receipt.position is not None
        assert catalogue.cache.get("a") is None
