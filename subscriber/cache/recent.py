"""Recently invalidated names: do they concern a load that is under way, or an entry that is not swept yet?"""

from collections.abc import Iterable
from typing import Final

__all__ = ["History"]

_KEYS_MAX: Final = 8_192
_TAGS_MAX: Final = 8_192
_PREFIXES_MAX: Final = 512


class History:
    """The recently invalidated names, each with the stamp of its last invalidation.

    A stamp counts the invalidations that this cache has applied; no clock is involved. Memory is bounded. A name that
    may have been forgotten counts as invalidated, so that overflow costs a load, never a stale value.
    """

    def __init__(self) -> None:
        self.keys: _Recent = _Recent(_KEYS_MAX)
        self.tags: _Recent = _Recent(_TAGS_MAX)
        self.prefixes: _RecentPrefixes = _RecentPrefixes(_PREFIXES_MAX)
        self.everything_stamp: int = 0

    def restart(self, stamp: int) -> None:
        """Record that everything was invalidated at `stamp`, which covers all older names: forget them."""
        self.everything_stamp = max(self.everything_stamp, stamp)
        self.keys.forget()
        self.tags.forget()
        self.prefixes.forget()

    def concerns_load(self, since: int, key: str, tags: Iterable[str]) -> bool:
        """Whether an invalidation after stamp `since` names `key`, one of `tags`, a prefix of `key`, or everything."""
        return (
            self.keys.has_since(since, key)
            or any(self.tags.has_since(since, tag) for tag in tags)
            or self.concerns_entry(since, key)
        )

    def concerns_entry(self, since: int, key: str) -> bool:
        """Whether an invalidation after stamp `since` names a prefix of the stored `key`, or everything.

        One of its key or of its tags dropped the entry at once.
        """
        return self.everything_stamp > since or self.prefixes.has_since(since, key)


class _Recent:
    """A bounded memory of name → stamp, in two generations: when the young one is full, the old one is forgotten."""

    __slots__ = ("_forgotten_stamp", "_names_max", "_old", "_old_stamp", "_young")

    def __init__(self, names_max: int) -> None:
        self._names_max = names_max
        self._young: dict[str, int] = {}
        self._old: dict[str, int] = {}
        self._old_stamp = 0
        self._forgotten_stamp = 0

    def record(self, name: str, stamp: int) -> bool:
        """Record `name`; return whether the old generation was forgotten to make room."""
        young = self._young
        young[name] = stamp
        if len(young) < self._names_max:
            return False
        self._old, self._young = young, {}
        self._forgotten_stamp, self._old_stamp = self._old_stamp, stamp
        return True

    def forget(self) -> None:
        self._young, self._old = {}, {}

    def has_since(self, since: int, name: str) -> bool:
        if since < self._forgotten_stamp:
            return True
        stamp = self._young.get(name) or self._old.get(name)
        return stamp is not None and stamp > since


class _RecentPrefixes:
    """A bounded memory of prefix → stamp. A query costs one lookup for each length that occurs, not for each prefix."""

    __slots__ = ("_old_lengths", "_recent", "_young_lengths")

    def __init__(self, names_max: int) -> None:
        self._recent = _Recent(names_max)
        self._young_lengths: set[int] = set()
        self._old_lengths: set[int] = set()

    def record(self, prefix: str, stamp: int) -> None:
        self._young_lengths.add(len(prefix))
        if self._recent.record(prefix, stamp):
            self._old_lengths, self._young_lengths = self._young_lengths, set()

    def forget(self) -> None:
        self._recent.forget()
        self._young_lengths, self._old_lengths = set(), set()

    def has_since(self, since: int, key: str) -> bool:
        lengths = self._young_lengths | self._old_lengths if self._old_lengths else self._young_lengths
        return any(self._recent.has_since(since, key[:length]) for length in lengths)
