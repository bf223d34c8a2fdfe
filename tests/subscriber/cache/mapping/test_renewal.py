"""An empty mapping in place of one that was being changed when its process forked."""

from collections import OrderedDict
from collections.abc import MutableMapping
from typing import Any

import pytest
from cachetools import Cache, FIFOCache, LFUCache, LRUCache, RRCache, TLRUCache, TTLCache

from broadcache.subscriber.cache.mapping.renewal import Storeless, renewed


class Counting(TTLCache[str, Any]):
    def __init__(self) -> None:
        super().__init__(maxsize=2, ttl=60)
        self.evicted = 0

    def popitem(self) -> tuple[str, Any]:
        self.evicted += 1
        return super().popitem()


def last(keys: Any) -> Any:
    return keys[-1]


def in_a_minute(key: str, value: Any, now: float) -> float:
    return now + 60


MAPPINGS: list[MutableMapping[str, Any]] = [
    {},
    Cache(maxsize=2),
    FIFOCache(maxsize=2),
    LFUCache(maxsize=2),
    LRUCache(maxsize=2),
    RRCache(maxsize=2, choice=last),
    TLRUCache(maxsize=2, ttu=in_a_minute),
    TTLCache(maxsize=2, ttl=60),
    Counting(),
]


@pytest.mark.parametrize("mapping", MAPPINGS, ids=lambda mapping: type(mapping).__name__)
def test_it_is_empty_and_of_the_same_kind(mapping: MutableMapping[str, Any]) -> None:
    mapping["old"] = 1
    empty = renewed(mapping)
    assert empty is not None
    assert type(empty) is type(mapping)
    assert list(empty) == []
    empty["a"] = 1
    assert (dict(empty), list(mapping)) == ({"a": 1}, ["old"])
    if isinstance(mapping, Cache):
        empty.update({"b": 2, "c": 3})
        assert len(empty) == mapping.maxsize
    if isinstance(mapping, TTLCache | TLRUCache | RRCache):
        names = ("ttl", "ttu", "choice")
        assert [getattr(empty, each, None) for each in names] == [getattr(mapping, each, None) for each in names]


def test_a_subclass_keeps_its_attributes() -> None:
    empty = renewed(Counting())
    assert isinstance(empty, Counting)
    empty.update({"a": 1, "b": 2, "c": 3})
    assert empty.evicted == 1


def test_its_clock_goes_on_although_the_old_one_stands() -> None:
    now = 0.0
    mapping: TTLCache[str, Any] = TTLCache(maxsize=2, ttl=60, timer=lambda: now)
    with mapping.timer:  # as it stands while the mapping is being changed: it repeats one time
        empty = renewed(mapping)
        assert empty is not None
        empty["a"] = 1
        now = 61.0
        assert "a" not in empty


def test_its_sizes_are_those_of_the_old_one() -> None:
    empty = renewed(LRUCache[str, str](maxsize=4, getsizeof=len))
    assert empty is not None
    with pytest.raises(ValueError, match="too large"):
        empty["a"] = "aaaaa"


def test_a_mapping_of_another_kind_cannot_be_made_anew() -> None:
    assert renewed(OrderedDict()) is None


def test_what_takes_its_place_stores_nothing() -> None:
    nothing = Storeless()
    with pytest.raises(ValueError, match="too large"):
        nothing["a"] = 1
    with pytest.raises(KeyError):
        nothing["a"]
    with pytest.raises(KeyError):
        del nothing["a"]
    assert dict(nothing) == {}
