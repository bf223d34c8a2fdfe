"""Expiry in slices: a TTLCache removes all expired entries at once, and 200,000 of them would hold the event loop."""

import heapq
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any, Final, TypeAlias

from cachetools import Cache, TLRUCache, TTLCache

__all__ = ["ExpirySlices"]

_SLICE_ENTRIES: Final = 64
_HEAP_SLACK: Final = 1_024


# Appends expired entries to a list after removing them; returns whether there are more.
_Take: TypeAlias = Callable[[Any, list[tuple[str, Any]]], bool]


class _Replacement(partial[Any]):
    """Stands in the place of a mapping's own method."""


class ExpirySlices:
    """Makes a mapping that expires entries remove at most `_SLICE_ENTRIES` of them at each store or count.

    A TTLCache and a TLRUCache call their own `expire` and `popitem` for that. Both are replaced on this one object,
    unless it has its own, which may be the user's hook. Entries that are past their expiry are never found, whether
    they are removed or not; they count as entries, so the mapping never exceeds its size. A full mapping removes
    expired entries before any other.

    Shape:  `is_behind` is whether the last slice ended before all expired entries were removed. `is_sliced` is whether
            the mapping's methods were replaced.
    Source: the attributes of cachetools 8 that hold entries by expiry. Without them the mapping stays as it is.
    """

    def __init__(self, mapping: MutableMapping[str, Any]) -> None:
        self.is_behind: bool = False
        self.is_sliced: bool = False
        self._mapping: Any = mapping
        if isinstance(mapping, TTLCache) and _is_replaceable(mapping, TTLCache, "_TTLCache__root", "_TTLCache__links"):
            self._replace(self._take_ttl, TTLCache)
        if isinstance(mapping, TLRUCache) and _is_replaceable(
            mapping, TLRUCache, "_TLRUCache__order", "_TLRUCache__items"
        ):
            self._replace(self._take_tlru, TLRUCache)

    def _replace(self, take: _Take, base: Any) -> None:
        # Not by way of its `__dict__`: asking for that makes each later access to an attribute slower.
        self._mapping.expire = _Replacement(self._expire, take)
        self._mapping.popitem = _Replacement(self._pop, take, base.popitem)
        self.is_sliced = True

    def advance(self, *, is_due: bool = False) -> None:
        """Remove another slice, if `is_behind` or `is_due`. Raises: any error of the mapping's timer."""
        if self.is_behind or (is_due and self.is_sliced):
            self.is_behind = False  # also if the timer raises: the next store or count tries again
            self._mapping.expire()

    def _expire(self, take: _Take, time: Any = None) -> list[tuple[str, Any]]:
        """Remove a slice of the expired entries, and return them: in place of `expire` of the mapping."""
        return self._slice(take, self._mapping.timer() if time is None else time)

    def _pop(self, take: _Take, pop: Callable[[Any], tuple[str, Any]]) -> tuple[str, Any]:
        """Remove an entry to make room: in place of `popitem` of the mapping."""
        with self._mapping.timer as time:
            expired = self._slice(take, time)
            return expired[-1] if expired else pop(self._mapping)

    def _slice(self, take: _Take, time: Any) -> list[tuple[str, Any]]:
        expired: list[tuple[str, Any]] = []
        self.is_behind = take(time, expired)
        return expired

    def _take_ttl(self, time: Any, expired: list[tuple[str, Any]]) -> bool:
        root = self._mapping._TTLCache__root
        links = self._mapping._TTLCache__links
        link = root.next
        while link is not root and not time < link.expires:
            if len(expired) == _SLICE_ENTRIES:
                return True
            expired.append((link.key, Cache.__getitem__(self._mapping, link.key)))
            Cache.__delitem__(self._mapping, link.key)
            del links[link.key]
            link.unlink()
            link = link.next
        return False

    def _take_tlru(self, time: Any, expired: list[tuple[str, Any]]) -> bool:
        order = self._mapping._TLRUCache__order
        items = self._mapping._TLRUCache__items
        if len(order) > 2 * len(items) + _HEAP_SLACK:
            order[:] = [item for item in order if not item.removed]
            heapq.heapify(order)
        for _ in range(_SLICE_ENTRIES):
            if not order or not (order[0].removed or not time < order[0].expires):
                return False
            item = heapq.heappop(order)
            if not item.removed:
                expired.append((item.key, Cache.__getitem__(self._mapping, item.key)))
                Cache.__delitem__(self._mapping, item.key)
                del items[item.key]
        return True


def _is_replaceable(mapping: Any, base: Any, *attributes: str) -> bool:
    methods = ((getattr(mapping, name), getattr(base, name)) for name in ("expire", "popitem"))
    return all(
        isinstance(method, _Replacement) or getattr(method, "__func__", None) is original
        for method, original in methods
    ) and all(hasattr(mapping, attribute) for attribute in attributes)
