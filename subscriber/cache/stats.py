"""The counters of a cache."""

from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["CacheStats", "Count"]


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of one cache since it was made; `entries` is how many it has now, dead ones not yet swept included.

    Shape:  `applied` counts the names applied by target kind (`keys`, `tags`, `prefixes`, `everything`), `clears` how
            often everything was dropped, by reason. `bypassed` reads do not count as misses. `unnameable_fills`
            counts values that were not stored because no invalidation could name their key or one of their tags.
            `mapping_errors` counts the errors that the wrapped mapping raised, except for absent keys and values that
            are too large.
    Source: exact when one thread reads. Reads take no lock to count, so with several threads a few may be lost.
    """

    entries: int
    hits: int
    misses: int
    bypassed: int
    loads: int
    shared_loads: int
    voided_fills: int
    refused_fills: int
    unnameable_fills: int
    dropped: int
    mapping_errors: int
    applied: dict[str, int] = field(default_factory=dict)
    clears: dict[str, int] = field(default_factory=dict)


class Count(NamedTuple):
    """How many entries an invalidation names. An estimate is scaled up from the entries that were examined."""

    entries: int
    is_estimate: bool
