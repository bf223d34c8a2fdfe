"""Presence: the status that a replica publishes with each echo."""

import time
from typing import Final

import msgspec

from .invalidation import Position

__all__ = ["Presence", "ReplicaPresence", "presence_of", "time_of_day"]

UNKNOWN_STATE: Final = "unknown"
_WITH_DATE_MS: Final = 43_200_000


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """The status of one replica in one namespace, published with each echo. Readers skip unknown fields.

    Shape:  `namespaces` are some of those that the replica follows over the same link, of `namespaces_count` in all.
            `state` is the replica's state: `coherent` only if every cache of the namespace may be served; `unknown`
            when the presence could not be read. `position` is the position that the replica's last echo proved, and
            `digest` is that of the frame there. Counters are sums over the namespace's caches since the replica
            started; `clears` are counted by reason, `replays` are invalidations read from the log. `life` is drawn by
            each process anew; `conflict` names another process that uses the same id, `left` the lives of those
            that have left, separated by commas.
    Units:  `staleness_seconds` is how long before the echo the replica was last proven to have applied every accepted
            invalidation; null when never. `max_staleness_seconds` is the bound, the lowest of several caches'.
            `started_at_ms` is the replica's Unix clock. `lag_ms` is that of the last invalidation that was to be
            confirmed. `lifetime_ms` is how long the echo registers the replica.
    """

    replica: str = ""
    life: str = ""
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
    conflict: str = ""
    left: str = ""


_decoder = msgspec.json.Decoder(Presence)


def presence_of(text: bytes, replica: str) -> Presence:
    """Decode the presence of a replica of any version. One that cannot be decoded gives only the replica's id."""
    try:
        presence = _decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Presence(replica=replica)
    return msgspec.structs.replace(presence, replica=replica)


class ReplicaPresence(Presence, frozen=True, kw_only=True):
    """A replica's presence, with its age and its distance from the head of the log.

    Shape:  `behind` is how many invalidations the log has beyond the replica's position at its last echo; null when
            the position is unknown or of another epoch. `is_silent` once its registration has ended without that it
            left. `may_serve` is false for one that then serves nothing from its caches.
    Units:  `staleness_seconds` is as of now. `seen_ms_ago` is how long ago the last echo reached Redis, on that
            server's clock; null when the presence has no `lifetime_ms`.
    """

    seen_ms_ago: int | None = None
    behind: int | None = None
    is_silent: bool = False
    may_serve: bool = True

    @property
    def is_coherent(self) -> bool:
        """Whether the replica was coherent at its last echo, and its staleness is still below the bound."""
        bound_seconds, staleness_seconds = self.max_staleness_seconds, self.staleness_seconds
        if self.is_silent or self.state != "coherent" or bound_seconds is None or staleness_seconds is None:
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

    def last_word(self, unix_seconds: float) -> str:
        """Say when this replica was last seen, and what it has missed since.

        Units: `unix_seconds` is now. The time of day is that of the local time zone.
        """
        if self.seen_ms_ago is None:
            seen = "last seen at an unknown time"
        else:
            seen = f"last seen {time_of_day(unix_seconds, self.seen_ms_ago)}"
        if not self.behind or self.position is None:
            return seen
        first, last = self.position.sequence + 1, self.position.sequence + self.behind
        return f"{seen}, has not dropped #{first}{'' if first == last else f' to #{last}'}"


def time_of_day(unix_seconds: float, ms_ago: int) -> str:
    """Return the local time so many milliseconds before `unix_seconds`; with the date if that is half a day ago."""
    form = "%H:%M:%S" if ms_ago < _WITH_DATE_MS else "%Y-%m-%d %H:%M:%S"
    return time.strftime(form, time.localtime(unix_seconds - ms_ago / 1_000))
