"""The entries and the history: memory stays bounded, and a mapping that fails leaves nothing stale behind."""

import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import pytest
from cachetools import LRUCache, TTLCache
from tests.support.fake_clock import FakeClock

from broadcache.shared import Everything, Keys, Prefixes, Tags
from broadcache.shared.clock import monotonic
from broadcache.subscriber import LocalCache
from broadcache.subscriber.cache.entries import Entries
from broadcache.subscriber.cache.mapping_errors import MappingErrors
from broadcache.subscriber.cache.recent import History

KEY = "product:42"
SLACK_MAX = 4_096
"""What an index may hold beyond the entries that live: it is cleaned when it has doubled, and that much more."""


def coherent_cache(mapping: Any) -> LocalCache:
    cache = LocalCache(mapping)
    cache.confirm_coherent(cache.clock() + 3_600)
    return cache


def entries_of(mapping: MutableMapping[str, Any]) -> Entries:
    return Entries(mapping, History(), MappingErrors(mapping, monotonic))


def index_sizes(entries: Entries) -> dict[str, int]:
    """How much each container of the index holds, whatever they are called."""
    containers = {name: value for name, value in vars(entries).items() if hasattr(value, "__len__")}
    return {name: len(container) for name, container in containers.items() if name != "mapping"}


@pytest.mark.parametrize("ttl_seconds", [None, 60.0], ids=["the mapping's ttl", "own ttl"])
def test_the_index_stays_small_when_entries_are_evicted(ttl_seconds: float | None) -> None:
    cache = coherent_cache(TTLCache(maxsize=100, ttl=300))
    for number in range(20_000):
        tags = (f"own:{number}", f"group:{number % 10}")
        cache.store(cache.begin_load(f"k{number}"), number, tags=tags, ttl_seconds=ttl_seconds)
    sizes = index_sizes(cache._entries)
    assert max(sizes.values()) <= 2 * 100 + SLACK_MAX, sizes
    assert sum(map(len, cache._entries._keys_of_tag.values())) <= 2 * (2 * 100 + SLACK_MAX)
    while cache.sweep():
        pass
    assert cache.stats().entries == 100


def test_the_index_stays_small_over_a_hundred_thousand_keys() -> None:
    cache = coherent_cache(LRUCache(maxsize=100))
    for number in range(100_000):
        cache.store(cache.begin_load(f"k{number}"), number)
    assert max(index_sizes(cache._entries).values()) <= 2 * 100 + SLACK_MAX


def test_the_index_is_empty_when_all_was_dropped() -> None:
    cache = coherent_cache({})
    for number in range(500):
        cache.store(cache.begin_load(f"k{number}"), number, tags=("many", f"own:{number}"), ttl_seconds=60)
    cache.apply(Tags("many"))
    while cache.sweep():
        pass
    sizes = index_sizes(cache._entries)
    heap = sizes.pop("_expiry_heap")
    assert heap <= 500
    assert sizes == dict.fromkeys(sizes, 0)


def test_the_heap_of_expiries_stays_small_when_one_entry_is_stored_again_and_again() -> None:
    cache = coherent_cache({})
    for _ in range(20_000):
        cache.store(cache.begin_load(KEY), 1, ttl_seconds=60)
    assert len(cache._entries._expiry_heap) <= SLACK_MAX


def test_the_history_stays_small_whatever_is_invalidated() -> None:
    cache = coherent_cache({})
    for number in range(20_000):
        cache.apply(Keys(f"k{number}"))
        cache.apply(Tags(f"t{number}"))
    for number in range(5_000):
        cache.apply(Prefixes(f"p{number}"))
    history = cache._history
    for recent in (history.keys, history.tags, history.prefixes._recent):
        assert len(recent._young) + len(recent._old) <= 2 * recent._names_max


def test_a_name_that_may_have_been_forgotten_counts_as_invalidated() -> None:
    history = History()
    history.keys.record(KEY, 2)
    newest = 3 + 2 * 8_192
    for stamp in range(3, newest):
        history.keys.record(f"other-{stamp}", stamp)
    assert history.concerns_load(1, KEY, ())
    assert not history.concerns_load(newest, KEY, ())


def test_a_prefix_concerns_the_keys_that_begin_with_it_and_no_others() -> None:
    history = History()
    for prefix in ("a", "abc", "ü"):
        history.prefixes.record(prefix, 2)
    assert [history.concerns_entry(1, key) for key in ("a", "ab", "abcd", "ü1", "b", "", "ba", "u")] == [
        True, True, True, True, False, False, False, False,
    ]  # fmt: skip
    assert not history.concerns_entry(2, "a")


def test_a_mapping_that_fails_is_left_without_the_entry_it_could_not_replace() -> None:
    class Fragile(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            if value == "unbearable":
                raise OSError("disk full")
            super().__setitem__(key, value)

    cache = coherent_cache(Fragile())
    cache.store(cache.begin_load(KEY), "old", tags=("tag",))
    assert cache.store(cache.begin_load(KEY), "unbearable", tags=("tag",)) is False
    assert cache.get(KEY) is None
    assert (cache.stats().entries, cache.stats().mapping_errors) == (0, 1)


def test_a_mapping_that_always_fails_to_evict_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(LRUCache[str, Any]):
        def popitem(self) -> tuple[str, Any]:
            raise RuntimeError("OrderedDict mutated during iteration")

    cache = coherent_cache(Stuck(maxsize=1))
    cache["a"] = 1
    cache["b"] = 2
    assert dict(cache) == {"a": 1}
    assert cache.stats().mapping_errors == 1
    assert "raised RuntimeError in" in caplog.text


def test_prefixes_of_many_lengths_are_forgotten_with_their_generation() -> None:
    history = History()
    for stamp in range(1, 5_001):
        history.prefixes.record("x" * stamp, stamp)
    assert len(history.prefixes._old_lengths) + len(history.prefixes._young_lengths) <= 1_024
    assert history.prefixes.has_since(4_999, "x" * 5_000)
    assert not history.prefixes.has_since(4_999, "y")


def test_entries_that_expire_together_are_removed_in_slices_and_served_no_more() -> None:
    entries = entries_of({})
    for number in range(1_000):
        entries.put(f"key {number}", number, 1, (), 10.0)
    assert entries.expire(10.0) == 64
    assert list(entries.live_keys(10.0)) == []
    while entries.earliest_expiry <= 10.0:
        assert entries.expire(10.0) > 0
    assert entries.mapping == {}


def test_entries_that_have_expired_do_not_enter_the_index_of_the_next_sweep_on_their_way_out() -> None:
    clock = FakeClock()
    cache = LocalCache(TTLCache(maxsize=10_000, ttl=300, timer=clock), clock=clock)
    cache.confirm_coherent(clock() + 3_600)
    for number in range(5_000):
        cache.store(cache.begin_load(f"k{number}"), number)
    while cache.sweep():
        pass
    clock.now += 301
    cache.apply(Everything())
    cache._sweep(1)
    assert not cache._entries._stamps
    assert cache._entries._unswept
    swept_to = sys.getsizeof(cache._entries._stamps)
    while cache.sweep():
        assert sys.getsizeof(cache._entries._stamps) == swept_to, "it made room for a key that was about to go"
    assert index_sizes(cache._entries)["_stamps"] == 0


class Calling(dict[str, Any]):
    """A mapping that calls back when it is asked whether it has a key."""

    on_contains: Callable[[], None] = staticmethod(lambda: None)

    def __contains__(self, key: object) -> bool:
        self.on_contains()
        return super().__contains__(key)


@pytest.mark.parametrize("key", ["product:42", "other"])
def test_the_entry_that_a_sweep_checks_can_be_dropped_by_the_mappings_own_code(key: str) -> None:
    mapping = Calling()
    cache = coherent_cache(mapping)
    cache.store(cache.begin_load(KEY), 1)
    cache.apply(Prefixes("unrelated:"))
    mapping.on_contains = lambda: cache.apply(Keys(key))
    while cache.sweep():
        pass
    mapping.on_contains = lambda: None
    assert cache.get(KEY) == (None if key == KEY else 1)
    assert (KEY in dict(mapping)) is (key != KEY)
    assert list(cache) == ([] if key == KEY else [KEY])


def test_the_entry_that_a_sweep_checks_is_kept_when_that_is_interrupted() -> None:
    mapping = Calling()
    cache = coherent_cache(mapping)
    cache.store(cache.begin_load(KEY), 1)
    cache.apply(Prefixes("unrelated:"))

    def interrupt() -> None:
        raise KeyboardInterrupt

    mapping.on_contains = interrupt
    with pytest.raises(KeyboardInterrupt):
        cache.sweep()
    mapping.on_contains = lambda: None
    assert cache.get(KEY) == 1
    cache.apply(Keys(KEY))
    assert cache.get(KEY) is None
    assert not dict(mapping)
