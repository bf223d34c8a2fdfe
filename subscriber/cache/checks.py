"""Checks of what a user hands to a cache: keys, tags, lifetimes, settings."""

import gc
import logging
import math
from collections.abc import Iterable, Iterator, MutableMapping
from datetime import timedelta
from numbers import Real
from typing import Any, Final, Protocol, TypeAlias
from weakref import WeakValueDictionary

from cachetools import TTLCache

from ...shared.errors import InvalidName, InvalidSettings, InvalidTarget
from ...shared.invalidation import KEY_BYTES_MAX, TAG_BYTES_MAX, check_text

__all__ = [
    "Names",
    "Seconds",
    "Ttl",
    "check_settings",
    "checked_key",
    "checked_tags",
    "checked_ttl",
    "claim_mapping",
    "exact",
    "seconds_of",
    "warn_of_unnameable",
    "why_unnameable",
]

_log = logging.getLogger("broadcache.subscriber")

Seconds: TypeAlias = float | timedelta
Ttl: TypeAlias = Seconds | None


class _Several(Protocol):
    def __contains__(self, name: object, /) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...


# Anything that yields strings, but not one string, whose `__contains__` takes only strings.
Names: TypeAlias = _Several | Iterator[str]


class _Wrapping(Protocol):
    def wraps(self, mapping: object) -> bool:
        """Whether this cache keeps its entries in `mapping`."""
        ...


# The cache of each mapping, by the mapping's id, which another object may have once the cache has another mapping.
_cache_of: Final[WeakValueDictionary[int, _Wrapping]] = WeakValueDictionary()


def claim_mapping(mapping: MutableMapping[str, Any], cache: _Wrapping) -> None:
    """Record that `mapping` belongs to `cache`. Raises: InvalidSettings when it belongs to another one.

    An entry that one of two stores is one that the other finds, and does not drop: it would serve it while coherent.
    """
    if _is_wrapped(mapping):
        gc.collect()  # a cache is part of a cycle
        if _is_wrapped(mapping):
            raise InvalidSettings(
                f"expected a mapping of its own for each LocalCache, got a {type(mapping).__name__} that another one "
                "has; give both the same LocalCache, or each a mapping of its own: a class attribute is one object for "
                "all instances"
            )
    _cache_of[id(mapping)] = cache


def _is_wrapped(mapping: object) -> bool:
    other = _cache_of.get(id(mapping))
    return other is not None and other.wraps(mapping)


def exact(name: str) -> str:
    """Return a name as an exact string: a user's own type may raise in hash or comparison."""
    return name if type(name) is str else str.__str__(name)


def checked_key(key: str) -> str:
    """Return a key as an exact string. Raises: InvalidName."""
    if type(key) is str:
        return key
    if not isinstance(key, str):
        raise InvalidName(
            f"expected a string as key, got {type(key).__name__}: {key!r:.100}; invalidations name keys as strings. "
            "Pass a string; to cachetools.cached, a function that returns one: key=lambda id: f'product:{id}'"
        )
    return exact(key)


def checked_tags(tags: Names) -> tuple[str, ...]:
    """Return tags as exact strings. Raises: InvalidName."""
    if isinstance(tags, str):
        raise InvalidName(f"expected tags as a tuple or list of strings, got the string {tags!r}; write ({tags!r},)")
    names: tuple[Any, ...] = tuple(tags)
    for name in names:
        if not isinstance(name, str):
            raise InvalidName(
                f"expected strings as tags, got {type(name).__name__}: {name!r:.100}; invalidations name tags as "
                "strings"
            )
    return tuple(map(exact, names))


def why_unnameable(key: str, tags: Iterable[str]) -> str | None:
    """Return why no invalidation could name this key, or one of these tags; None when each can be named.

    The text shows neither.
    """
    try:
        check_text(key, KEY_BYTES_MAX, "key")
        for tag in tags:
            check_text(tag, TAG_BYTES_MAX, "tag")
    except InvalidTarget as error:
        return str(error)
    return None


def warn_of_unnameable(why: str) -> None:
    """Log once for each cache why a value was not stored."""
    _log.warning(
        "a local cache did not store a value, because no invalidation could name it: %s. Its caller received the "
        "value, and each read loads it again: shorten the key or tag, e.g. to a hash. Further values are only counted, "
        "in stats().unnameable_fills",
        why,
    )


def checked_ttl(ttl_seconds: Seconds | None) -> float | None:
    """Return a lifetime in seconds. Raises: InvalidSettings when it is not a number or a timedelta."""
    if ttl_seconds is None:
        return None
    seconds = seconds_of(ttl_seconds, "ttl_seconds")
    if math.isnan(seconds):
        raise InvalidSettings("expected ttl_seconds to be a number of seconds, a timedelta or None, got NaN")
    return seconds


def seconds_of(duration: Any, name: str) -> float:
    """Return a duration in seconds. Raises: InvalidSettings when it is not a number or a timedelta."""
    if isinstance(duration, timedelta):
        return duration.total_seconds()
    if not isinstance(duration, Real):
        raise InvalidSettings(
            f"expected {name} to be a number of seconds or a timedelta, "
            f"got {type(duration).__name__}: {duration!r:.100}"
        )
    try:
        return float(duration)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf if duration == abs(duration) else -math.inf


def check_settings(
    mapping: MutableMapping[str, Any],
    max_staleness_seconds: Seconds,
    ttl_jitter: float,
    negative_ttl_seconds: Seconds | None,
) -> tuple[float, float | None]:
    """Return `max_staleness_seconds` and `negative_ttl_seconds` in seconds. Raises: InvalidSettings."""
    _check_mapping(mapping)
    max_staleness = seconds_of(max_staleness_seconds, "max_staleness_seconds")
    if not 0 < max_staleness < math.inf:
        raise InvalidSettings(f"expected max_staleness_seconds to be a positive number, got {max_staleness_seconds!r}")
    jitter: object = ttl_jitter
    if not isinstance(jitter, float | int) or not 0 <= jitter < 1:
        raise InvalidSettings(f"expected ttl_jitter to be at least 0 and below 1, got {ttl_jitter!r}")
    if ttl_jitter:
        seconds_of(getattr(mapping, "ttl", math.inf), "the ttl of a mapping whose lifetimes are jittered")
    if negative_ttl_seconds is None:
        return max_staleness, None
    negative_ttl = seconds_of(negative_ttl_seconds, "negative_ttl_seconds")
    if not 0 < negative_ttl < math.inf:
        raise InvalidSettings(
            f"expected negative_ttl_seconds to be None or a positive number, got {negative_ttl_seconds!r}"
        )
    return max_staleness, negative_ttl


def _check_mapping(mapping: MutableMapping[str, Any]) -> None:
    if not isinstance(mapping, MutableMapping):
        raise InvalidSettings(f"expected a mutable mapping such as TTLCache, got {type(mapping).__name__}")
    if len(mapping):
        raise InvalidSettings(
            f"expected an empty mapping, got one with {len(mapping)} entries, which may be stale by now; "
            "empty it, or hand over a new one"
        )
    if isinstance(mapping, TTLCache):
        _check_ttl(mapping)


def _check_ttl(mapping: "TTLCache[str, Any]") -> None:
    """Check that the mapping can add its ttl to its timer's time: it does so at each store."""
    try:
        now = mapping.timer()
    except Exception:  # noqa: BLE001  (the user's code; it may only fail now, and is reported when a store fails)
        return
    ttl: Any = mapping.ttl
    try:
        _ = now + ttl
    except TypeError:
        raise InvalidSettings(
            "expected a TTLCache that can add its ttl to the time of its timer, got "
            f"ttl={ttl!r:.100} and a time of type {type(now).__name__}; with a timedelta, pass "
            "ttl.total_seconds(), or timer=datetime.now"
        ) from None
