"""An empty mapping in place of one that a fork left half-changed."""

from collections.abc import Iterator, MutableMapping
from typing import Any, Final

from cachetools import Cache, FIFOCache, LFUCache, LRUCache, RRCache, TLRUCache, TTLCache

__all__ = ["renewed"]

# What each class is built from, besides its size: the argument and the property of the same name.
_ARGUMENTS: Final[dict[type, tuple[str, ...]]] = {
    TTLCache: ("ttl", "timer"),
    TLRUCache: ("ttu", "timer"),
    RRCache: ("choice",),
    LRUCache: (),
    LFUCache: (),
    FIFOCache: (),
    Cache: (),
}


def renewed(mapping: MutableMapping[str, Any]) -> MutableMapping[str, Any] | None:
    """Return an empty mapping with the settings of `mapping`, whose content is not touched; None if that is unknown.

    A subclass of a cachetools class keeps its own attributes.
    """
    if type(mapping) is dict:
        return {}
    for base, names in _ARGUMENTS.items():
        if isinstance(mapping, base):
            source: Any = mapping
            arguments = {name: getattr(source, name) for name in names}
            if "timer" in arguments:
                # Its wrapper repeats one time while the mapping is being changed: it may do that for ever.
                arguments["timer"] = getattr(source.timer, "_Timer__timer", source.timer)
            empty: Any = type(mapping).__new__(type(mapping))
            vars(empty).update(vars(mapping))
            base.__init__(empty, source.maxsize, **arguments, getsizeof=vars(mapping).get("getsizeof"))  # type: ignore[misc]
            return empty  # type: ignore[no-any-return]
    return None


class Storeless(MutableMapping[str, Any]):
    """A mapping that refuses every entry as too large."""

    def __getitem__(self, key: str) -> Any:
        raise KeyError(key)

    def __setitem__(self, key: str, value: Any) -> None:
        raise ValueError("value too large")

    def __delitem__(self, key: str) -> None:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0
