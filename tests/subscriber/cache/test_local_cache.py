"""LocalCache: what it serves, what it forgets, and what it refuses to store."""

import math
import threading
from collections.abc import Callable, MutableMapping
from typing import Any

import pytest
from cachetools import LRUCache, TTLCache, cached
from tests.support.fake_clock import FakeClock

from broadcache.shared import Everything, InvalidName, InvalidSettings, InvalidTarget, Keys, Prefixes, Tags, Target
from broadcache.shared.invalidation import Invalidation
from broadcache.subscriber import LocalCache

KEY = "product:42"
TAG = "catalogue"
TARGETS: tuple[Target, ...] = (Keys(KEY), Tags(TAG), Prefixes("product:"), Everything())
UNRELATED: tuple[Target, ...] = (Keys("product:4"), Tags("cat"), Prefixes("product:43", "roduct"))


def coherent_cache(mapping: MutableMapping[str, Any] | None = None, **options: Any) -> LocalCache:
    cache = LocalCache({} if mapping is None else mapping, **options)
    cache.confirm_coherent(cache.clock() + 3_600)
    return cache


def name_of(value: object) -> str:
    return type(value).__name__.lower()


# --- stale fills -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_a_load_begun_before_an_invalidation_is_not_stored(target: Target) -> None:
    cache = coherent_cache()
    token = cache.begin_load(KEY)
    cache.apply(target)
    assert cache.store(token, "old", tags=(TAG,)) is False
    assert cache.get(KEY) is None
    assert cache.stats().voided_fills == 1


@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_its_value_is_returned_to_the_caller_all_the_same(target: Target) -> None:
    cache = coherent_cache()

    def load_while_it_changes() -> str:
        cache.apply(target)
        return "old"

    assert cache.get_or_load_sync(KEY, load_while_it_changes, tags=(TAG,)) == "old"
    assert cache.get_or_load_sync(KEY, lambda: "new", tags=(TAG,)) == "new"
    assert cache.get(KEY) == "new"


@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_the_same_schedule_on_bare_cachetools_stores_the_old_value(target: Target) -> None:
    """The negative control: what broadcache is for."""
    bare: TTLCache[str, str] = TTLCache(maxsize=10, ttl=300)

    def forget() -> None:
        for key in list(bare):
            if target == Everything() or key == KEY:
                bare.pop(key, None)

    def load_while_it_changes(key: str) -> str:
        forget()
        return "old"

    load = cached(bare, key=lambda key: key, lock=threading.RLock())(load_while_it_changes)
    assert load(KEY) == "old"
    assert bare.get(KEY) == "old"


@pytest.mark.parametrize("target", UNRELATED, ids=name_of)
def test_a_load_is_stored_when_only_others_were_invalidated(target: Target) -> None:
    cache = coherent_cache()
    token = cache.begin_load(KEY)
    cache.apply(target)
    assert cache.store(token, "value", tags=(TAG,)) is True
    assert cache.get(KEY) == "value"


@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_an_invalidation_drops_what_is_stored(target: Target) -> None:
    cache = coherent_cache(TTLCache(maxsize=10, ttl=300))
    cache.store(cache.begin_load(KEY), "old", tags=(TAG,))
    cache.apply(target)
    assert cache.get(KEY) is None


@pytest.mark.parametrize("target", UNRELATED, ids=name_of)
def test_an_invalidation_leaves_what_it_does_not_name(target: Target) -> None:
    cache = coherent_cache(TTLCache(maxsize=10, ttl=300))
    cache.store(cache.begin_load(KEY), "value", tags=(TAG,))
    cache.apply(target)
    assert cache.get(KEY) == "value"


def test_one_invalidation_may_name_keys_tags_and_prefixes() -> None:
    cache = coherent_cache()
    for key, tags in (("a", ()), ("b", (TAG,)), ("c:1", ()), ("d", ())):
        cache.store(cache.begin_load(key), key, tags=tags)
    cache.apply_invalidation(Invalidation(keys=("a",), tags=(TAG,), prefixes=("c:",)))
    assert list(cache) == ["d"]
    assert cache.stats().applied == {"keys": 1, "tags": 1, "prefixes": 1, "everything": 0}


def test_a_load_from_before_a_lost_connection_is_not_stored_after_it() -> None:
    cache = coherent_cache()
    token = cache.begin_load(KEY)
    cache.disconnect()
    cache.apply(Everything(), reason="subscribed")
    cache.confirm_coherent(cache.clock())
    assert cache.store(token, "old") is False
    assert cache.get(KEY) is None


@pytest.mark.parametrize(
    ("kind", "overflow"), [(Keys, 2 * 8_192), (Tags, 2 * 8_192), (Prefixes, 2 * 512)], ids=["keys", "tags", "prefixes"]
)
def test_a_token_older_than_the_history_remembers_is_refused(
    kind: type[Keys] | type[Tags] | type[Prefixes], overflow: int
) -> None:
    cache = coherent_cache()
    token = cache.begin_load(KEY)
    for number in range(overflow):
        cache.apply(kind(f"other-{number:05}"))
    assert cache.store(token, "value", tags=(TAG,)) is False
    assert cache.store(cache.begin_load(KEY), "value", tags=(TAG,)) is True


def test_a_token_that_the_history_reaches_back_to_is_not_refused_for_its_age() -> None:
    cache = coherent_cache()
    token = cache.begin_load(KEY)
    for number in range(8_192):
        cache.apply(Keys(f"other-{number}"))
    assert cache.store(token, "value") is True


def test_an_invalidation_in_the_midst_of_a_hit_is_obeyed() -> None:
    """A lookup takes no lock: here an invalidation is applied between its look at the lease and the value."""
    cache = coherent_cache(TTLCache(maxsize=10, ttl=300))
    cache.store(cache.begin_load(KEY), "old")

    class InterruptedKey(str):
        __slots__ = ()

        def __hash__(self) -> int:
            cache.apply(Prefixes("product:"))
            return str.__hash__(self)

    assert cache.get(InterruptedKey(KEY), "nothing") == "nothing"


# --- the promise: bypass outside the lease ---------------------------------------------------------------------------


def test_nothing_is_served_before_the_first_proof_of_coherence() -> None:
    cache = LocalCache({}, clock=FakeClock())
    cache[KEY] = "value"
    assert cache.get(KEY) is None
    assert KEY not in cache
    assert cache.stats().bypassed == 1
    assert cache.staleness_seconds is None


def test_a_read_is_served_until_the_lease_ends_and_not_at_its_end() -> None:
    clock = FakeClock()
    cache = LocalCache(TTLCache(maxsize=10, ttl=300), clock=clock, max_staleness_seconds=5)
    cache.confirm_coherent(clock.now - 1)
    cache[KEY] = "value"
    clock.now = math.nextafter(1_004.0, 0)
    assert (cache.get(KEY), cache.is_coherent) == ("value", True)
    clock.now = 1_004.0
    assert (cache.get(KEY), cache.is_coherent) == (None, False)
    cache.confirm_coherent(clock.now)
    assert cache.get(KEY) == "value"


def test_an_older_proof_does_not_shorten_the_lease() -> None:
    clock = FakeClock()
    cache = LocalCache({}, clock=clock)
    cache.confirm_coherent(clock.now)
    cache.confirm_coherent(clock.now - 4)
    assert cache.coherent_as_of == clock.now
    clock.now += 2
    assert cache.staleness_seconds == 2
    assert cache.is_coherent


def test_a_disconnected_cache_is_bypassed_at_once() -> None:
    cache = coherent_cache()
    cache[KEY] = "value"
    cache.disconnect()
    assert cache.get(KEY) is None
    assert cache.get_or_load_sync(KEY, lambda: "from the source") == "from the source"
    assert not cache.is_coherent


def test_when_told_to_it_serves_while_incoherent() -> None:
    clock = FakeClock()
    cache = LocalCache(TTLCache(maxsize=10, ttl=300, timer=clock), clock=clock, when_incoherent="serve")
    cache[KEY] = "value"
    assert cache.get(KEY) == "value"
    assert not cache.is_coherent
    cache.when_incoherent = "bypass"
    assert cache.get(KEY) is None
    cache.when_incoherent = "serve"
    clock.now += 299
    assert cache.get(KEY) == "value"
    clock.now += 1
    assert cache.get(KEY) is None


def test_an_invalidation_is_obeyed_while_incoherent_and_serving() -> None:
    cache = LocalCache({}, when_incoherent="serve")
    cache[KEY] = "value"
    cache.apply(Prefixes("p"))
    assert cache.get(KEY) is None


# --- lifetimes -------------------------------------------------------------------------------------------------------


def test_an_entry_lives_for_its_own_ttl_in_any_mapping() -> None:
    clock = FakeClock()
    cache = coherent_cache(clock=clock)
    cache.store(cache.begin_load("short"), 1, ttl_seconds=10)
    cache.store(cache.begin_load("long"), 2)
    clock.now = math.nextafter(1_010.0, 0)
    assert cache.get("short") == 1
    clock.now = 1_010.0
    assert "short" not in list(cache)
    assert cache.get("short") is None
    assert cache.get("long") == 2
    assert cache.stats().entries == 1


def test_an_entry_that_is_stored_again_has_the_newer_lifetime() -> None:
    clock = FakeClock()
    cache = coherent_cache(clock=clock)
    cache.store(cache.begin_load(KEY), 1, ttl_seconds=10)
    cache.store(cache.begin_load(KEY), 2, ttl_seconds=20)
    clock.now += 15
    assert cache.get(KEY) == 2
    cache.store(cache.begin_load(KEY), 3)
    clock.now += 1_000
    assert cache.get(KEY) == 3


def test_an_entry_cannot_outlive_the_ttl_of_its_mapping() -> None:
    clock = FakeClock()
    cache = coherent_cache(TTLCache(maxsize=10, ttl=10, timer=clock), clock=clock)
    cache.store(cache.begin_load(KEY), 1, ttl_seconds=100)
    clock.now += 10
    assert cache.get(KEY) is None


@pytest.mark.parametrize("ttl_seconds", [0, -1])
def test_an_entry_whose_lifetime_is_over_is_not_served(ttl_seconds: float) -> None:
    cache = coherent_cache()
    cache.store(cache.begin_load(KEY), 1, ttl_seconds=ttl_seconds)
    assert cache.get(KEY) is None


def test_a_lifetime_that_is_not_a_number_is_refused() -> None:
    cache = coherent_cache()
    with pytest.raises(InvalidSettings, match=r"ttl_seconds to be a number of seconds, a timedelta or None, got NaN"):
        cache.store(cache.begin_load(KEY), 1, ttl_seconds=math.nan)
    with pytest.raises(InvalidSettings, match=r"got NaN"):
        cache.get_or_load_sync(KEY, lambda: 1, ttl_seconds=math.nan)


@pytest.mark.parametrize(("drawn", "lifetime_seconds"), [(0.0, 100.0), (0.5, 90.0), (1.0, 80.0)])
@pytest.mark.parametrize("own_ttl", [True, False], ids=["own ttl", "the mapping's ttl"])
def test_jitter_cuts_off_up_to_its_share_of_the_lifetime(drawn: float, lifetime_seconds: float, own_ttl: bool) -> None:
    clock = FakeClock()
    mapping: MutableMapping[str, int] = {} if own_ttl else TTLCache(maxsize=10, ttl=100, timer=clock)
    cache = coherent_cache(mapping, clock=clock, ttl_jitter=0.2, uniform=lambda: drawn)
    cache.store(cache.begin_load(KEY), 1, ttl_seconds=100 if own_ttl else None)
    clock.now = math.nextafter(1_000 + lifetime_seconds, 0)
    assert cache.get(KEY) == 1
    clock.now = 1_000 + lifetime_seconds
    assert cache.get(KEY) is None


def test_jitter_gives_no_end_to_what_has_none() -> None:
    clock = FakeClock()
    cache = coherent_cache(clock=clock, ttl_jitter=0.2)
    cache[KEY] = 1
    assert cache.get(KEY) == 1
    clock.now += 3_000
    assert cache.get(KEY) == 1


def test_none_is_stored_only_with_a_negative_ttl_and_no_longer() -> None:
    clock = FakeClock()
    forgetful = coherent_cache(clock=clock)
    assert forgetful.store(forgetful.begin_load(KEY), None) is False
    assert KEY not in forgetful
    cache = coherent_cache(clock=clock, negative_ttl_seconds=10)
    assert cache.store(cache.begin_load(KEY), None, ttl_seconds=100) is True
    assert cache.get(KEY, "nothing stored") is None
    clock.now += 10
    assert cache.get(KEY, "nothing stored") == "nothing stored"


def test_a_shorter_ttl_of_its_own_shortens_the_negative_one() -> None:
    clock = FakeClock()
    cache = coherent_cache(clock=clock, negative_ttl_seconds=10)
    cache.store(cache.begin_load(KEY), None, ttl_seconds=3)
    clock.now += 3
    assert KEY not in cache


def test_none_that_is_not_stored_drops_the_value_of_before() -> None:
    cache = coherent_cache()
    cache[KEY] = "there"
    cache.store(cache.begin_load(KEY), None)
    assert cache.get(KEY) is None


def test_a_value_too_large_is_returned_and_not_stored_and_drops_the_value_of_before() -> None:
    cache = coherent_cache(LRUCache(maxsize=10, getsizeof=len))
    cache[KEY] = "small"
    assert cache.store(cache.begin_load(KEY), "x" * 11) is False
    assert cache.get(KEY) is None
    assert cache.get_or_load_sync(KEY, lambda: "y" * 11) == "y" * 11
    assert KEY not in cache
    assert cache.stats().refused_fills == 2


# --- the mapping protocol --------------------------------------------------------------------------------------------


def test_the_mapping_shows_what_a_read_would_be_served() -> None:
    cache = coherent_cache()
    for key in ("a:1", "a:2", "b:1"):
        cache[key] = key
    cache.apply(Prefixes("a:"))
    assert (list(cache), len(cache), dict(cache.items())) == (["b:1"], 1, {"b:1": "b:1"})
    assert cache["b:1"] == "b:1"
    with pytest.raises(KeyError, match="a:1"):
        cache["a:1"]
    cache.disconnect()
    assert (list(cache), len(cache), "b:1" in cache) == ([], 0, False)


def test_a_value_stored_by_hand_voids_the_loads_under_way() -> None:
    cache = coherent_cache()
    token = cache.begin_load(KEY)
    cache[KEY] = "by hand"
    assert cache.store(token, "from the source, earlier") is False
    assert cache[KEY] == "by hand"


@pytest.mark.parametrize(
    "forget",
    [lambda cache: cache.pop(KEY, None), lambda cache: cache.__delitem__(KEY), lambda cache: cache.clear()],
    ids=["pop", "del", "clear"],
)
def test_forgetting_by_hand_voids_the_loads_under_way(forget: Callable[[LocalCache], object]) -> None:
    cache = coherent_cache()
    cache[KEY] = "old"
    token = cache.begin_load(KEY)
    forget(cache)
    assert cache.store(token, "old") is False
    assert KEY not in cache


def test_popping_a_key_that_is_not_there_voids_its_load_under_way() -> None:
    """The usual way to invalidate a cachetools cache is `pop(key, None)`: it must not depend on what is stored."""
    cache = coherent_cache()
    token = cache.begin_load(KEY)
    assert cache.pop(KEY, "nothing") == "nothing"
    assert cache.store(token, "old") is False


def test_forgetting_by_hand_works_while_reads_are_bypassed() -> None:
    clock = FakeClock()
    cache = LocalCache({}, clock=clock)
    cache.confirm_coherent(clock.now)
    cache["a"] = cache["b"] = "old"
    clock.now += 5
    assert cache.pop("a", None) is None
    with pytest.raises(KeyError, match="b"):
        del cache["b"]
    cache.confirm_coherent(clock.now)
    assert (cache.get("a"), cache.get("b")) == (None, None)


def test_popping_without_a_default_raises_what_a_dict_would() -> None:
    cache = coherent_cache()
    cache[KEY] = "value"
    assert cache.pop(KEY) == "value"
    with pytest.raises(KeyError, match=KEY):
        cache.pop(KEY)


def test_the_rest_of_the_mapping_protocol_works() -> None:
    cache = coherent_cache()
    cache.update({"a": 1}, b=2)
    assert cache.setdefault("a", 9) == 1
    assert cache.setdefault("c", 3) == 3
    assert sorted(cache.values()) == [1, 2, 3]
    assert cache.popitem() in {("a", 1), ("b", 2), ("c", 3)}
    assert len(cache) == 2


def test_a_cache_is_itself_and_not_its_contents() -> None:
    one, other = coherent_cache(), coherent_cache()
    assert one != other
    assert len({one, other}) == 2


def test_its_repr_tells_how_much_it_holds_and_whether_it_serves() -> None:
    cache = coherent_cache()
    cache[KEY] = "value"
    assert repr(cache) == "<LocalCache of 1 entries, coherent>"
    cache.disconnect()
    assert repr(cache) == "<LocalCache of 1 entries, incoherent, bypass>"


def test_stats_count_what_happened() -> None:
    cache = coherent_cache()
    cache.get_or_load_sync(KEY, lambda: 1, tags=(TAG,))
    cache.get(KEY)
    cache.get("absent")
    cache.apply(Tags(TAG))
    cache.apply(Everything(), reason="gap")
    cache.disconnect()
    cache.get(KEY)
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.bypassed, stats.loads, stats.dropped) == (1, 2, 1, 1, 1)
    assert stats.clears == {"gap": 1}


def test_a_cache_has_no_more_attributes_than_cpython_finds_fastest() -> None:
    """A 31st makes each hit about 5 % slower, and each apply as well."""
    assert len(vars(coherent_cache())) <= 30


# --- users' mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mapping", "options", "text"),
    [
        ([], {}, "expected a mutable mapping such as TTLCache, got list"),
        (LocalCache({}), {}, "expected a plain mapping such as TTLCache, got a LocalCache; use it as it is"),
        ({"a": 1}, {}, "expected an empty mapping, got one with 1 entries, which may be stale by now"),
        ({}, {"max_staleness_seconds": 0}, "expected max_staleness_seconds to be a positive number, got 0"),
        ({}, {"max_staleness_seconds": math.inf}, "expected max_staleness_seconds to be a positive number, got inf"),
        ({}, {"max_staleness_seconds": math.nan}, "expected max_staleness_seconds to be a positive number, got nan"),
        ({}, {"ttl_jitter": 1}, "expected ttl_jitter to be at least 0 and below 1, got 1"),
        ({}, {"ttl_jitter": -0.1}, "expected ttl_jitter to be at least 0 and below 1, got -0.1"),
        ({}, {"negative_ttl_seconds": 0}, "expected negative_ttl_seconds to be None or a positive number, got 0"),
        ({}, {"when_incoherent": "stale"}, "expected when_incoherent to be 'bypass' or 'serve', got 'stale'"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_was_expected(mapping: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidSettings) as error:
        LocalCache(mapping, **options)
    assert text in str(error.value)


def test_a_key_that_is_not_a_string_is_refused() -> None:
    cache = coherent_cache()
    wrong: Any = 42
    for misuse in (
        lambda: cache.begin_load(wrong),
        lambda: cache.__setitem__(wrong, 1),
        lambda: cache.get_or_load_sync(wrong, lambda: 1),
    ):
        with pytest.raises(InvalidName, match="expected a string as key, got int: 42"):
            misuse()


def test_tags_that_no_invalidation_could_name_are_refused() -> None:
    cache = coherent_cache()
    wrong: Any = (42,)
    with pytest.raises(InvalidName, match="got the string 'catalogue'; write \\('catalogue',\\)"):
        cache.store(cache.begin_load(KEY), 1, tags=TAG)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidName, match="expected strings as tags, got int: 42"):
        cache.store(cache.begin_load(KEY), 1, tags=wrong)


def test_a_target_of_the_wrong_type_is_refused() -> None:
    wrong: Any = "product:42"
    with pytest.raises(InvalidTarget, match="expected Keys, Tags, Prefixes or Everything, got str"):
        coherent_cache().apply(wrong)


# --- the sweep ------------------------------------------------------------------------------------------------------


def test_a_tag_of_many_entries_is_forgotten_at_once_and_swept_later() -> None:
    cache = coherent_cache(TTLCache(maxsize=1_000, ttl=300))
    for number in range(200):
        cache.store(cache.begin_load(f"k{number}"), number, tags=("many", f"own{number}"))
    cache.store(cache.begin_load("other"), "other", tags=("own",))
    cache.apply(Tags("many"))
    assert cache.stats().entries == 201  # nothing was removed on the spot
    assert list(cache) == ["other"]
    assert [cache.get(f"k{number}") for number in range(200)] == [None] * 200
    cache.store(cache.begin_load("k7"), "new", tags=("many",))
    while cache.sweep():
        pass
    assert dict(cache) == {"other": "other", "k7": "new"}
    assert cache.stats().entries == 2
    cache.apply(Tags("many"))
    assert dict(cache) == {"other": "other"}


@pytest.mark.parametrize("target", [Prefixes("k"), Everything(), Tags("many")], ids=name_of)
def test_a_sweep_gives_back_the_memory_of_the_dead_in_slices(target: Target) -> None:
    cache = coherent_cache()
    for number in range(1_000):
        cache.store(cache.begin_load(f"k{number}"), number, tags=("many",))
    cache.apply(target)
    slices = 1
    while cache.sweep():
        slices += 1
    assert slices > 10
    assert not cache.has_sweep_work
    assert (cache.stats().entries, cache.stats().dropped) == (0, 1_000)
