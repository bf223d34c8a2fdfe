"""The report of a fan-out: which replicas were called, and what each of them answered."""

from collections.abc import Iterator
from itertools import islice
from typing import Final

import msgspec

__all__ = ["AddressOutcome", "FanoutReport"]

_UNREACHED_SHOWN_MAX: Final = 5
"""How many replicas that were not reached a text names: enough to look at one, few enough to read."""


class AddressOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the call of one address.

    Shape:  `address` is the full URL that was called. `status_code` is None when there was no answer. `error` is None
            when a replica has applied the invalidation, and otherwise says what was expected and what came.
            `replica` and `outcome` are the answer's own: the name of the replica, and what it says it did, e.g.
            `applied` or `not followed`. `dropped` is how many entries it dropped.
    Units:  `latency_ms` is the time from the call to the answer; `attempts` counts the calls.
    """

    address: str
    status_code: int | None
    error: str | None
    latency_ms: float | None
    attempts: int
    replica: str | None = None
    dropped: int | None = None
    outcome: str | None = None

    @property
    def is_success(self) -> bool:
        """Whether a replica at this address has applied the invalidation."""
        return self.error is None and self.status_code is not None and 200 <= self.status_code < 300


class FanoutReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one fan-out.

    Shape:  `complete` is whether discovery named every replica, `discovery` how it found them: `dns`, `srv` or `list`.
            `problem` is why nobody was called: the service was not found, the resolver failed, it was not allowed.
    Units:  `elapsed_ms` is the time from the look-up to the last answer.
    """

    service: str
    total: int
    succeeded: int
    failed: int
    complete: bool
    discovery: str | None
    elapsed_ms: float
    outcomes: tuple[AddressOutcome, ...]
    problem: str | None = None

    @property
    def is_delivered(self) -> bool:
        """Whether every replica that there is has taken it. A fan-out that found nobody has reached nobody."""
        return self.total > 0 and self.failed == 0 and self.complete and self.problem is None

    def summary(self) -> str:
        """Say in one line whom it reached, and whom it did not."""
        if self.problem is not None:
            return f"fan-out called no replica of {self.service}: {self.problem}"
        if self.total == 0:
            return f"fan-out found no replica of {self.service}"
        unreached = "".join(self._unreached())
        unsure = "" if self.complete else "; discovery may not have named everybody"
        return f"fan-out reached {self.succeeded} of {self.total} replicas of {self.service}{unreached}{unsure}"

    def _unreached(self) -> Iterator[str]:
        outcomes = [outcome for outcome in self.outcomes if not outcome.is_success]
        for place, outcome in enumerate(islice(outcomes, _UNREACHED_SHOWN_MAX)):
            why = outcome.error or f"status {outcome.status_code}"
            yield f"{', ' if place else '; unreached: '}{outcome.address} ({why})"
        if len(outcomes) > _UNREACHED_SHOWN_MAX:
            yield f" and {len(outcomes) - _UNREACHED_SHOWN_MAX} more"
