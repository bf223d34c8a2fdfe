"""Removing one entry from the wrapped mapping: as its own `del` does, in one call instead of five."""

from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any, Final

import cachetools
from cachetools import Cache, TTLCache

__all__ = ["removal_of"]

# The version whose deletion `_remove_from_ttl` repeats, and the deletions themselves: another program may have replaced
# them since.
_IS_KNOWN_VERSION: Final = cachetools.__version__.partition(".")[0] == "8"
_DELETIONS: Final = (TTLCache.__delitem__, Cache.__delitem__)


def removal_of(mapping: MutableMapping[str, Any]) -> Callable[[str], object]:
    """Return a function that does `del mapping[key]`, with the same effects and errors."""
    is_own = (TTLCache.__delitem__, Cache.__delitem__) == _DELETIONS
    if type(mapping) is TTLCache and _IS_KNOWN_VERSION and is_own and getattr(mapping, "_Cache__size", 0) is None:
        return partial(_remove_from_ttl, mapping)
    return partial(_remove_from_any, mapping)


def _remove_from_any(mapping: MutableMapping[str, Any], key: str) -> None:
    del mapping[key]


def _remove_from_ttl(mapping: Any, key: str) -> None:
    """Repeat, in the same order, what `TTLCache.__delitem__` of cachetools 8 does where all entries have the size 1.

    It asks the mapping for its parts each time: a mapping that was filled anew by `__setstate__` has others.
    """
    del mapping._Cache__data[key]
    mapping._Cache__currsize -= 1
    link = mapping._TTLCache__links.pop(key)
    before, after = link.prev, link.next
    before.next = after
    after.prev = before
    timer = mapping._TimedCache__timer
    if not timer() < link.expires:
        raise KeyError(key)
