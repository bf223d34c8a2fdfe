"""The presence of a replica: published with each echo, withdrawn when the replica stops."""

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from ... import __version__  # pyright: ignore[reportMissingImports]  (above this folder only once it is installed)
from ...shared.errors import BroadcacheError
from ...shared.presence import Presence
from ...shared.transport.redis.link import Link
from ...shared.transport.redis.registry import withdraw
from .sequencer import Sequencer

__all__ = ["PresencePublisher", "Registration"]

_log = logging.getLogger("broadcache.subscriber")

_WITHDRAW_SECONDS: Final = 0.25


class PresencePublisher:
    """Makes the presences that a replica publishes, one for each of its namespaces. It does no I/O.

    Units:  `started_at_ms` is the wall clock in milliseconds, for display only.
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
        """Return the presence of one namespace, as JSON; `state` is that of the link."""
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
                # The caches decide: the echo may be late, or another namespace may still be recovering.
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


class Registration:
    """The namespaces in which the registry lists this replica, as far as its echoes have published presences.

    Shape:  `namespaces` are those of the last echoes that have not been withdrawn since.
    """

    def __init__(self, replica_id: str) -> None:
        self.namespaces: set[str] = set()
        self._replica_id = replica_id
        self._refusal = ""

    async def withdraw(self, link: Link, namespaces: Iterable[str]) -> None:
        """Deregister this replica, best effort; otherwise its presence expires."""
        gone = tuple(namespaces)
        self.namespaces.difference_update(gone)
        if not gone or link.lost.done():
            return
        try:
            async with link.within(_WITHDRAW_SECONDS):
                await withdraw(link, gone, self._replica_id)
        except BroadcacheError as error:
            _log.info("%s is listed until its presence expires: %s", self._replica_id, error)

    def record_refusal(self, refusal: str) -> None:
        """Log, once, why Redis does not list this replica. An empty text means that it does."""
        if refusal != self._refusal and refusal:
            _log.warning("expected Redis to list replica %s, got: %s", self._replica_id, refusal)
        self._refusal = refusal
