"""Invalidations posted to a replica over HTTP, and what became of them."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from ...shared.errors import MalformedFrame
from ...shared.invalidation import Invalidation, Position
from ...shared.telemetry.outages import shown
from ...shared.wire import decode
from .sequencer import Sequencer
from .state import State

__all__ = ["Applied", "ApplyOutcome", "Posted"]

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

    def __init__(self, replica_id: str, state: Callable[[], State]) -> None:
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
            replica=self._replica_id,
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
