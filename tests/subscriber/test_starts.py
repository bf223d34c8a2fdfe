"""The start while Redis is away: subscribers that start one after another wait at the same time."""

import contextlib
import logging
from typing import Any

import pytest
from cachetools import TTLCache
from tests.support.fake_clock import FakeClock
from tests.support.replicas import FAST
from tests.support.waiting import until

from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.subscriber import CacheInvalidationMixin, LocalCache, Subscriber
from broadcache.subscriber.following.state import Starts

pytestmark = pytest.mark.anyio

AWAY = "redis://127.0.0.1:1"


def mixin_of(namespace: str, url: str, **options: Any) -> CacheInvalidationMixin:
    kind = type("Service", (CacheInvalidationMixin,), {"namespace": namespace})
    service = kind(url, cache=TTLCache(maxsize=10, ttl=60), **{**FAST, **options})
    assert isinstance(service, CacheInvalidationMixin)
    return service


def waits_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    texts = [record.getMessage() for record in caplog.records]
    return [text.partition(" after the start")[0] for text in texts if text.startswith("not coherent")]


async def test_six_mixins_wait_as_long_as_one(caplog: pytest.LogCaptureFixture) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for number in range(6):
            await stack.enter_async_context(mixin_of(f"n{number}", AWAY, start_timeout_seconds=0.5))
    # Before, each waited for half a second.
    assert waits_in(caplog) == ["not coherent 0.5 s", *["not coherent 0 s"] * 5]


def test_six_subscribers_in_threads_of_their_own_do_too(caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(6):
            stack.enter_context(mixin_of(f"n{number}", AWAY, start_timeout_seconds=0.5))
    assert waits_in(caplog) == ["not coherent 0.5 s", *["not coherent 0 s"] * 5]


async def test_a_namespace_that_is_attached_does_not_wait_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, late = (LocalCache(TTLCache(maxsize=10, ttl=60)) for _ in range(2))
    left: list[float] = []
    left_seconds = Starts.left_seconds

    def record(starts: Starts, timeout_seconds: float) -> float:
        left.append(left_seconds(starts, timeout_seconds))
        return left[-1]

    monkeypatch.setattr(Starts, "left_seconds", record)
    async with Subscriber(AWAY, caches={"one": cache}, **{**FAST, "start_timeout_seconds": 0.5}) as subscriber:
        assert not await subscriber.attach("two", late)
    assert left[1] == 0.0


async def test_a_redis_that_answers_is_waited_for_by_each(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        # One that has been in vain elsewhere takes nothing from those whose Redis is there.
        await stack.enter_async_context(mixin_of("elsewhere", AWAY, start_timeout_seconds=0.2))
        caplog.clear()
        for number in range(6):
            service = await stack.enter_async_context(mixin_of(f"n{number}", own_server.url))
            assert service.subscriber.state == "coherent"
    assert waits_in(caplog) == []


async def test_after_an_outage_a_start_waits_again(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "broadcache.subscriber")
    own_server.kill()
    first = mixin_of("one", own_server.url, start_timeout_seconds=0.3, backoff_seconds_max=0.05)
    async with first:
        assert waits_in(caplog) == ["not coherent 0.3 s"]
        own_server.start()
        await until(lambda: first.subscriber.state == "coherent", "the first subscriber")
        async with mixin_of("two", own_server.url) as second:
            assert second.subscriber.state == "coherent"


def test_what_counts_is_how_long_a_running_subscriber_has_had_no_answer() -> None:
    clock = FakeClock()
    one, other, elsewhere = Starts("here", clock), Starts("here", clock), Starts("there", clock)
    assert one.left_seconds(5.0) == 5.0
    one.begin()
    clock.now += 2.0
    other.begin()
    assert (other.left_seconds(5.0), elsewhere.left_seconds(5.0)) == (3.0, 5.0)
    clock.now += 9.0
    assert other.left_seconds(5.0) == 0.0
    one.record(["recovering"])  # it has an answer
    assert other.left_seconds(10.0) == 1.0  # its own wait counts as well
    other.end()
    assert other.left_seconds(5.0) == 5.0
    clock.now += 100.0
    one.record(["lost"])
    one.record(["connecting"])
    clock.now += 1.0
    assert other.left_seconds(5.0) == 4.0
    one.end()
    one.end()
    assert other.left_seconds(5.0) == 5.0
