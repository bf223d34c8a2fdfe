"""A mapping, and its views, whose entries may be invalidated, or may expire, while they are iterated."""

from collections.abc import ItemsView, Iterator, Mapping, MutableMapping, ValuesView
from typing import TYPE_CHECKING, Any, Final, TypeVar

__all__ = ["LiveMapping", "V"]

if TYPE_CHECKING:
    # Type checkers know it without the package. Its default needs Python 3.13.
    from typing_extensions import TypeVar as TypeVarWithDefault

    V = TypeVarWithDefault("V", default=Any)
else:
    V = TypeVar("V")

_GONE: Final = object()


class LiveItems(ItemsView[str, V]):
    """The entries of a cache, each read when it is yielded. An entry that is gone by then is skipped."""

    def __init__(self, cache: Mapping[str, V]) -> None:
        super().__init__(cache)
        self._cache = cache

    def __iter__(self) -> Iterator[tuple[str, V]]:
        for key in self._cache:
            value: Any = self._cache.get(key, _GONE)
            if value is not _GONE:
                yield key, value


class LiveValues(ValuesView[V]):
    """The values of the same entries."""

    def __init__(self, cache: Mapping[str, V]) -> None:
        super().__init__(cache)
        self._cache = cache

    def __iter__(self) -> Iterator[V]:
        return (value for _, value in LiveItems(self._cache))

    def __contains__(self, value: object) -> bool:
        return any(each is value or each == value for each in self)


class LiveMapping(MutableMapping[str, V]):
    """A mutable mapping whose entries may go at any moment: what it derives from its lookups goes on without them."""

    def items(self) -> ItemsView[str, V]:
        """A view of the entries. Iterating it skips those that are invalidated or expire meanwhile.

        `dict(cache)` looks up each listed key, and raises KeyError for those: write `dict(cache.items())`.
        """
        return LiveItems(self)

    def values(self) -> ValuesView[V]:
        """A view of the values, like `items`."""
        return LiveValues(self)

    def popitem(self) -> tuple[str, V]:
        """Drop an entry that a read would return, and return it. Raises: KeyError when there is none."""
        for key in self:
            value: Any = self.pop(key, _GONE)
            if value is not _GONE:
                return key, value
        raise KeyError("the cache is empty, or bypassed")

    def __len__(self) -> int:
        return sum(1 for _ in self)

    # A cache equals only itself, whatever its contents: several caches may be in one set.

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)
