"""The presence of a replica: published with each echo, withdrawn when the replica stops."""

import logging
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from ... import __version__  # pyright: ignore[reportMissingImports]  (above this folder only once it is installed)
from ...shared.clock import Clock
from ...shared.errors import BroadcacheError
from ...shared.presence import Presence, presence_of
from ...shared.transport.redis.link import Link
from ...shared.transport.redis.log import IS_SHARED, SERVES_NOTHING, ReplacedPresence
from ...shared.transport.redis.registry import withdraw
from .sequencer import Sequencer

__all__ = ["PresencePublisher", "Registration"]

_log = logging.getLogger("broadcache.subscriber")

_WITHDRAW_SECONDS: Final = 0.25
_SERVING_SECONDS: Final = 86_400.0
"""How long another process with the same id is assumed to run when its caches may serve without a proof."""
_ALL: Final = "all"
"""In place of the lives of those that have left: an operator says that all other processes with this id have ended."""


_AT_ONCE_MAX: Final = 16
"""The most namespaces whose presences are all published with each echo, and the most that a presence lists."""
_ECHOES_MAX: Final = 8
"""With how many echoes the counters of all namespaces are published."""
_STALENESS_PART: Final = 0.05
"""How wrong the published staleness may become, as a part of the bound."""


class PresencePublisher:
    """Makes the presences that a replica publishes, one for each of its namespaces. It does no I/O.

    What others decide by (the proven position, the state, the bound) is published with the next echo. With more than
    `_AT_ONCE_MAX` namespaces, a change of the counters alone is published with one of the next eight echoes, and a
    presence that has not changed is not published again: the one in Redis is renewed.

    Units:  `started_at_ms` is the wall clock in milliseconds, for display only.
    """

    def __init__(self, replica_id: str, *, started_at_ms: int | None = None) -> None:
        self._replica_id: Final = replica_id
        self._host: Final = socket.gethostname()
        self._started_at_ms: Final = time.time_ns() // 1_000_000 if started_at_ms is None else started_at_ms
        # With every how many echoes the counters of a namespace are published, and whose turn it is: a number below.
        self._every = 1
        self._turn = 0
        # The presence of each namespace that Redis has, and the part of it of which each change is published.
        self._published: dict[str, tuple[Presence, tuple[Any, ...]]] = {}

    def begin_echo(self, count: int) -> None:
        """Begin with the presences for a proof of this many namespaces."""
        self._every = min(_ECHOES_MAX, -(-count // _AT_ONCE_MAX))
        self._turn += 1

    def forget(self, namespaces: Iterable[str] | None = None) -> None:
        """Publish these presences anew with the next echo, or all: Redis may not have them."""
        for namespace in tuple(self._published) if namespaces is None else namespaces:
            self._published.pop(namespace, None)

    def publish(
        self,
        sequencers: Iterable[Sequencer],
        *,
        namespaces: Sequence[str],
        state: str,
        lifetime_seconds: float,
        lag_ms: Callable[[str], float | None],
        life: str = "",
        conflict: Callable[[str], str] = lambda namespace: "",
    ) -> list[bytes]:
        """Return the presence of each namespace, as JSON; an empty one where the published one still holds.

        Shape: `namespaces` are all that the replica follows over this link, whose state is `state`. `life` is the token
               of this process, and `conflict` names another process with this id in a namespace.
        """
        lifetime_ms = round(lifetime_seconds * 1_000)
        return [
            self._publish(each, namespaces, state, lifetime_ms, lag_ms, life=life, conflict=conflict(each.namespace))
            for each in sequencers
        ]

    def _publish(
        self,
        sequencer: Sequencer,
        namespaces: Sequence[str],
        state: str,
        lifetime_ms: int,
        lag_ms: Callable[[str], float | None],
        *,
        life: str,
        conflict: str,
    ) -> bytes:
        caches, proven, counts = sequencer.caches, sequencer.proven, sequencer.counts
        ages = [cache.staleness_seconds for cache in caches]
        staleness_seconds = None if None in ages else max(age for age in ages if age is not None)
        bound_seconds = min(cache.max_staleness_seconds for cache in caches)
        is_coherent = all(cache.is_coherent for cache in caches)
        # The caches decide: the echo may be late, or another namespace may still be recovering.
        state = "coherent" if is_coherent else "lost" if state == "coherent" else state
        when_incoherent = "serve" if any(cache.when_incoherent == "serve" for cache in caches) else "bypass"
        urgent = (
            *(state, proven, bound_seconds, when_incoherent, lifetime_ms, counts["replayed"], counts["gaps"]),
            *(life, conflict),
        )
        self._turn += 1
        before, urgent_before = self._published.get(sequencer.namespace, (None, ()))
        is_same = (
            before is not None
            and urgent == urgent_before
            and _is_near(staleness_seconds, before.staleness_seconds, _STALENESS_PART * bound_seconds)
        )
        if is_same and self._turn % self._every:
            return b""
        stats = [cache.stats() for cache in caches]
        presence = Presence(
            replica=self._replica_id,
            life=life,
            namespace=sequencer.namespace,
            namespaces=tuple(namespaces[:_AT_ONCE_MAX]),
            namespaces_count=len(namespaces),
            host=self._host,
            pid=os.getpid(),
            version=__version__,
            started_at_ms=self._started_at_ms,
            lifetime_ms=lifetime_ms,
            state=state,
            position=None if proven is None else proven.position,
            digest=None if proven is None else proven.digest,
            staleness_seconds=staleness_seconds,
            max_staleness_seconds=bound_seconds,
            when_incoherent=when_incoherent,
            entries=sum(each.entries for each in stats),
            hits=sum(each.hits for each in stats),
            misses=sum(each.misses for each in stats),
            bypassed=sum(each.bypassed for each in stats),
            clears=dict(sum((Counter(each.clears) for each in stats), Counter())),
            replays=counts["replayed"],
            gaps=counts["gaps"],
            lag_ms=lag_ms(sequencer.namespace),
            conflict=conflict,
        )
        if is_same and before is not None and self._every > 1:
            aged = msgspec.structs.replace(presence, staleness_seconds=before.staleness_seconds)
            if aged == before:
                return b""
        self._published[sequencer.namespace] = presence, urgent
        return msgspec.json.encode(presence)


def _is_near(one: float | None, other: float | None, difference: float) -> bool:
    return one is other if one is None or other is None else abs(one - other) <= difference


class _OtherProcess:
    """Another process that has published presences under this replica's id.

    Shape:  `description` is empty as long as it may have ended before this process began.
    Units:  `until` is when it is no longer assumed to run, on the follower's clock.
    """

    def __init__(self, description: str, until: float) -> None:
        self.description = description
        self.until = until


class Registration:
    """The namespaces in which the registry lists this replica, as far as its echoes have published presences.

    Each process that uses the replica's id draws a `life`. A presence with another life was written by another process;
    if this process has written one before, both run at the same time.

    Shape:  `namespaces` are those of the last echoes that have not been withdrawn since.
    """

    def __init__(self, replica_id: str, clock: Clock, *, life: str = "") -> None:
        self.namespaces: set[str] = set()
        self._replica_id = replica_id
        self._clock = clock
        self._refusal = ""
        self._life = life or secrets.token_hex(8)
        self._pid = os.getpid()
        # The namespaces in which a presence of this life is known to have been written.
        self._written: set[str] = set()
        self._others: dict[str, dict[str, _OtherProcess]] = {}

    def again(self, replica_id: str) -> "Registration":
        """Return one for the next start of this process. With the same id it is the same life: it does not wait for
        itself, where it could not withdraw."""
        return Registration(replica_id, self._clock, life=self.life if replica_id == self._replica_id else "")

    @property
    def life(self) -> str:
        """The token of this process; a forked child draws its own."""
        if self._pid != os.getpid():
            self._life, self._pid = secrets.token_hex(8), os.getpid()
            self._written.clear()
            self._others.clear()
        return self._life

    def conflict(self, namespace: str) -> str:
        """Describe another process that publishes presences under this id; an empty text if there is none."""
        return ", ".join(each.description for each in self._running(namespace) if each.description)

    def marks(self, sequencer: Sequencer, lifetime_seconds: float) -> int:
        """Return the marks of a registration that lasts `lifetime_seconds`."""
        serves_nothing = all(
            cache.when_incoherent == "bypass" and cache.max_staleness_seconds <= lifetime_seconds
            for cache in sequencer.caches
        )
        if serves_nothing:
            for cache in sequencer.caches:
                cache.list_as(is_bypass=True)
        is_shared = bool(self._running(sequencer.namespace))
        return SERVES_NOTHING * serves_nothing + IS_SHARED * is_shared

    def record_marks(self, sequencers: Iterable[Sequencer], marks: Iterable[int]) -> None:
        """Record that an echo has registered these marks: what may serve beyond the registration may do so now.

        Shape:  `marks` is empty when it could not register them.
        """
        for sequencer, mark in zip(sequencers, marks, strict=False):
            if not mark & SERVES_NOTHING:
                for cache in sequencer.caches:
                    cache.list_as(is_bypass=False)

    def record(self, namespaces: Iterable[str], others: Mapping[str, ReplacedPresence]) -> list[str]:
        """Record that an echo has written or renewed the presences of `namespaces`, and which it replaced.

        Returns: the namespaces in which another process may have this id.
        """
        shared: list[str] = []
        for namespace in namespaces:
            if (replaced := others.get(namespace)) is not None:
                self._record_other(namespace, replaced)
            self._written.add(namespace)
            if self._running(namespace):
                shared.append(namespace)
        return shared

    def _record_other(self, namespace: str, replaced: ReplacedPresence) -> None:
        other = presence_of(replaced.text, self._replica_id)
        others = self._others.setdefault(namespace, {})
        left = [life for life in other.left.split(",") if life]
        if _ALL in left:
            others.clear()
        for life in left:
            others.pop(life, None)
        if other.life in (self.life, *left):
            return
        seconds = replaced.left_ms / 1_000
        may_be_predecessor = namespace not in self._written or not replaced.text
        if may_be_predecessor and (not replaced.text or other.when_incoherent == "bypass"):
            # Or another process has marked the registration: its presence is seen when this one is written again.
            # It may have ended: this process may be its successor. Its caches may serve until its lease has ended.
            others[other.life] = _OtherProcess("", self._clock() + seconds)
            return
        seconds = max(seconds, other.lifetime_ms / 1_000)
        if other.when_incoherent != "bypass":
            seconds = _SERVING_SECONDS
        description = f"pid {other.pid} on {other.host}" if other.host else "a process of another version"
        is_new = other.life not in others or not others[other.life].description
        others[other.life] = _OtherProcess(description, self._clock() + seconds)
        if is_new:
            _log.warning(
                "%s %s the same replica id %r in %r as this process (pid %d)%s: each confirms for both, so "
                "confirmations are incomplete; leave replica_id out, or give each process its own",
                description,
                "had" if may_be_predecessor else "has",
                self._replica_id,
                namespace,
                self._pid,
                ", and has not left; it may serve for a day, unless it is forgotten" if may_be_predecessor else "",
            )

    def _named_lives(self, namespace: str) -> list[str]:
        """The lives of other processes that have run at the same time as this one."""
        self._running(namespace)
        return [life for life, each in self._others.get(namespace, {}).items() if life and each.description]

    def _running(self, namespace: str) -> list[_OtherProcess]:
        others = self._others.get(namespace)
        if not others:
            return []
        now = self._clock()
        for life in [life for life, each in others.items() if each.until <= now]:
            del others[life]
        return list(others.values())

    async def withdraw(self, link: Link, namespaces: Iterable[str]) -> None:
        """Deregister this replica, best effort; otherwise its registration ends, and it is listed as silent."""
        gone = tuple(namespaces)
        self.namespaces.difference_update(gone)
        others = {namespace: self._named_lives(namespace) for namespace in gone}
        self._written.difference_update(gone)
        if not gone or link.lost.done():
            return
        try:
            async with link.within(_WITHDRAW_SECONDS):
                await withdraw(link, gone, self._replica_id, life=self.life, others=others)
        except BroadcacheError as error:
            _log.info("%s is listed until a day after its registration ends: %s", self._replica_id, error)

    def record_refusal(self, refusal: str) -> None:
        """Log, once, why Redis does not list this replica. An empty text means that it does."""
        if refusal != self._refusal and refusal:
            _log.warning("expected Redis to list replica %s, got: %s", self._replica_id, refusal)
        self._refusal = refusal
