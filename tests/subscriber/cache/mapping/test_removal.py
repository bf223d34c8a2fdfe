"""Removing an entry without the mapping's own methods: the same effects and errors, and its own way if in doubt."""

import random
from typing import Any

import pytest
from cachetools import Cache, LRUCache, TTLCache
from tests.support.fake_clock import FakeClock

from broadcache.subscriber.cache.mapping import removal as removal_module
from broadcache.subscriber.cache.mapping.removal import removal_of

KEYS = [f"k{number}" for number in range(12)]


def inside(mapping: TTLCache[str, int]) -> list[Any]:
    """Everything that a TTLCache consists of, in its orders; walked in both directions."""
    parts: Any = mapping
    root, forward, backward = parts._TTLCache__root, [], []
    link = root.next
    while link is not root:
        forward.append((link.key, link.expires))
        link = link.next
    link = root.prev
    while link is not root:
        backward.append((link.key, link.expires))
        link = link.prev
    assert backward == forward[::-1]
    return [parts._Cache__data, parts._Cache__currsize, list(parts._TTLCache__links), forward]


def outcome(remove: Any, key: str) -> Any:
    try:
        return remove(key)
    except KeyError as error:
        return type(error), error.args


@pytest.mark.parametrize("seed", range(20))
def test_it_does_what_the_mappings_own_deletion_does(seed: int) -> None:
    choose, clock = random.Random(seed), FakeClock()
    ours, theirs = (TTLCache[str, int](maxsize=8, ttl=10, timer=clock) for _ in range(2))
    remove = removal_of(ours)
    removed = 0
    for step in range(400):
        key = choose.choice(KEYS)
        match choose.randrange(4):
            case 0:
                ours[key] = theirs[key] = step
            case 1:
                assert ours.get(key) == theirs.get(key)
            case 2:
                clock.now += choose.random() * 4
            case _:
                result = outcome(remove, key)
                assert result == outcome(theirs.__delitem__, key)
                removed += result is None
        assert inside(ours) == inside(theirs)
    assert removed


def test_it_finds_the_parts_of_a_mapping_that_was_filled_anew() -> None:
    mapping = TTLCache[str, int](maxsize=8, ttl=10)
    remove = removal_of(mapping)
    other = TTLCache[str, int](maxsize=8, ttl=10)
    other["a"] = 1
    mapping.__dict__.update(other.__dict__)
    remove("a")
    assert "a" not in mapping


class Counting(TTLCache[str, int]):
    """A subclass: its deletion is not what is repeated."""

    deleted = 0

    def __delitem__(self, key: str) -> None:
        self.deleted += 1
        super().__delitem__(key)


def test_a_mapping_of_another_type_is_asked_itself() -> None:
    mapping = Counting(maxsize=8, ttl=10)
    mapping["a"] = 1
    removal_of(mapping)("a")
    assert mapping.deleted == 1
    for other in (LRUCache[str, int](maxsize=8), TTLCache[str, int](8, 10, getsizeof=lambda value: 2)):
        other["a"] = 1
        removal_of(other)("a")
        assert (len(other), other.currsize) == (0, 0)


@pytest.mark.parametrize("kind", [TTLCache, Cache])
def test_a_deletion_that_another_program_has_replaced_is_called(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    original = kind.__delitem__

    def replaced(self: Any, key: str, *arguments: Any) -> None:
        called.append(key)
        original(self, key, *arguments)

    monkeypatch.setattr(kind, "__delitem__", replaced)
    mapping = TTLCache[str, int](maxsize=8, ttl=10)
    mapping["a"] = 1
    remove = removal_of(mapping)
    assert getattr(remove, "func", None) is not removal_module._remove_from_ttl
    remove("a")
    assert kind is Cache or called == ["a"]


def test_another_version_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal_module, "_IS_KNOWN_VERSION", False)
    assert getattr(removal_of(TTLCache[str, int](maxsize=8, ttl=10)), "func", None) is not (
        removal_module._remove_from_ttl
    )
