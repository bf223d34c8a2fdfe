"""A mapping that raises, or calls back: what it failed to forget is not served, and nothing else is harmed."""

import asyncio
import contextlib
import datetime
import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from typing import Any

import pytest
from cachetools import LRUCache, TTLCache
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.fake_clock import FakeClock

from broadcache.shared import Everything, InvalidName, Keys, Prefixes, Tags, Target
from broadcache.shared.fingerprint import NO_FINGERPRINT
from broadcache.shared.invalidation import Invalidation, invalidation_of
from broadcache.shared.wire import encode
from broadcache.subscriber import LocalCache, Subscriber
from broadcache.subscriber.cache import entries as entries_module
from broadcache.subscriber.cache.mapping import reads as reads_module
from broadcache.subscriber.following.sequencer import Sequencer

TARGETS: tuple[Target, ...] = (Keys("a", "b"), Tags("red"), Prefixes("a", "b"), Everything())


class Broken(Exception):
    """What a mapping raises. Its text would show a value, which must not be logged."""

    def __init__(self) -> None:
        super().__init__("secret value")


class Fragile(TTLCache[str, Any]):
    """Raises in the methods named in `broken`, `times` times, before or after it has done what it was asked.

    Not before it `is_armed`, which `filled` sees to.
    """

    def __init__(self, *broken: str, times: float = math.inf, error: type[BaseException] = Broken) -> None:
        super().__init__(maxsize=1_000, ttl=300)
        self.error = error
        self.is_armed = False
        self.is_late = False
        self.times = times
        self.broken = set(broken)

    def fail(self, method: str) -> None:
        if self.is_armed and method in self.broken and self.times > 0:
            self.times -= 1
            raise self.error

    def __getitem__(self, key: str) -> Any:
        self.fail("__getitem__")
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if not self.is_late:
            self.fail("__setitem__")
        super().__setitem__(key, value)
        self.fail("__setitem__")

    def __delitem__(self, key: str) -> None:
        if not self.is_late:
            self.fail("__delitem__")
        super().__delitem__(key)
        self.fail("__delitem__")

    def __contains__(self, key: object) -> bool:
        self.fail("__contains__")
        return super().__contains__(key)

    def __len__(self) -> int:
        self.fail("__len__")
        return super().__len__()

    def __iter__(self) -> Iterator[str]:
        self.fail("__iter__")
        return super().__iter__()


class FailingTimer:
    """The timer of an exact TTLCache, whose hits take no lock: its methods raise while `is_broken`."""

    def __init__(self) -> None:
        self.is_broken = False

    def __call__(self) -> float:
        if self.is_broken:
            raise Broken
        return 0.0


def coherent_cache(mapping: MutableMapping[str, Any], **options: Any) -> LocalCache:
    cache = LocalCache(mapping, **options)
    cache.confirm_coherent(cache.clock() + 3_600)
    return cache


def filled(mapping: MutableMapping[str, Any], **options: Any) -> LocalCache:
    cache = coherent_cache(mapping, **options)
    for key in ("a", "b", "c"):
        assert cache.store(cache.begin_load(key), f"old {key}", tags=("red",))
    if isinstance(mapping, Fragile):
        mapping.is_armed = True
    return cache


@pytest.fixture
def lock_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have hits of the fragile mapping take no lock, as those of the exact types that cachetools has."""
    monkeypatch.setattr(reads_module, "_LOCK_FREE_LOOKUPS", frozenset({Fragile, Flaky, TTLCache}))


def served(cache: LocalCache, key: str) -> set[object]:
    """All that any door of the cache shows of a key."""
    shown: set[object] = {cache.get(key), cache.fingerprint(key), dict(cache).get(key), cache.count(Keys(key)).entries}
    shown |= {each for each in cache if each == key} | {value for name, value in cache.items() if name == key}
    if key in cache:
        shown.add("contained")
    with contextlib.suppress(KeyError):
        shown.add(cache[key])
    return shown - {None, 0}


def sweep_all(cache: LocalCache) -> None:
    for _ in range(1_000):
        if not cache.sweep():
            return
    raise AssertionError("the sweep does not end")


def name_of(value: object) -> str:
    return type(value).__name__.lower()


# --- C4: an exception while an invalidation is applied ---------------------------------------------------------------


def test_an_exception_in_one_caches_mapping_loses_no_name_in_either_cache_of_the_namespace() -> None:
    first, second = filled(Fragile("__delitem__", times=1)), filled(Fragile())
    sequencer = Sequencer("products", [first, second])
    sequencer.restart(None, "subscribed")
    for cache in (first, second):
        for key in ("a", "b"):
            assert cache.store(cache.begin_load(key), "old")
    frame = encode(invalidation_of([Keys("a", "b")], namespace="products", source="test"))
    sequencer.receive(frame)
    assert [served(cache, key) for cache in (first, second) for key in ("a", "b")] == [set()] * 4
    assert (first.stats().mapping_errors, second.stats().mapping_errors) == (1, 0)
    assert second.stats().clears == {"subscribed": 1}


@pytest.mark.parametrize("is_late", [False, True], ids=["before it has deleted", "after"])
@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_what_could_not_be_removed_is_never_served(target: Target, is_late: bool) -> None:
    mapping = Fragile("__delitem__")
    mapping.is_late = is_late
    cache = filled(mapping)
    cache.apply(target)
    for work in (lambda: None, lambda: sweep_all(cache), lambda: cache.apply(Keys("a", "z")), cache.clear):
        work()
        assert (served(cache, "a"), served(cache, "b")) == (set(), set())
        assert cache.pop("a", "nothing") == "nothing"
    mapping.broken.clear()
    assert cache.store(cache.begin_load("a"), "new")
    assert (cache.get("a"), "a" in cache, cache.get("b")) == ("new", True, None)


def test_an_apply_that_fails_clears_that_cache_counts_it_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    cache = filled(Fragile("__delitem__"))
    cache.apply(Keys("a"))
    assert [served(cache, key) for key in "abc"] == [set()] * 3
    cache.store(cache.begin_load("b"), "new b")
    cache.apply(Keys("b"))
    stats = cache.stats()
    assert (stats.clears, stats.applied["keys"]) == ({"mapping failed": 2}, 2)
    assert stats.mapping_errors >= 2
    [record] = caplog.records
    text = record.getMessage()
    assert record.levelno == logging.ERROR
    assert "a local cache's mapping (Fragile) raised Broken in Fragile.fail (" in text
    assert "while applying an invalidation: the cache was cleared. Expected a mapping that raises only KeyError" in text
    assert "fix it, its getsizeof or its timer" in text
    assert not any(word in caplog.text for word in ("secret", "old a", "new b"))


def test_errors_are_logged_again_when_none_has_come_for_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    cache = filled(Fragile("__setitem__"), clock=clock)
    for seconds, logged in ((0, 1), (59, 1), (60, 1), (61, 2)):
        clock.now += seconds
        cache["a"] = 1
        assert len(caplog.records) == logged


def test_a_load_begun_before_an_apply_that_failed_is_not_stored() -> None:
    cache = filled(Fragile("__delitem__"))
    named, other = cache.begin_load("b"), cache.begin_load("c")
    cache.apply(Keys("a", "b"))
    assert not cache.store(named, "old b")
    assert not cache.store(other, "old c")


@pytest.mark.parametrize("apply", ["apply_invalidation", "apply_counted"])
def test_no_way_to_apply_raises_an_exception_of_the_mapping(apply: str) -> None:
    cache = filled(Fragile("__delitem__", "__contains__", "__len__", "__getitem__", "__iter__"))
    getattr(cache, apply)(Invalidation(keys=("a", "b"), tags=("red",)))
    cache.apply(Everything())
    cache.pop("c", None)
    assert cache.stats().mapping_errors > 0


def test_an_interrupt_in_an_apply_passes_when_the_cache_was_cleared() -> None:
    cache = filled(Fragile("__delitem__", times=1, error=KeyboardInterrupt))
    stamp, token = cache._stamp, cache.begin_load("c")
    with pytest.raises(KeyboardInterrupt):
        cache.apply(Keys("a", "b"))
    assert cache._stamp > stamp
    assert [served(cache, key) for key in "abc"] == [set()] * 3
    assert not cache.store(token, "old c")
    assert (cache.stats().clears, cache.stats().mapping_errors) == ({"mapping failed": 1}, 0)


def test_a_key_error_is_no_proof_that_the_entry_is_gone() -> None:
    """A subclass with an index of its own may raise KeyError before it has deleted anything."""
    cache = filled(Fragile("__delitem__", error=KeyError))
    cache.apply(Keys("a"))
    assert (served(cache, "a"), served(cache, "b"), cache.stats().mapping_errors) == (set(), set(), 1)


def test_an_entry_that_was_evicted_before_is_no_error() -> None:
    mapping = Fragile()
    cache = filled(mapping)
    del mapping["a"]
    cache.apply(Keys("a"))
    assert (cache.get("b"), cache.stats().mapping_errors) == ("old b", 0)


@pytest.mark.usefixtures("lock_free")
def test_a_lock_free_hit_does_not_find_what_could_not_be_removed() -> None:
    mapping = Fragile("__delitem__")
    cache = filled(mapping)
    assert cache._fast_until > 0
    cache.apply(Keys("a"))
    cache.store(cache.begin_load("d"), "new d")
    sweep_all(cache)
    assert mapping["a"] == "old a"
    assert (served(cache, "a"), served(cache, "b"), cache.get("d")) == (set(), set(), "new d")
    mapping.broken.clear()
    cache._entries.retry_at = -math.inf
    sweep_all(cache)
    assert (served(cache, "a"), list(mapping)) == (set(), ["d"])
    assert cache._fast_until > 0


@pytest.mark.usefixtures("lock_free")
def test_no_point_at_which_a_hit_stands_still_serves_what_an_apply_that_fails_has_named() -> None:
    """A hit that began after the apply returned must miss; one that began before may be old, and is looked at again.

    The hit is stopped at its reading of the clock, which lies between its look at the stamp and its lookup.
    """
    clock = FakeClock()
    cache = filled(Fragile("__delitem__"), clock=clock)
    is_first = itertools.count()

    def stopping() -> float:
        if next(is_first) == 0:
            cache.apply(Keys("a"))
        return clock.now

    cache._clock = stopping
    assert cache.get("a") is None
    assert cache.get("a") is None
    assert cache.stats().clears == {"mapping failed": 1}


def test_a_name_whose_hash_raises_clears_what_it_may_have_named() -> None:
    class Unhashable(str):
        __slots__ = ()

        def __hash__(self) -> int:
            raise Broken

    for target in (Keys(Unhashable("a")), Tags(Unhashable("red")), Prefixes(Unhashable("a"))):
        cache = filled({})
        cache.apply(target)
        assert served(cache, "a") == set()
        cache.store(cache.begin_load(Unhashable("a")), "new", tags=(Unhashable("red"),))
        assert (cache.get("a"), cache.get(Unhashable("a")), Unhashable("a") in cache) == ("new", None, True)
        assert cache.get_or_load_sync(Unhashable("d"), lambda: "loaded") == "loaded"


def test_a_name_whose_comparison_raises_costs_a_clear_and_no_more() -> None:
    class Incomparable(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            raise Broken

    cache = filled({})
    cache.apply(Keys(Incomparable("d")))
    token = cache.begin_load("d")
    cache.apply(Keys("z"))
    assert cache.store(token, "voided in doubt") is False
    assert cache.get_or_load_sync("d", lambda: "new") == "new"
    assert (cache.get("d"), cache.stats().clears) == ("new", {"mapping failed": 1})


def test_values_are_never_compared() -> None:
    class Incomparable:
        def __eq__(self, other: object) -> bool:
            raise Broken

        __hash__ = None  # type: ignore[assignment]

        def __bool__(self) -> bool:
            raise Broken

    cache, value = coherent_cache(TTLCache(maxsize=10, ttl=300)), Incomparable()
    cache["a"] = value
    assert cache.get("a") is value
    assert cache.get_or_load_sync("a", Incomparable) is value
    assert cache.pop("a") is value
    assert cache.stats().mapping_errors == 0


# --- code that calls back --------------------------------------------------------------------------------------------


class CallingBack(TTLCache[str, Any]):
    """Does something else with the cache while it deletes, stores, reads or looks."""

    def __init__(self) -> None:
        super().__init__(maxsize=1_000, ttl=300, getsizeof=self.size)
        self.work: Callable[[], object] = lambda: None

    def call(self) -> None:
        work, self.work = self.work, lambda: None
        work()

    def size(self, value: object) -> int:
        self.call()
        return 1

    def __delitem__(self, key: str) -> None:
        self.call()
        super().__delitem__(key)
        self.call()

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        self.call()
        return value

    def __contains__(self, key: object) -> bool:
        is_there = super().__contains__(key)
        self.call()
        return is_there


def test_no_two_invalidations_have_one_stamp_and_it_never_goes_back() -> None:
    mapping = CallingBack()
    cache = filled(mapping)
    seen = [cache._stamp]

    def apply_within() -> None:
        seen.append(cache._stamp)
        cache.apply(Keys("c"))
        seen.append(cache._stamp)

    mapping.work = apply_within
    cache.apply(Keys("a"))
    seen.append(cache._stamp)
    assert seen[0] == seen[1] < seen[2] < seen[3]
    assert cache._history.keys._young["a"] != cache._history.keys._young["c"]


def test_a_value_stored_while_its_invalidation_is_applied_is_voided() -> None:
    """The deletion of `b`, once it is done, stores what was loaded of `b` before."""
    mapping = CallingBack()
    cache = filled(mapping)
    token = cache.begin_load("b")

    def store_after_the_deletion() -> None:
        mapping.work = lambda: cache.store(token, "old b")

    mapping.work = store_after_the_deletion
    cache.apply(Keys("b", "a"))
    assert (served(cache, "b"), cache.stats().voided_fills) == (set(), 1)


@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_an_invalidation_applied_while_a_value_is_stored_voids_it(target: Target) -> None:
    def size(value: object) -> int:
        if value == "old a":
            cache.apply(target)
        return 1

    cache = coherent_cache(TTLCache(maxsize=10, ttl=300, getsizeof=size))
    assert cache.store(cache.begin_load("a"), "old a", tags=("red",)) is False
    assert (served(cache, "a"), cache.stats().voided_fills) == (set(), 1)


def test_hits_are_closed_while_the_mapping_stores_a_value_that_an_invalidation_may_void() -> None:
    closed: list[bool] = []

    def size(value: object) -> int:
        cache.apply(Tags("other"))
        cache.confirm_coherent(cache.clock() + 3_600)
        closed.append(cache._fast_until == -math.inf)
        return 1

    cache = coherent_cache(TTLCache(maxsize=10, ttl=300, getsizeof=size))
    cache["a"] = 1
    assert closed == [True]
    assert cache._fast_until > 0


@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_an_invalidation_applied_while_an_entry_is_read_is_obeyed(target: Target) -> None:
    mapping = CallingBack()
    cache = filled(mapping)
    mapping.work = lambda: cache.apply(target)
    assert cache.get("a") is None
    cache.store(cache.begin_load("a"), "new", tags=("red",))
    mapping.work = lambda: cache.apply(target)
    assert "a" not in cache


def test_what_is_stored_and_swept_while_names_are_recorded_is_older_than_all_of_them() -> None:
    """The hash of a name stands for a finaliser, which may run between any two names."""
    cache = filled(TTLCache(maxsize=10, ttl=300))
    token = cache.begin_load("b")

    class Meddling(str):
        __slots__ = ()

        def __hash__(self) -> int:
            if work:
                work.pop()()
            return str.__hash__(self)

    def meddle() -> None:
        cache.apply(Keys("c"))
        assert cache.store(token, "old b")
        cache.sweep()

    work = [meddle]
    cache.apply_invalidation(Invalidation(keys=(Meddling("a"),), prefixes=("b",)))
    assert (served(cache, "a"), served(cache, "b")) == (set(), set())


def test_a_sweep_within_a_sweep_or_an_apply_ends() -> None:
    mapping = CallingBack()
    cache = filled(mapping)
    mapping.work = lambda: sweep_all(cache)
    cache.apply(Everything())
    sweep_all(cache)
    cache["a"] = 1
    mapping.work = lambda: sweep_all(cache)
    cache.apply(Keys("a"))
    sweep_all(cache)
    assert not cache.has_sweep_work
    assert len(mapping) == 0


# --- H1: an exception in the sweep -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["__delitem__", "__contains__"])
@pytest.mark.parametrize("target", [Tags("red"), Prefixes("k"), Everything()], ids=name_of)
def test_a_sweep_of_a_mapping_that_raises_ends_and_tries_again_later(
    method: str, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    clock, mapping = FakeClock(), Fragile("__delitem__", method)
    cache = coherent_cache(mapping, clock=clock, max_staleness_seconds=3_600)
    for number in range(200):
        cache.store(cache.begin_load(f"k{number}"), number, tags=("red",))
    cache.apply(target)
    mapping.is_armed = True
    sweep_all(cache)
    assert not cache.has_sweep_work
    errors = cache.stats().mapping_errors
    assert errors >= 200
    assert len(caplog.records) == 1
    sweep_all(cache)
    assert cache.stats().mapping_errors - errors <= 2
    clock.now += 1
    mapping.broken.clear()
    assert (cache.has_sweep_work, len(mapping)) == (True, 200)
    sweep_all(cache)
    assert (len(mapping), list(cache)) == (0, [])


def test_an_entry_that_can_never_be_removed_does_not_keep_others_from_it() -> None:
    clock = FakeClock()

    class Poisoned(TTLCache[str, Any]):
        def __delitem__(self, key: str) -> None:
            if key == "k0" or is_broken:
                raise Broken
            super().__delitem__(key)

    is_broken = False
    mapping = Poisoned(maxsize=1_000, ttl=300)
    cache = coherent_cache(mapping, clock=clock, max_staleness_seconds=3_600)
    for number in range(100):
        cache.store(cache.begin_load(f"k{number}"), number)
    is_broken = True
    cache.apply(Everything())
    sweep_all(cache)
    is_broken = False
    for _ in range(10):
        clock.now += 1
        sweep_all(cache)
    assert list(mapping) == ["k0"]
    assert (cache.get("k0"), cache.get("k1")) == (None, None)


def test_an_own_expiry_of_an_entry_that_cannot_be_removed_is_obeyed() -> None:
    clock, timer = FakeClock(), FailingTimer()
    cache = coherent_cache(TTLCache(maxsize=10, ttl=300, timer=timer), clock=clock, max_staleness_seconds=3_600)
    cache.store(cache.begin_load("a"), "old a", ttl_seconds=10)
    cache.store(cache.begin_load("b"), "old b")
    clock.now += 10
    timer.is_broken = True
    assert cache.get("a") is None
    timer.is_broken = False
    assert (served(cache, "a"), cache.get("b")) == (set(), "old b")


@pytest.mark.usefixtures("lock_free")
def test_too_many_stuck_entries_keep_hits_closed_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries_module, "_STUCK_MAX", 1)
    mapping = Fragile("__delitem__")
    cache = filled(mapping)
    cache.apply(Everything())
    sweep_all(cache)
    mapping.broken.clear()
    cache._entries.retry_at = -math.inf
    sweep_all(cache)
    cache.store(cache.begin_load("d"), "new d")
    assert len(mapping) == 3
    assert [served(cache, key) for key in "abc"] == [set()] * 3
    assert (cache.get("d"), cache._fast_until) == ("new d", -math.inf)


class UnsweepableCache(LocalCache):
    """One whose own class raises: the subscriber's task has to survive that, too."""

    def sweep(self) -> bool:
        raise Broken


@pytest.mark.anyio
async def test_a_sweep_that_raises_does_not_end_the_subscriber(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken, mapping = UnsweepableCache({}), Fragile("__delitem__", "__contains__")
    failing, healthy = LocalCache(mapping), LocalCache({})
    mapping.is_armed = True
    async with Subscriber(redis_url, caches={"one": broken, "two": failing, "three": healthy}) as subscriber:
        for _ in range(2):
            for namespace, cache in (("one", broken), ("two", failing), ("three", healthy)):
                cache.store(cache.begin_load("a"), 1)
                await subscriber.invalidate(Everything(), namespace=namespace)
                assert cache.get("a") is None
            async with asyncio.timeout(10):
                while healthy.has_sweep_work or failing.has_sweep_work:
                    await asyncio.sleep(0)
        assert subscriber.state == "coherent"
    assert caplog.text.count("the sweep of a cache (UnsweepableCache) raised Broken: expected a sweep") == 1
    assert "secret" not in caplog.text


# --- reads and stores ------------------------------------------------------------------------------------------------


def test_a_read_of_a_mapping_that_raises_is_a_miss_and_is_counted() -> None:
    cache = filled(Fragile("__getitem__"))
    assert cache.get("a", "nothing") == "nothing"
    assert cache.stats().mapping_errors == 1
    assert cache.get_or_load_sync("a", lambda: "loaded") == "loaded"
    timer = FailingTimer()
    lock_free = filled(TTLCache(maxsize=10, ttl=300, timer=timer))
    timer.is_broken = True
    assert lock_free.get("a") is None
    assert "a" not in lock_free
    assert list(lock_free) == []
    assert lock_free.stats().mapping_errors > 0


def test_a_key_that_cannot_be_hashed_or_is_no_string_is_its_callers_mistake() -> None:
    wrong: Any = ["a"]
    number: Any = 42
    for mapping in (Fragile(), TTLCache[str, Any](maxsize=10, ttl=300)):
        cache = filled(mapping)
        with pytest.raises(TypeError, match="unhashable"):
            cache.get(wrong)
        for misuse in (cache.begin_load, lambda key, cache=cache: cache.get_or_load_sync(key, lambda: 1)):
            with pytest.raises(InvalidName, match="expected a string as key, got int: 42"):
                misuse(number)
        assert cache.stats().mapping_errors == 0


@pytest.mark.parametrize("is_late", [False, True], ids=["before it has stored", "after"])
def test_a_store_that_fails_leaves_neither_the_old_value_nor_the_new_one(is_late: bool) -> None:
    mapping = Fragile("__setitem__", "__delitem__")
    mapping.is_late = is_late
    cache = filled(mapping)
    assert cache.store(cache.begin_load("a"), "new a") is False
    assert (served(cache, "a"), cache.get("b")) == (set(), "old b")
    cache["b"] = "new b"
    assert served(cache, "b") == set()
    mapping.broken.clear()
    sweep_all(cache)
    assert (served(cache, "a"), served(cache, "b")) == (set(), set())
    cache["a"] = "newest"
    assert cache["a"] == "newest"


@pytest.mark.usefixtures("lock_free")
def test_a_store_that_fails_in_a_mapping_with_lock_free_hits_is_not_found_by_them() -> None:
    cache = filled(Fragile("__setitem__", "__delitem__"))
    assert cache.store(cache.begin_load("a"), "new a") is False
    assert cache.store(cache.begin_load("b"), None) is False
    assert (served(cache, "a"), served(cache, "b"), cache.get("c")) == (set(), set(), "old c")


@pytest.mark.anyio
async def test_callers_get_what_was_loaded_although_the_mapping_cannot_store_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def size(value: object) -> int:
        raise Broken

    cache = coherent_cache(LRUCache(maxsize=10, getsizeof=size))
    calls = itertools.count()

    async def load() -> str:
        next(calls)
        await asyncio.sleep(0)
        return "loaded"

    assert await asyncio.gather(*(cache.get_or_load("a", load) for _ in range(3))) == ["loaded"] * 3
    assert cache.get_or_load_sync("a", lambda: "again") == "again"
    assert next(calls) == 1
    assert (cache.get("a"), cache.stats().mapping_errors, cache.stats().refused_fills) == (None, 2, 0)
    assert len(caplog.records) == 1


def test_stats_and_repr_answer_whatever_the_mapping_raises() -> None:
    cache = filled(Fragile("__len__", "__contains__"))
    assert cache.stats().entries == 3
    assert repr(cache) == "<LocalCache of 3 entries, coherent>"
    assert cache.count(Everything()).entries == 3


def test_a_fingerprint_of_a_value_whose_own_code_raises_is_none_that_can_be_told() -> None:
    class Lost(datetime.tzinfo):
        def utcoffset(self, moment: datetime.datetime | None) -> datetime.timedelta:
            raise Broken

        dst = utcoffset

        def tzname(self, moment: datetime.datetime | None) -> str:
            raise Broken

    cache = coherent_cache({})
    cache["a"] = {"since": datetime.datetime(2024, 1, 1, tzinfo=Lost())}
    assert cache.fingerprint("a") == NO_FINGERPRINT


# --- at random -------------------------------------------------------------------------------------------------------

METHODS = ("__getitem__", "__setitem__", "__delitem__", "__contains__", "__len__")
ACTIONS = st.one_of(
    st.tuples(st.just("store"), st.sampled_from("abcd")),
    st.tuples(st.just("load"), st.sampled_from("abcd")),
    st.tuples(st.just("apply"), st.sampled_from([*TARGETS, Keys("c"), Keys("d", "a"), Prefixes("d")])),
    st.tuples(st.just("sweep"), st.none()),
    st.tuples(st.just("tick"), st.none()),
    st.tuples(st.just("break"), st.sets(st.sampled_from(METHODS))),
)


class Flaky(Fragile):
    """Raises by a list of yes and no, and then no more."""

    def __init__(self, choices: list[bool]) -> None:
        super().__init__()
        self.is_armed = True
        self.choices = iter(choices)

    def fail(self, method: str) -> None:
        if method in self.broken and next(self.choices, False):
            raise Broken


@pytest.mark.usefixtures("lock_free")
@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(actions=st.lists(ACTIONS, max_size=30), choices=st.lists(st.booleans(), max_size=60), is_late=st.booleans())
def test_a_mapping_that_raises_at_random_never_serves_what_was_dropped(
    actions: list[tuple[str, Any]], choices: list[bool], is_late: bool
) -> None:
    clock, mapping = FakeClock(), Flaky(choices)
    mapping.is_late = is_late
    cache = coherent_cache(mapping, clock=clock, max_staleness_seconds=3_600)
    version = dict.fromkeys("abcd", 0)
    for action, what in actions:
        match action:
            case "store":
                cache.store(cache.begin_load(what), version[what], tags=("red",))
            case "load":
                assert cache.get_or_load_sync(what, partial(version.__getitem__, what), tags=("red",)) == version[what]
            case "apply":
                for key in version:
                    if isinstance(what, Everything | Tags) or (
                        key in what.names if isinstance(what, Keys) else key.startswith(what.names)
                    ):
                        version[key] += 1
                cache.apply(what)
            case "sweep":
                sweep_all(cache)
            case "tick":
                clock.now += 1
            case _:
                mapping.broken = set(what)
        for key, current in version.items():
            assert cache.get(key, current) == current
            assert key not in cache or cache.get(key, current) == current
    mapping.broken.clear()
    for _ in range(100):
        clock.now += 1
        sweep_all(cache)
    assert sorted(mapping) == sorted(cache)
    assert all(value == version[key] for key, value in mapping.items())


@pytest.mark.parametrize("threads", [3])
def test_threads_never_read_what_an_apply_that_fails_at_random_has_dropped(threads: int) -> None:
    choices = itertools.cycle([False, False, True, False, True, False, False])

    def timer() -> float:
        if is_breaking and next(choices):
            raise Broken
        return 0.0

    is_breaking = False
    cache = coherent_cache(TTLCache(maxsize=8, ttl=300, timer=timer))
    keys = [f"k{number}" for number in range(6)]
    source, floor = dict.fromkeys(keys, 0), dict.fromkeys(keys, 0)
    stale: list[tuple[str, int, int]] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            for key in keys:
                least = floor[key]
                got = cache.get_or_load_sync(key, partial(source.__getitem__, key))
                if got < least:
                    stale.append((key, got, least))

    readers = [threading.Thread(target=read) for _ in range(threads)]
    for reader in readers:
        reader.start()
    is_breaking = True
    for number in range(1_500):
        key = keys[number % len(keys)]
        source[key] += 1
        cache.apply(Keys(key))
        floor[key] = source[key]
    done.set()
    for reader in readers:
        reader.join()
    assert not stale
    assert cache.stats().mapping_errors > 0
