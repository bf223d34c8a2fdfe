"""Loaders that return their value with tags, a lifetime, or the wish not to store it."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cachetools import TTLCache
from tests.support.fake_clock import FakeClock
from tests.support.waiting import wait_until

from broadcache.shared import Everything, InvalidName, InvalidSettings, Keys, Prefixes, Tags, Target
from broadcache.subscriber import Loaded, LocalCache
from broadcache.subscriber.cache.loading.loads import Loads

pytestmark = pytest.mark.anyio

KEY = "product:42"
TAG = "shop:7"
TARGETS: tuple[Target, ...] = (Keys(KEY), Tags(TAG), Prefixes("product:"), Everything())


def coherent_cache(**options: Any) -> LocalCache:
    cache = LocalCache({}, **options)
    cache.confirm_coherent(cache.clock() + 3_600)
    return cache


class Source:
    """A loader that reads `value` when it is called, and returns it, with its tag, when it is let go."""

    def __init__(self) -> None:
        self.value = "old"
        self.calls = 0
        self.gate = asyncio.Event()
        self.sync_gate = threading.Event()

    async def load(self) -> Loaded[str]:
        self.calls += 1
        value = self.value
        await self.gate.wait()
        return Loaded(value, tags=(TAG,))

    def load_sync(self) -> Loaded[str]:
        self.calls += 1
        value = self.value
        self.sync_gate.wait(20)
        return Loaded(value, tags=[TAG])


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_twenty_callers_are_one_load_and_the_entry_has_the_tags_of_the_value() -> None:
    cache, source = coherent_cache(), Source()
    callers = [asyncio.ensure_future(cache.get_or_load(KEY, source.load, tags=("all",))) for _ in range(20)]
    await settled()
    source.gate.set()
    assert await asyncio.gather(*callers) == ["old"] * 20
    assert source.calls == 1
    for tag in (TAG, "all"):
        assert cache.get(KEY) == "old"
        cache.apply(Tags(tag))
        assert cache.get(KEY) is None
        assert await cache.get_or_load(KEY, source.load, tags=("all",)) == "old"


def test_the_lifetime_of_the_value_takes_the_place_of_that_of_the_call() -> None:
    clock = FakeClock()
    cache = LocalCache(TTLCache(10, 300, timer=clock), clock=clock, max_staleness_seconds=1_000)
    cache.confirm_coherent(clock())
    cache.get_or_load_sync("short", lambda: Loaded(1, ttl_seconds=10), ttl_seconds=60)
    cache.get_or_load_sync("long", lambda: Loaded(1, ttl_seconds=100), ttl_seconds=60)
    cache.get_or_load_sync("call", lambda: Loaded(1), ttl_seconds=60)
    cache.get_or_load_sync("own", lambda: Loaded(1, ttl_seconds=1_000))
    left = []
    for seconds in (9, 2, 48, 2, 38, 2, 198, 2):
        clock.now += seconds
        left.append(sorted(cache))
    every = ["call", "long", "own", "short"]
    assert left == [every, every[:3], every[:3], ["long", "own"], ["long", "own"], ["own"], ["own"], []]


def test_a_value_that_is_not_to_be_stored_is_returned_and_drops_the_older_one() -> None:
    cache = coherent_cache()
    assert cache.get_or_load_sync(KEY, lambda: Loaded("new", store=False)) == "new"
    assert KEY not in cache

    def load() -> Loaded[str]:
        token = cache.begin_load(KEY)
        assert cache.store(token, "older")
        return Loaded("new", store=False)

    assert cache.get_or_load_sync(KEY, load) == "new"
    assert KEY not in cache


def test_a_void_load_that_is_not_to_be_stored_leaves_a_newer_value_alone() -> None:
    cache = coherent_cache()

    def load() -> Loaded[str]:
        cache[KEY] = "newer"
        return Loaded("old", store=False)

    assert cache.get_or_load_sync(KEY, load) == "old"
    assert cache.get(KEY) == "newer"


def test_none_with_tags_is_no_value() -> None:
    assert (cache := coherent_cache()).get_or_load_sync(KEY, lambda: Loaded(None, tags=(TAG,))) is None
    assert KEY not in cache


@pytest.mark.parametrize("target", TARGETS)
async def test_a_value_whose_tag_was_invalidated_during_the_load_is_not_stored(target: Target) -> None:
    cache, source = coherent_cache(), Source()
    waiting = asyncio.ensure_future(cache.get_or_load(KEY, source.load))
    await settled()
    cache.apply(target)
    source.gate.set()
    assert await waiting == "old"
    assert KEY not in cache
    assert cache.stats().voided_fills == 1


async def late_and_early_callers(cache: LocalCache, target: Target) -> tuple[list[str], str, int]:
    """What callers return that came before, and after, an invalidation during the load; and the number of loads."""
    source = Source()
    early = [asyncio.ensure_future(cache.get_or_load(KEY, source.load)) for _ in range(2)]
    await settled()
    source.value = "new"
    cache.apply(target)
    late = asyncio.ensure_future(cache.get_or_load(KEY, source.load))
    await settled()
    source.gate.set()
    return await asyncio.gather(*early), await late, source.calls


@pytest.mark.parametrize("target", TARGETS)
async def test_a_caller_that_came_after_the_invalidation_of_a_tag_loads_again(target: Target) -> None:
    """It could not know the tag when it joined the load: the loader returns it."""
    cache = coherent_cache()
    assert await late_and_early_callers(cache, target) == (["old"] * 2, "new", 2)
    assert cache.get(KEY) == "new"


async def test_without_this_rule_a_late_caller_gets_the_old_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loads, "_is_no_result", lambda *_, **__: False)
    assert (await late_and_early_callers(coherent_cache(), Tags(TAG)))[1] == "old"


async def test_a_caller_that_came_after_another_invalidation_shares_the_load() -> None:
    early, late, calls = await late_and_early_callers(coherent_cache(), Tags("shop:8"))
    assert (early, late, calls) == (["old"] * 2, "old", 1)


async def test_late_callers_share_one_more_load() -> None:
    cache, source = coherent_cache(), Source()
    first = asyncio.ensure_future(cache.get_or_load(KEY, source.load))
    await settled()
    source.value = "new"
    cache.apply(Tags(TAG))
    late = [asyncio.ensure_future(cache.get_or_load(KEY, source.load)) for _ in range(10)]
    await settled()
    source.gate.set()
    assert await first == "old"
    assert await asyncio.gather(*late) == ["new"] * 10
    assert source.calls == 2


def test_a_thread_that_came_after_the_invalidation_of_a_tag_loads_again() -> None:
    cache, source = coherent_cache(), Source()
    source.sync_gate.clear()
    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(cache.get_or_load_sync, KEY, source.load_sync)
        wait_until(lambda: source.calls == 1, "the first load")
        source.value = "new"
        cache.apply(Tags(TAG))
        late = pool.submit(cache.get_or_load_sync, KEY, source.load_sync)
        wait_until(lambda: cache.stats().shared_loads == 1, "the caller that joins")
        source.sync_gate.set()
        assert (early.result(20), late.result(20)) == ("old", "new")
    assert cache.get(KEY) == "new"


def test_constant_invalidations_do_not_make_a_caller_start_over_for_ever() -> None:
    """A caller starts over at most once: then it joins no load that began before an invalidation."""
    cache, source = coherent_cache(), Source()
    stop = threading.Event()

    def invalidate() -> None:
        while not stop.is_set():
            cache.apply(Tags(TAG))

    def read() -> None:
        for _ in range(50):
            cache.get_or_load_sync(KEY, source.load_sync)

    source.sync_gate.set()
    with ThreadPoolExecutor(5) as pool:
        invalidating = pool.submit(invalidate)
        try:
            for reading in [pool.submit(read) for _ in range(4)]:
                reading.result(20)
        finally:
            stop.set()
        invalidating.result(20)


MISTAKES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Loaded(1, tags="x"), InvalidName, r"write \('x',\)"),  # type: ignore[arg-type]
    (lambda: Loaded(1, tags=(1,)), InvalidName, "expected strings as tags"),  # type: ignore[arg-type]
    (lambda: Loaded(1, ttl_seconds="x"), InvalidSettings, "expected ttl_seconds"),  # type: ignore[arg-type]
    (lambda: Loaded(1, ttl=1), TypeError, "ttl"),  # type: ignore[call-arg]
]


@pytest.mark.parametrize(("mistake", "error", "text"), MISTAKES)
def test_mistakes_raise_where_they_are_made(mistake: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        coherent_cache().get_or_load_sync(KEY, mistake)
