"""A cache as a mapping, while its entries come and go: views, sizes, and cachetools.cached on top."""

import threading
from inspect import signature
from typing import Any

import pytest
from cachetools import LRUCache, TTLCache, cached
from tests.support.fake_clock import FakeClock

from broadcache.shared import InvalidName, Keys
from broadcache.subscriber import LocalCache

NAMES = tuple("abcdef")


def filled(mapping: Any = None, **options: Any) -> LocalCache:
    cache = LocalCache({} if mapping is None else mapping, **options)
    cache.confirm_coherent(cache.clock() + 3_600)
    for name in NAMES:
        cache[name] = name.upper()
    return cache


def test_views_skip_what_is_invalidated_while_they_are_iterated() -> None:
    cache = filled()
    shown = []
    for key, value in cache.items():
        shown.append((key, value))
        cache.apply(Keys("c", "e"))
    assert shown == [("a", "A"), ("b", "B"), ("d", "D"), ("f", "F")]
    cache = filled()
    values = iter(cache.values())
    assert next(values) == "A"
    cache.apply(Keys("b"))
    assert list(values) == ["C", "D", "E", "F"]


def test_looking_up_each_listed_key_fails_then() -> None:
    """The negative control: what the views of a plain mapping do, and what dict(cache) still does."""
    cache = filled()
    keys = list(cache)
    cache.apply(Keys("c"))
    with pytest.raises(KeyError, match="c"):
        _ = [cache[key] for key in keys]


def test_views_skip_what_expires_while_they_are_iterated() -> None:
    clock = FakeClock()
    cache = LocalCache(TTLCache(maxsize=10, ttl=10, timer=clock), clock=clock)
    cache.confirm_coherent(clock.now + 3_600)
    for name in NAMES:
        cache[name] = name
        clock.now += 1
    shown = []
    for item in cache.items():
        shown.append(item)
        clock.now += 3
    assert shown == [("a", "a"), ("b", "b"), ("d", "d")]
    assert list(cache.values()) == []


def test_items_and_values_never_fail_under_invalidations_from_another_thread() -> None:
    cache = filled()
    is_over = threading.Event()

    def change() -> None:
        while not is_over.is_set():
            for name in NAMES:
                cache.apply(Keys(name))
                cache[name] = name.upper()

    changing = threading.Thread(target=change)
    changing.start()
    try:
        for _ in range(500):
            assert all(key.upper() == value for key, value in dict(cache.items()).items())
            assert set(cache.values()) <= {name.upper() for name in NAMES}
            assert "Z" not in cache.values()
    finally:
        is_over.set()
        changing.join()


def test_membership_and_length_of_views() -> None:
    cache = filled()
    assert (len(cache.items()), len(cache.values())) == (6, 6)
    assert ("a", "A") in cache.items()
    assert ("a", "B") not in cache.items()
    assert "A" in cache.values()


def test_popitem_drops_each_entry_once() -> None:
    cache = filled()
    assert sorted(cache.popitem() for _ in NAMES) == [(name, name.upper()) for name in NAMES]
    with pytest.raises(KeyError, match="the cache is empty, or bypassed"):
        cache.popitem()


def test_the_sizes_and_the_ttl_of_the_mapping_can_be_read() -> None:
    cache = filled(TTLCache(maxsize=100, ttl=300))
    assert (cache.maxsize, cache.currsize, cache.ttl) == (100, 6, 300)
    sized = filled(LRUCache(maxsize=100, getsizeof=lambda value: 10))
    assert (sized.maxsize, sized.currsize, sized.ttl) == (100, 60, None)
    plain = filled()
    assert (plain.maxsize, plain.currsize, plain.ttl) == (None, 6, None)


@pytest.mark.parametrize(("mapping", "maxsize"), [(TTLCache[str, Any](maxsize=100, ttl=300), 100), ({}, None)])
def test_cache_info_of_cachetools_shows_them(mapping: Any, maxsize: int | None) -> None:
    cache = LocalCache(mapping)
    cache.confirm_coherent(cache.clock() + 3_600)

    @cached(cache, key=lambda number: f"number:{number}", info=True)
    def double(number: int) -> int:
        return 2 * number

    assert [double(1), double(1), double(2)] == [2, 2, 4]
    assert tuple(double.cache_info()) == (1, 2, maxsize, 2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lock": threading.RLock()},
        pytest.param(
            {"condition": threading.Condition()},
            marks=pytest.mark.skipif("condition" not in signature(cached).parameters, reason="cachetools before 6"),
        ),
    ],
    ids=["", "lock", "condition"],
)
@pytest.mark.parametrize("is_coherent", [True, False], ids=["coherent", "bypassed"])
def test_the_default_keys_of_cachetools_are_refused_before_the_function_is_called(
    options: dict[str, Any], is_coherent: bool
) -> None:
    """Of before: a ValueError, which `cached` takes for "value too large", and goes on without the cache."""
    cache = LocalCache(TTLCache(maxsize=100, ttl=300))
    if is_coherent:
        cache.confirm_coherent(cache.clock() + 3_600)
    calls: list[int] = []

    @cached(cache, **options)
    def double(number: int) -> int:
        calls.append(number)
        return 2 * number

    for _ in range(2):
        with pytest.raises(
            InvalidName, match=r"got (tuple|_HashedTuple): \(1,\).*key=lambda id: f'product:{id}'"
        ) as error:
            double(1)
        assert isinstance(error.value, TypeError)
        assert not isinstance(error.value, ValueError)
    assert calls == []
