"""The report of a fan-out: which replicas were called, and the result of each call."""

from collections.abc import Iterator
from itertools import islice
from typing import Final

import msgspec

from .texts import counted

__all__ = ["NOT_FOLLOWED", "AddressOutcome", "FanoutReport"]

NOT_FOLLOWED: Final = "not followed"
"""The outcome of a process none of whose subscribers follows the namespace."""

_UNREACHED_SHOWN_MAX: Final = 5
"""How many unreached replicas a text names: enough to investigate one, few enough to read."""


class AddressOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """The result of calling one address.

    Shape:  `address` is the full URL that was called. `status_code` is None when there was no response. `error` is None
            when a replica has applied the invalidation, or does not follow its namespace; otherwise it says what was
            expected and what was received.
            `replica` and `outcome` are from the response: the replica's id, and e.g. `applied` or `not followed`.
            `dropped` is how many entries the replica dropped. `replicas` are the ids of all that have applied it:
            a process with several subscribers answers for each of them.
    Units:  `latency_ms` is the time from the call to the response; `attempts` counts the calls.
    """

    address: str
    status_code: int | None
    error: str | None
    latency_ms: float | None
    attempts: int
    replica: str | None = None
    dropped: int | None = None
    outcome: str | None = None
    replicas: tuple[str, ...] = ()

    @property
    def is_success(self) -> bool:
        """Whether a replica at this address has applied the invalidation."""
        return self._has_answered and self.outcome != NOT_FOLLOWED

    @property
    def is_not_followed(self) -> bool:
        """Whether no subscriber of the process at this address follows the namespace."""
        return self._has_answered and self.outcome == NOT_FOLLOWED

    @property
    def _has_answered(self) -> bool:
        return self.error is None and self.status_code is not None and 200 <= self.status_code < 300


class FanoutReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one fan-out.

    Shape:  `succeeded` counts the addresses where the invalidation was applied, `not_followed` those of processes that
            do not follow its namespace, and `failed` the others. `complete` is whether discovery named every replica,
            `discovery` how it found them: `dns`, `srv` or `list`. `problem` is why no replica was called: the service
            was not found, the resolver failed, or the policy does not allow the service.
    Units:  `elapsed_ms` is the time from the look-up to the last response.
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
    not_followed: int = 0

    @property
    def is_delivered(self) -> bool:
        """Whether every existing replica has applied the invalidation. False when no replica has."""
        return self.succeeded > 0 and self.failed == 0 and self.complete and self.problem is None

    def summary(self) -> str:
        """Return one line: how many replicas were reached, and which were not."""
        if self.problem is not None:
            return f"fan-out called no replica of {self.service}: {self.problem}"
        if self.total == 0:
            return f"fan-out found no replica of {self.service}"
        unreached = "".join(self._unreached())
        unsure = "" if self.complete else "; discovery may not have named every replica"
        not_followed = "".join(self._not_followed())
        reached = f"fan-out reached {self.succeeded} of {counted(self.total, 'replica')} of {self.service}"
        return f"{reached}{unreached}{not_followed}{unsure}"

    def _unreached(self) -> Iterator[str]:
        outcomes = [each for each in self.outcomes if not (each.is_success or each.is_not_followed)]
        for place, outcome in enumerate(islice(outcomes, _UNREACHED_SHOWN_MAX)):
            why = outcome.error or f"status {outcome.status_code}"
            yield f"{', ' if place else '; unreached: '}{outcome.address} ({why})"
        if len(outcomes) > _UNREACHED_SHOWN_MAX:
            yield f" and {len(outcomes) - _UNREACHED_SHOWN_MAX} more"

    def _not_followed(self) -> Iterator[str]:
        outcomes = [outcome for outcome in self.outcomes if outcome.is_not_followed]
        for place, outcome in enumerate(islice(outcomes, _UNREACHED_SHOWN_MAX)):
            yield f"{', ' if place else '; not followed by any subscriber of the process at: '}{outcome.address}"
        if len(outcomes) > _UNREACHED_SHOWN_MAX:
            yield f" and {len(outcomes) - _UNREACHED_SHOWN_MAX} more"
        if outcomes and not self.succeeded:
            yield "; have the fan-out call the service whose replicas follow the namespace"
