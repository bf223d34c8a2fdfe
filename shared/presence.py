"""Presence: which replicas there are, and what each said of itself with its last echo."""

from typing import Final

import msgspec

from .invalidation import Position

__all__ = ["Presence", "ReplicaPresence"]

UNKNOWN_STATE: Final = "unknown"


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica says of one of its namespaces with each echo. Fields that a reader does not know are skipped.

    Shape:  `state` is where the replica is in its life: `coherent` only if every cache of the namespace may be served;
            `unknown` when it said nothing that could be read. `position` is the one that its last echo had proven, and
            `digest` that of the frame that stands there. Counters are those of the namespace's caches together,
            and of this replica's life; `clears` are counted by reason, `replays` are invalidations read from the log.
    Units:  `staleness_seconds` is how long before the echo everything accepted had been proven applied; null when
            never. `max_staleness_seconds` is the bound, the lowest of several caches'. `started_at_ms` is the replica's
            Unix clock. `lag_ms` is that of the last invalidation that was to be confirmed. `lifetime_ms` is how long it
            is kept.
    """

    replica: str = ""
    namespace: str = ""
    namespaces: tuple[str, ...] = ()
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
    """A replica as a reader sees it: its presence, and what has become of it since.

    Shape:  `behind` is how many invalidations the log had more than the replica at its last echo; null when it was
            in another epoch, or its position is not known.
    Units:  `staleness_seconds` is as of now. `seen_ms_ago` is how long ago the last echo reached Redis, on the clock of
            that server; null when the replica did not say how long it is kept.
    """

    seen_ms_ago: int | None = None
    behind: int | None = None

    @property
    def is_coherent(self) -> bool:
        """Whether it was coherent when it was last heard, and its proof still holds."""
        bound_seconds, staleness_seconds = self.max_staleness_seconds, self.staleness_seconds
        if self.state != "coherent" or bound_seconds is None or staleness_seconds is None:
            return False
        return staleness_seconds < bound_seconds

    @property
    def hit_ratio(self) -> float | None:
        """The share of reads that were served locally; None when there was none."""
        reads = self.hits + self.misses + self.bypassed
        return self.hits / reads if reads else None

    @property
    def clears_total(self) -> int:
        """How often everything was dropped."""
        return sum(self.clears.values())
