"""Expiry in slices: however many entries expire at once, a store or a count removes few of them."""

from collections.abc import Callable
from typing import Any

import pytest
from cachetools import Cache, TLRUCache, TTLCache
from tests.support.fake_clock import FakeClock

from broadcache.shared.invalidation import Everything, Keys, Prefixes
from broadcache.subscriber import LocalCache
from broadcache.subscriber.cache.entries import Count

ENTRIES = 5_000
SLICE_MAX = 64


def ttl_cache(clock: FakeClock, maxsize: int = 2 * ENTRIES) -> TTLCache[str, Any]:
    return TTLCache(maxsize=maxsize, ttl=10, timer=clock)


def tlru_cache(clock: FakeClock, maxsize: int = 2 * ENTRIES) -> TLRUCache[str, Any]:
    return TLRUCache(maxsize=maxsize, ttu=lambda _key, _value, now: now + 10, timer=clock)


MAPPINGS = pytest.mark.parametrize("mapping_of", [ttl_cache, tlru_cache])


def filled(mapping_of: Callable[..., Any], clock: FakeClock, **options: Any) -> tuple[LocalCache, Any]:
    mapping = mapping_of(clock, **options)
    cache = LocalCache(mapping, clock=clock)
    cache.confirm_coherent(clock.now + 3_600)
    for number in range(min(ENTRIES, int(mapping.maxsize))):
        assert cache.store(cache.begin_load(f"key:{number}"), number)
    return cache, mapping


def has_work(cache: LocalCache) -> bool:
    return cache.has_sweep_work


def held(mapping: Any) -> int:
    return Cache.__len__(mapping)


@MAPPINGS
@pytest.mark.parametrize(
    "act",
    [
        lambda cache: cache.store(cache.begin_load("new"), 1),
        lambda cache: cache.stats(),
        lambda cache: cache.currsize,
        len,
        lambda cache: cache.get("key:1"),
        repr,
        lambda cache: cache.sweep(),
        lambda cache: cache.count(Everything()),
    ],
    ids=["store", "stats", "currsize", "len", "get", "repr", "sweep", "count"],
)
def test_no_operation_removes_more_than_a_slice_of_the_expired_entries(
    mapping_of: Callable[..., Any], act: Callable[[LocalCache], object]
) -> None:
    clock = FakeClock()
    cache, mapping = filled(mapping_of, clock)
    clock.now += 10
    for _ in range(3):
        before = held(mapping)
        act(cache)
        assert before - held(mapping) <= 2 * SLICE_MAX


@MAPPINGS
def test_a_bare_mapping_removes_all_of_them_in_one_go(mapping_of: Callable[..., Any]) -> None:
    """The negative control."""
    clock = FakeClock()
    mapping = mapping_of(clock)
    for number in range(ENTRIES):
        mapping[str(number)] = number
    clock.now += 10
    mapping["new"] = 1
    assert held(mapping) == 1


@MAPPINGS
def test_expired_entries_are_never_found_and_all_removed_by_the_sweep(mapping_of: Callable[..., Any]) -> None:
    clock = FakeClock()
    cache, mapping = filled(mapping_of, clock)
    clock.now += 10
    cache["new"] = 1
    assert has_work(cache)
    assert [key for key in ("key:0", f"key:{ENTRIES - 1}", "new") if key in cache] == ["new"]
    assert (cache.get(f"key:{ENTRIES - 1}"), dict(cache.items())) == (None, {"new": 1})
    assert cache.count(Everything()).entries <= 10  # an estimate: one entry of a sample of 1,000
    cache.apply(Keys(f"key:{ENTRIES - 1}"))
    while cache.has_sweep_work:
        cache.sweep()
    assert (held(mapping), cache.count(Everything()), cache.get("new")) == (1, Count(1, is_estimate=False), 1)
    assert cache.stats().mapping_errors == 0


@MAPPINGS
def test_a_full_mapping_makes_room_by_removing_expired_entries_only(mapping_of: Callable[..., Any]) -> None:
    clock = FakeClock()
    cache, mapping = filled(mapping_of, clock, maxsize=200)
    clock.now += 5
    live = [f"live:{number}" for number in range(100)]
    for key in live:  # evicts the 100 oldest
        cache[key] = key
    clock.now += 5
    for number in range(100):
        cache[f"new:{number}"] = number
        assert held(mapping) <= 200
    assert [key for key in live if key not in cache] == []
    assert (cache.stats().refused_fills, cache.stats().mapping_errors) == (0, 0)
    for number in range(300):  # nothing has expired: the oldest are evicted, as ever
        cache[f"newer:{number}"] = number
    assert (held(mapping), cache.get("newer:299")) == (200, 299)


def test_a_mapping_with_hooks_of_its_own_keeps_them() -> None:
    seen: list[str] = []

    class Hooked(TTLCache[str, Any]):
        def expire(self, time: Any = None) -> Any:
            expired = super().expire(time)
            seen.extend(key for key, _ in expired)
            return expired

    clock = FakeClock()
    cache, mapping = filled(lambda clock: Hooked(maxsize=10, ttl=10, timer=clock), clock)
    clock.now += 10
    cache["new"] = 1
    assert (len(seen), held(mapping)) == (10, 1)


def test_a_timer_that_raises_ends_the_sweep_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    is_broken = False

    def timer() -> float:
        if is_broken:
            raise RuntimeError("no time")
        return clock.now

    cache, _ = filled(lambda _: TTLCache(maxsize=ENTRIES, ttl=10, timer=timer), clock)
    clock.now += 10
    cache.stats()
    assert has_work(cache)
    is_broken = True
    cache.sweep()
    assert not has_work(cache)
    assert "removing expired entries" in caplog.text


@MAPPINGS
def test_the_length_is_that_of_the_listing_whatever_has_expired_or_waits_to_be_swept(
    mapping_of: Callable[..., Any],
) -> None:
    clock = FakeClock()
    cache, _ = filled(mapping_of, clock)
    assert len(cache) == len(list(cache)) == ENTRIES
    cache.apply(Keys("key:1", "key:2"))
    assert len(cache) == len(list(cache)) == ENTRIES - 2
    cache.store(cache.begin_load("short"), 1, ttl_seconds=3)
    clock.now += 5
    assert len(cache) == len(list(cache)) == ENTRIES - 2
    cache.apply(Prefixes("key:4"))
    assert len(cache) == len(list(cache)) < ENTRIES - 2
    while cache.has_sweep_work:
        cache.sweep()
    assert len(cache) == len(list(cache)) > 0
    cache["new"] = 1
    clock.now += 5
    assert len(cache) == len(list(cache)) == 1
    cache.disconnect()
    assert len(cache) == 0
