"""Checks of what a user hands to a cache: keys, tags, lifetimes, settings."""

import math
from collections.abc import Iterable, MutableMapping
from typing import Any

from ...shared.errors import InvalidSettings, InvalidTarget

__all__ = ["check_settings", "checked_key", "checked_tags", "checked_ttl", "exact"]


def exact(name: str) -> str:
    """Return a name as an exact string: a user's own type may raise in hash or comparison."""
    return name if type(name) is str else str.__str__(name)


def checked_key(key: str) -> str:
    """Return a key as an exact string. Raises: InvalidTarget."""
    if type(key) is str:
        return key
    if not isinstance(key, str):
        raise InvalidTarget(
            f"expected a string as key, got {type(key).__name__}: {key!r:.100}; invalidations name keys as strings"
        )
    return exact(key)


def checked_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Return tags as exact strings. Raises: InvalidTarget."""
    if isinstance(tags, str):
        raise InvalidTarget(f"expected tags as a tuple or list of strings, got the string {tags!r}; write ({tags!r},)")
    if not tags:
        return ()
    tags = tuple(tags)
    for tag in tags:
        if not isinstance(tag, str):
            raise InvalidTarget(
                f"expected strings as tags, got {type(tag).__name__}: {tag!r:.100}; invalidations name tags as strings"
            )
    return tuple(map(exact, tags))


def checked_ttl(ttl_seconds: float | None) -> float | None:
    """Return a lifetime. Raises: InvalidSettings when it is NaN."""
    if ttl_seconds is not None and ttl_seconds != ttl_seconds:  # noqa: PLR0124  (only NaN differs from itself)
        raise InvalidSettings("expected ttl_seconds to be a number of seconds or None, got NaN")
    return ttl_seconds


def check_settings(
    mapping: MutableMapping[str, Any],
    max_staleness_seconds: float,
    ttl_jitter: float,
    negative_ttl_seconds: float | None,
) -> None:
    """Check the settings of a LocalCache. Raises: InvalidSettings."""
    if not isinstance(mapping, MutableMapping):
        raise InvalidSettings(f"expected a mutable mapping such as TTLCache, got {type(mapping).__name__}")
    if len(mapping):
        raise InvalidSettings(
            f"expected an empty mapping, got one with {len(mapping)} entries, which may be stale by now; "
            "empty it, or hand over a new one"
        )
    if not 0 < max_staleness_seconds < math.inf:
        raise InvalidSettings(f"expected max_staleness_seconds to be a positive number, got {max_staleness_seconds!r}")
    if not 0 <= ttl_jitter < 1:
        raise InvalidSettings(f"expected ttl_jitter to be at least 0 and below 1, got {ttl_jitter!r}")
    if negative_ttl_seconds is not None and not 0 < negative_ttl_seconds < math.inf:
        raise InvalidSettings(
            f"expected negative_ttl_seconds to be None or a positive number, got {negative_ttl_seconds!r}"
        )
