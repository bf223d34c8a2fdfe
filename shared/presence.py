"""Presence: the status that a replica publishes with each echo."""

from typing import Final

import msgspec

from .invalidation import Position

__all__ = ["Presence", "ReplicaPresence"]

UNKNOWN_STATE: Final = "unknown"


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """The status of one replica in one namespace, published with each echo. Readers skip unknown fields.

    Shape:  `namespaces` are some of those that the replica follows over the same link, of `namespaces_count` in all.
            `state` is the replica's state: `coherent` only if every cache of the namespace may be served; `unknown`
            when the presence could not be read. `position` is the position that the replica's last echo proved, and
            `digest` is that of the frame there. Counters are sums over the namespace's caches since the replica
            started; `clears` are counted by reason, `replays` are invalidations read from the log.
    Units:  `staleness_seconds` is how long before the echo the replica was last proven to have applied every accepted
            invalidation; null when never. `max_staleness_seconds` is the bound, the lowest of several caches'.
            `started_at_ms` is the replica's Unix clock. `lag_ms` is that of the last invalidation that was to be
            confirmed. `lifetime_ms` is how long Redis keeps the presence.
    """

    replica: str = ""
    namespace: str = ""
    namespaces: tuple[str, ...] = ()
    namespaces_count: int = 0
    host: str = ""
    pid: int = 0
    version: str = ""
    started_at_ms: int = 0
    lifetime_ms: int = 0
    state: str = UNKNOWN_STATE
    position: Position | None = None
    digest: str | None = None
    staleness_seconds: float | None = None
    max_staleness_seconds: float | None = None
    when_incoherent: str = ""
    entries: int = 0
    hits: int = 0
    misses: int = 0
    bypassed: int = 0
    clears: dict[str, int] = {}
    replays: int = 0
    gaps: int = 0
    lag_ms: float | None = None


class ReplicaPresence(Presence, frozen=True, kw_only=True):
    """A replica's presence, with its age and its distance from the head of the log.

    Shape:  `behind` is how many invalidations the log has beyond the replica's position at its last echo; null when
            the position is unknown or of another epoch.
    Units:  `staleness_seconds` is as of now. `seen_ms_ago` is how long ago the last echo reached Redis, on that
            server's clock; null when the presence has no `lifetime_ms`.
    """

    seen_ms_ago: int | None = None
    behind: int | None = None

    @property
    def is_coherent(self) -> bool:
        """Whether the replica was coherent at its last echo, and its staleness is still below the bound."""
        bound_seconds, staleness_seconds = self.max_staleness_seconds, self.staleness_seconds
        if self.state != "coherent" or bound_seconds is None or staleness_seconds is None:
            return False
        return staleness_seconds < bound_seconds

    @property
    def hit_ratio(self) -> float | None:
        """The share of reads that were served from the cache; None without any read."""
        reads = self.hits + self.misses + self.bypassed
        return self.hits / reads if reads else None

    @property
    def clears_total(self) -> int:
        """How often the replica dropped everything."""
        return sum(self.clears.values())
