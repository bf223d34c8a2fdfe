"""What a replica says of itself with each echo."""

import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

import msgspec

from ... import __version__  # pyright: ignore[reportMissingImports]  (above this folder only once it is installed)
from ...shared.presence import Presence
from .sequencer import Sequencer

__all__ = ["PresencePublisher"]


class PresencePublisher:
    """Tells others of this replica's namespaces. It does no I/O.

    Units:  `started_at_ms` is the wall clock in milliseconds, for people.
    """

    def __init__(self, replica_id: str, *, started_at_ms: int | None = None) -> None:
        self._replica_id: Final = replica_id
        self._host: Final = socket.gethostname()
        self._started_at_ms: Final = time.time_ns() // 1_000_000 if started_at_ms is None else started_at_ms

    def publish(
        self,
        sequencer: Sequencer,
        *,
        namespaces: Sequence[str],
        state: str,
        lifetime_seconds: float,
        lag_ms: float | None,
    ) -> bytes:
        """Return what others can read of one namespace, as JSON; `state` is that of the link."""
        caches, proven = sequencer.caches, sequencer.proven
        stats = [cache.stats() for cache in caches]
        ages = [cache.staleness_seconds for cache in caches]
        is_coherent = all(cache.is_coherent for cache in caches)
        return msgspec.json.encode(
            Presence(
                replica=self._replica_id,
                namespace=sequencer.namespace,
                namespaces=tuple(namespaces),
                host=self._host,
                pid=os.getpid(),
                version=__version__,
                started_at_ms=self._started_at_ms,
                lifetime_ms=round(lifetime_seconds * 1_000),
                # The caches know better: the echo may be late, and another namespace may be on its way.
                state="coherent" if is_coherent else "lost" if state == "coherent" else state,
                position=None if proven is None else proven.position,
                digest=None if proven is None else proven.digest,
                staleness_seconds=None if None in ages else max(age for age in ages if age is not None),
                max_staleness_seconds=min(cache.max_staleness_seconds for cache in caches),
                when_incoherent="serve" if any(cache.when_incoherent == "serve" for cache in caches) else "bypass",
                entries=sum(each.entries for each in stats),
                hits=sum(each.hits for each in stats),
                misses=sum(each.misses for each in stats),
                bypassed=sum(each.bypassed for each in stats),
                clears=dict(sum((Counter(each.clears) for each in stats), Counter())),
                replays=sequencer.counts["replayed"],
                gaps=sequencer.counts["gaps"],
                lag_ms=lag_ms,
            )
        )
