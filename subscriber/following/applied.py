"""Invalidations that do not come from the channel: posted over HTTP, and published by this replica itself."""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, TypeAlias

from ...shared.errors import InvalidSettings, LinkLost, MalformedFrame, NotConnected
from ...shared.invalidation import Invalidation, Position
from ...shared.process.loops import LoopUnavailable, awaited_on, is_in_event_loop, result_from
from ...shared.receipt import Receipt
from ...shared.telemetry.outages import shown
from ...shared.wire import decode
from .sequencer import Sequencer
from .state import State

__all__ = ["Applied", "ApplyOutcome", "Posted", "check_may_wait_for", "published", "published_sync"]

_LOOP_SECONDS: Final = 0.5
"""How much longer than its timeout a blocking call waits for an event loop that may be blocked."""

_log = logging.getLogger("broadcache.subscriber")

ApplyOutcome: TypeAlias = Literal["applied", "not followed", "cleared"]
"""`applied`; `not followed`: this replica does not follow the namespace, so it had nothing to drop; `cleared`:
everything was dropped, because the body was empty or malformed."""


@dataclass(frozen=True, slots=True)
class Applied:
    """The result of `Subscriber.apply`. Reads are right whatever it is.

    Shape:  `namespace` is None when the invalidation was for all followed namespaces. `dropped` counts the entries that
            were removed at once and, for everything, those that the caches had. Entries of a prefix, or of a tag of
            more than 64 entries, are dead as well but not counted: the sweep finds them. `state` is the subscriber's.
            `positions` are those of the namespaces concerned; a posted invalidation does not move them.
    """

    replica: str
    state: State
    outcome: ApplyOutcome
    id: str | None
    namespace: str | None
    dropped: int
    positions: Mapping[str, Position | None] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON types: the response of POST /cache-invalidation."""
        positions = {namespace: each and each._asdict() for namespace, each in self.positions.items()}
        return {**asdict(self), "positions": positions}


class Posted:
    """Applies posted invalidations, and counts them. May be called from any thread.

    Shape:  `counts` has `http`, each of them, and their outcomes: `applied`, `not followed`, `malformed` and
            `requested` (an empty body).
    """

    def __init__(self, replica_id: Callable[[], str], state: Callable[[], State]) -> None:
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._replica_id = replica_id
        self._state = state

    def apply(self, body: bytes, sequencers: dict[str, Sequencer]) -> Applied:
        """Apply the invalidation in `body` to the sequencers that it concerns. Raises: nothing, whatever the bytes."""
        if not body:
            return self._clear(sequencers, "requested", "an empty body was posted")
        try:
            invalidation = decode(body, None)
        except MalformedFrame as error:
            return self._clear(sequencers, "malformed", f"{error}; it was posted over HTTP")
        if namespace := invalidation.namespace:
            sequencers = {namespace: sequencers[namespace]} if namespace in sequencers else {}
        elif len(sequencers) == 1:
            [namespace] = sequencers
        dropped = sum([each.apply_posted(invalidation) for each in sequencers.values()])
        outcome: ApplyOutcome = "applied" if sequencers else "not followed"
        self._count(outcome)
        return self._applied(outcome, invalidation, namespace or None, dropped, sequencers)

    def _clear(self, sequencers: dict[str, Sequencer], reason: str, why: str) -> Applied:
        _log.warning("cleared %s: %s", shown(list(sequencers)), why)
        dropped = sum(each.clear_posted(reason) for each in sequencers.values())
        self._count(reason)
        return self._applied("cleared", None, None, dropped, sequencers)

    def _applied(
        self,
        outcome: ApplyOutcome,
        invalidation: Invalidation | None,
        namespace: str | None,
        dropped: int,
        sequencers: dict[str, Sequencer],
    ) -> Applied:
        return Applied(
            replica=self._replica_id(),
            state=self._state(),
            outcome=outcome,
            id=(invalidation.id or None) if invalidation else None,
            namespace=namespace,
            dropped=dropped,
            positions={name: each.position for name, each in sequencers.items()},
        )

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.counts.update(("http", outcome))


async def published(
    loop: asyncio.AbstractEventLoop | None, publish: Callable[[], Awaitable[Receipt]], timeout_seconds: float
) -> Receipt:
    """Do `publish` on the subscriber's event loop, whichever loop this is.

    Shape:  `loop` is None when the subscriber is not running.
    Raises: NotConnected, at once, when there is no such loop; LinkLost when it ends or is blocked; those of `publish`.
    """
    if loop is asyncio.get_running_loop():
        return await publish()
    if loop is None:
        raise NotConnected(_NOT_RUNNING)
    try:
        return await awaited_on(loop, publish, begin_seconds=timeout_seconds)
    except LoopUnavailable as error:
        raise _unpublished(error) from error


def published_sync(
    loop: asyncio.AbstractEventLoop | None, publish: Callable[[], Awaitable[Receipt]], timeout_seconds: float
) -> Receipt:
    """Do the same, and block this thread until it is done."""
    if loop is None:
        raise NotConnected(_NOT_RUNNING)
    try:
        return result_from(loop, publish, timeout_seconds=timeout_seconds + _LOOP_SECONDS)
    except LoopUnavailable as error:
        raise _unpublished(error) from error


def check_may_wait_for(loop: asyncio.AbstractEventLoop | None) -> None:
    """Refuse to block the subscriber's own event loop, which would then never publish. Raises: InvalidSettings."""
    if loop is not None and is_in_event_loop() and loop is asyncio.get_running_loop():
        raise InvalidSettings(
            "invalidate_sync would wait for ever: it was called on the event loop that the subscriber runs on; use "
            "`await invalidate(…)`, or call it from another thread (asyncio.to_thread)"
        )


_NOT_RUNNING: Final = (
    "the invalidation was not published: the subscriber is not running; this replica has dropped its entries, the "
    "others have not: enter the subscriber (`async with`, `with`, or a lifespan that runs), and publish again"
)


def _unpublished(why: object) -> LinkLost:
    return LinkLost(
        f"the invalidation may not have been published: {why}; this replica has dropped its entries, others may not "
        "have: enter the subscriber, do not block its event loop, and publish again, which is harmless"
    )
