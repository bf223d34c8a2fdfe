"""What an invalidation covers: the names that need no invalidation of their own once it is logged."""

from bisect import bisect_right
from collections.abc import Iterable

from ...shared.invalidation import Invalidation

__all__ = ["Coverage"]


class Coverage:
    """The names that a set of targets drops. A prefix covers keys and longer prefixes.

    Only a replica knows which keys carry a tag, so a tag is covered by the same tag or by everything.
    """

    def __init__(
        self,
        *,
        keys: Iterable[str] = (),
        tags: Iterable[str] = (),
        prefixes: Iterable[str] = (),
        everything: bool = False,
    ) -> None:
        self._keys = frozenset(keys)
        self._tags = frozenset(tags)
        self.prefixes: tuple[str, ...] = _without_longer_ones(prefixes)
        self._everything = everything

    @classmethod
    def of(cls, invalidation: Invalidation) -> "Coverage":
        """Return the coverage of an invalidation."""
        return cls(
            keys=invalidation.keys,
            tags=invalidation.tags,
            prefixes=invalidation.prefixes,
            everything=invalidation.everything,
        )

    def covers(self, invalidation: Invalidation) -> bool:
        """Whether this coverage includes everything `invalidation` drops (same namespace)."""
        if self._everything:
            return True
        return (
            not invalidation.everything
            and self._tags.issuperset(invalidation.tags)
            and all(map(self.covers_key, invalidation.keys))
            and all(map(self.covers_prefix, invalidation.prefixes))
        )

    def covers_key(self, key: str) -> bool:
        """Whether the entry with this key is covered."""
        return self._everything or key in self._keys or self.covers_prefix(key)

    def covers_prefix(self, prefix: str) -> bool:
        """Whether all entries whose key begins with `prefix` are covered."""
        # The prefixes are sorted and none begins with another, so only the last one that is not greater can match.
        place = bisect_right(self.prefixes, prefix)
        return self._everything or (place > 0 and prefix.startswith(self.prefixes[place - 1]))


def _without_longer_ones(prefixes: Iterable[str]) -> tuple[str, ...]:
    """Return the prefixes in order, without those that begin with another one."""
    kept: list[str] = []
    for prefix in sorted(prefixes):
        if not kept or not prefix.startswith(kept[-1]):
            kept.append(prefix)
    return tuple(kept)
