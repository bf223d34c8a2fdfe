"""What a cache does not store, and says so: names that no invalidation could name, values of a broken getsizeof."""

import datetime
import logging
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import pytest
from cachetools import LRUCache, TTLCache
from tests.support.fake_clock import FakeClock

from broadcache.shared import InvalidSettings, InvalidTarget, Keys, Tags
from broadcache.shared.invalidation import KEY_BYTES_MAX, TAG_BYTES_MAX
from broadcache.subscriber import LocalCache

pytestmark = pytest.mark.anyio

SURROGATE = "product:\ud800"


def coherent_cache(mapping: Any = None, **options: Any) -> LocalCache:
    cache = LocalCache({} if mapping is None else mapping, **options)
    cache.confirm_coherent(cache.clock() + 3_600)
    return cache


UNNAMEABLE = [
    ("", (), "got '' at key"),
    ("k" * (KEY_BYTES_MAX + 1), (), "at most 1024 bytes of UTF-8, got 1025 at key"),
    ("é" * (KEY_BYTES_MAX // 2 + 1), (), "got 1026 at key"),
    (SURROGATE, (), "a lone surrogate at key"),
    ("a", ("fine", ""), "got '' at tag"),
    ("a", ("t" * (TAG_BYTES_MAX + 1),), "at most 256 bytes of UTF-8, got 257 at tag"),
    ("a", (SURROGATE,), "a lone surrogate at tag"),
]


@pytest.mark.parametrize(("key", "tags", "why"), UNNAMEABLE, ids=[why for *_, why in UNNAMEABLE])
async def test_what_no_invalidation_could_name_is_answered_and_not_stored(
    key: str, tags: tuple[str, ...], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = coherent_cache()
    with pytest.raises(InvalidTarget):
        _ = (Keys(key), Tags(*tags)) if tags else Keys(key)
    assert await cache.get_or_load(key, lambda: "value", tags=tags) == "value"
    assert cache.get_or_load_sync(key, lambda: "again", tags=tags) == "again"
    assert cache.store(cache.begin_load(key), "value", tags=tags) is False
    assert key not in cache
    stats = cache.stats()
    assert (stats.unnameable_fills, stats.entries, stats.refused_fills, stats.mapping_errors) == (3, 0, 0, 0)
    (warning,) = caplog.records
    assert (warning.levelno, why in warning.getMessage()) == (logging.WARNING, True)
    assert key not in warning.getMessage() or len(key) < 2, "a key may say whose it is"


def test_the_longest_names_that_an_invalidation_can_name_are_stored_and_dropped() -> None:
    cache = coherent_cache()
    for key, tags in (("k" * KEY_BYTES_MAX, ()), ("é" * (KEY_BYTES_MAX // 2), ()), ("a", ("t" * TAG_BYTES_MAX,))):
        assert cache.store(cache.begin_load(key), 1, tags=tags)
        cache.apply(Tags(*tags) if tags else Keys(key))
        assert key not in cache
    assert cache.stats().unnameable_fills == 0


def test_a_value_set_by_hand_under_such_a_key_is_not_stored() -> None:
    cache = coherent_cache()
    cache[SURROGATE] = 1
    assert cache.setdefault("", 2) == 2
    assert (len(cache), cache.stats().unnameable_fills) == (0, 2)


def test_an_older_value_is_dropped_when_the_new_one_has_tags_that_cannot_be_named() -> None:
    cache = coherent_cache()
    cache["a"] = "old"
    assert cache.store(cache.begin_load("a"), "new", tags=("",)) is False
    assert cache.get("a") is None


# --- a broken getsizeof ----------------------------------------------------------------------------------------------


def raises(value: object) -> int:
    raise ValueError("value too large")


def negative(value: object) -> int:
    if version("cachetools") < "8":
        pytest.skip("cachetools before 8 takes it as a size")
    return -1


@pytest.mark.parametrize("getsizeof", [raises, negative, int], ids=["raises", "negative", "int of a text"])
@pytest.mark.parametrize("kind", ["LRU", "TTL"])
def test_a_broken_getsizeof_is_logged_and_counted_as_an_error_not_as_a_value_too_large(
    getsizeof: Callable[[Any], int], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    size: Any = getsizeof
    cache = coherent_cache(
        LRUCache(maxsize=10, getsizeof=size) if kind == "LRU" else TTLCache(maxsize=10, ttl=300, getsizeof=size)
    )
    assert cache.get_or_load_sync("a", lambda: "text") == "text"
    assert (cache.stats().refused_fills, cache.stats().mapping_errors) == (0, 1)
    assert "raised ValueError in" in caplog.text
    assert "getsizeof" in caplog.text


def test_values_that_are_too_large_are_still_only_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Picky(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            raise ValueError("no room for this")

    for mapping in (LRUCache[str, Any](maxsize=10, getsizeof=lambda value: 11), Picky()):
        cache = coherent_cache(mapping)
        assert cache.get_or_load_sync("a", lambda: "text") == "text"
        assert (cache.stats().refused_fills, cache.stats().mapping_errors) == (1, 0)
    assert caplog.records == []


# --- durations -------------------------------------------------------------------------------------------------------


def test_durations_may_be_timedeltas() -> None:
    clock = FakeClock()
    cache = LocalCache(
        {},
        clock=clock,
        max_staleness_seconds=timedelta(minutes=1),
        negative_ttl_seconds=timedelta(seconds=10),
        ttl_jitter=0.5,
        uniform=lambda: 0.0,
    )
    assert cache.max_staleness_seconds == 60.0
    cache.confirm_coherent(clock.now + 3_600)
    assert cache.get_or_load_sync("a", lambda: 1, ttl_seconds=timedelta(seconds=5)) == 1
    assert cache.get_or_load_sync("none", lambda: None, ttl_seconds=timedelta(days=1)) is None
    clock.now += 4.9
    assert (cache.get("a"), "none" in cache) == (1, True)
    clock.now += 5
    assert (cache.get("a"), "none" in cache) == (None, True)
    clock.now += 0.2
    assert "none" not in cache


@pytest.mark.parametrize("ttl_jitter", [0.0, 0.1])
def test_a_ttl_cache_with_a_timedelta_and_a_timer_of_datetimes_is_wrapped(ttl_jitter: float) -> None:
    mapping: Any = TTLCache(maxsize=10, ttl=timedelta(minutes=5), timer=datetime.datetime.now)
    cache = coherent_cache(mapping, ttl_jitter=ttl_jitter)
    assert cache.get_or_load_sync("a", lambda: 1) == 1
    assert (cache.get("a"), cache.ttl, cache.stats().mapping_errors) == (1, timedelta(minutes=5), 0)


@pytest.mark.parametrize("ttl", [timedelta(minutes=5), None, "60"], ids=str)
def test_a_ttl_that_the_mapping_cannot_add_to_its_time_is_refused_at_construction(ttl: Any) -> None:
    with pytest.raises(InvalidSettings, match=r"expected a TTLCache that can add its ttl to the time of its timer"):
        LocalCache(TTLCache(maxsize=10, ttl=ttl))


@pytest.mark.parametrize(
    "options",
    [{"max_staleness_seconds": "5"}, {"negative_ttl_seconds": "5"}, {"ttl_jitter": "0.1"}],
    ids=lambda options: next(iter(options)),
)
def test_a_setting_of_the_wrong_type_is_refused_with_its_name(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettings, match=f"expected {next(iter(options))} to be"):
        LocalCache({}, **options)


@pytest.mark.parametrize("ttl_seconds", ["60", [60], object()], ids=lambda wrong: type(wrong).__name__)
async def test_a_wrong_lifetime_is_refused_before_the_source_is_read(ttl_seconds: Any) -> None:
    cache = coherent_cache()
    calls: list[int] = []
    with pytest.raises(InvalidSettings, match="expected ttl_seconds to be a number of seconds or a timedelta, got"):
        await cache.get_or_load("a", lambda: calls.append(1), ttl_seconds=ttl_seconds)
    with pytest.raises(InvalidSettings):
        cache.get_or_load_sync("a", lambda: calls.append(1), ttl_seconds=ttl_seconds)
    assert calls == []


def test_a_lifetime_of_a_huge_integer_is_no_limit() -> None:
    cache = coherent_cache()
    assert cache.store(cache.begin_load("a"), 1, ttl_seconds=10**400)
    assert cache.get("a") == 1
