"""Loads that go on without a caller, loads that take too long, and the function that is told of invalidations."""

import asyncio
import contextvars
import logging
from typing import Any

import pytest
from tests.support.replicas import FAST

from broadcache.shared import Everything, Invalidation, InvalidSettings, Keys, Prefixes, Tags
from broadcache.subscriber import LocalCache, Subscriber

pytestmark = pytest.mark.anyio

KEY = "product:42"

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")


def coherent_cache(**options: Any) -> LocalCache:
    cache = LocalCache({}, **options)
    cache.confirm_coherent(cache.clock() + 3_600)
    return cache


class Source:
    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.calls = 0
        self.cancelled = 0
        self.contexts: list[str] = []

    async def load(self) -> str:
        self.calls += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.contexts.append(request_id.get())
        return "value"

    async def load_many(self, keys: list[str]) -> dict[str, str]:
        return dict.fromkeys(keys, await self.load())


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def read_as(request: str, cache: LocalCache, source: Source) -> Any:
    request_id.set(request)
    return await cache.get_or_load(KEY, source.load)


async def cancelled(waiting: "asyncio.Future[Any]") -> None:
    waiting.cancel()
    await settled()


@pytest.mark.parametrize("finish_loads", [False, True])
async def test_a_load_ends_with_its_last_caller_unless_loads_are_finished(finish_loads: bool) -> None:
    cache, source = coherent_cache(finish_loads=finish_loads), Source()
    callers = [asyncio.ensure_future(cache.get_or_load(KEY, source.load)) for _ in range(2)]
    many = asyncio.ensure_future(cache.get_or_load_many(["a", "b"], source.load_many))
    await settled()
    for caller in (*callers, many):
        await cancelled(caller)
    assert source.cancelled == (0 if finish_loads else 2)
    joined = asyncio.ensure_future(cache.get_or_load(KEY, source.load))
    await settled()
    source.gate.set()
    assert await joined == "value"
    await settled()
    assert source.calls == (2 if finish_loads else 3)
    assert cache.get("a") == ("value" if finish_loads else None)


async def test_a_finished_load_stores_nothing_that_was_invalidated_meanwhile() -> None:
    cache, source = coherent_cache(finish_loads=True), Source()
    caller = asyncio.ensure_future(cache.get_or_load(KEY, source.load))
    await settled()
    await cancelled(caller)
    cache.apply(Keys(KEY))
    source.gate.set()
    await settled()
    assert KEY not in cache


async def test_a_shared_load_runs_in_the_context_of_its_first_caller_also_after_that_has_left() -> None:
    """What docs/local-cache.md says: so a loader opens its own session."""
    cache, source = coherent_cache(), Source()
    first = asyncio.ensure_future(read_as("first", cache, source))
    await settled()
    second = asyncio.ensure_future(read_as("second", cache, source))
    await settled()
    await cancelled(first)
    source.gate.set()
    assert await second == "value"
    assert source.contexts == ["first"]


async def test_a_load_that_takes_too_long_raises_a_timeout_to_each_caller() -> None:
    cache, source = coherent_cache(load_timeout_seconds=0.01, finish_loads=True), Source()
    callers = [cache.get_or_load(KEY, source.load), cache.get_or_load(KEY, source.load)]
    errors = await asyncio.gather(*callers, cache.get_or_load_many(["a"], source.load_many), return_exceptions=True)
    assert [type(error) for error in errors] == [TimeoutError] * 3
    assert all("longer than load_timeout_seconds=0.01" in str(error) for error in errors)
    assert (source.calls, source.cancelled) == (2, 2)

    def time_out() -> str:
        raise TimeoutError("of the source")

    with pytest.raises(TimeoutError, match=r"^of the source$"):
        await cache.get_or_load(KEY, time_out)
    assert await cache.get_or_load(KEY, lambda: "at once") == "at once"
    assert cache.get_or_load_sync("b", lambda: "blocking") == "blocking"


# --- on_invalidated --------------------------------------------------------------------------------------------------


def test_it_is_called_with_each_invalidation_after_it_was_applied() -> None:
    told: list[tuple[Invalidation, bool]] = []
    cache = LocalCache({}, on_invalidated=lambda invalidation: told.append((invalidation, KEY in cache)))
    cache.confirm_coherent(cache.clock() + 3_600)
    cache[KEY] = 1
    told.clear()
    cache.apply(Keys(KEY))
    cache.apply(Tags("a"))
    cache.apply(Prefixes("p"))
    cache.apply(Everything(), reason="subscribed")
    cache.apply_counted(Invalidation(keys=("b",), id="7"))
    assert [is_held for _, is_held in told] == [False] * 5
    assert [invalidation for invalidation, _ in told] == [
        Invalidation(keys=(KEY,)),
        Invalidation(tags=("a",)),
        Invalidation(prefixes=("p",)),
        Invalidation(everything=True, reason="subscribed"),
        Invalidation(keys=("b",), id="7"),
    ]


def test_a_mapping_that_fails_is_everything() -> None:
    class Failing(dict[str, Any]):
        def __delitem__(self, key: str) -> None:
            raise OSError

    told: list[Invalidation] = []
    cache = LocalCache(Failing(), on_invalidated=told.append)
    cache.confirm_coherent(cache.clock() + 3_600)
    cache.get_or_load_sync(KEY, lambda: 1)
    cache.apply(Keys(KEY))
    assert told == [Invalidation(everything=True, reason="mapping failed")]


def test_it_has_to_be_a_function() -> None:
    with pytest.raises(InvalidSettings, match="expected on_invalidated to be a function or None, got str"):
        LocalCache({}, on_invalidated="print")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_what_it_raises_is_logged_and_the_invalidation_applied(caplog: pytest.LogCaptureFixture) -> None:
    def fail(invalidation: Invalidation) -> None:
        raise LookupError

    cache = coherent_cache(on_invalidated=fail)
    cache.get_or_load_sync(KEY, lambda: 1)
    cache.apply(Keys(KEY))
    assert KEY not in cache
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        "on_invalidated failed: expected a function that does not raise"
    ]


async def test_it_is_called_with_what_a_publisher_has_sent(redis_url: str) -> None:
    told: list[Invalidation] = []
    cache = LocalCache({}, on_invalidated=told.append)
    async with Subscriber(redis_url, caches={"products": cache}, **FAST) as subscriber:
        receipt = await subscriber.invalidate(Keys(KEY), namespace="products", reason="price")
    assert told[0].everything
    assert (told[-1].id, told[-1].keys, told[-1].reason) == (receipt.id, (KEY,), "price")
