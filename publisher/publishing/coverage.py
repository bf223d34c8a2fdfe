"""What an invalidation covers: which names need not be dropped any more once it has been logged."""

from bisect import bisect_right
from collections.abc import Iterable

from ...shared.invalidation import Invalidation

__all__ = ["Coverage"]


class Coverage:
    """What these targets drop between them, whatever else they stand beside. A prefix covers keys and longer prefixes.

    Nobody but a replica knows which keys carry a tag: tags are covered by the same tags alone, or by everything.
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
        self.prefixes = _without_longer_ones(prefixes)
        self._everything = everything

    @classmethod
    def of(cls, invalidation: Invalidation) -> "Coverage":
        """Return what this invalidation covers."""
        return cls(
            keys=invalidation.keys,
            tags=invalidation.tags,
            prefixes=invalidation.prefixes,
            everything=invalidation.everything,
        )

    def covers(self, invalidation: Invalidation) -> bool:
        """Whether whatever `invalidation`, of the same namespace, drops is dropped by this as well."""
        if self._everything:
            return True
        return (
            not invalidation.everything
            and self._tags.issuperset(invalidation.tags)
            and all(map(self.covers_key, invalidation.keys))
            and all(map(self.covers_prefix, invalidation.prefixes))
        )

    def covers_key(self, key: str) -> bool:
        """Whether the entry with this key is dropped."""
        return self._everything or key in self._keys or self.covers_prefix(key)

    def covers_prefix(self, prefix: str) -> bool:
        """Whether all entries whose key begins with this are dropped."""
        # Among sorted prefixes none of which begins with another, only the last that is not above can be its beginning.
        place = bisect_right(self.prefixes, prefix)
        return self._everything or (place > 0 and prefix.startswith(self.prefixes[place - 1]))


def _without_longer_ones(prefixes: Iterable[str]) -> tuple[str, ...]:
    """Return them in order, without those that begin with another of them."""
    kept: list[str] = []
    for prefix in sorted(prefixes):
        if not kept or not prefix.startswith(kept[-1]):
            kept.append(prefix)
    return tuple(kept)
