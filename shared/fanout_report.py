"""The report of a fan-out: which replicas were called, and the result of each call."""

from collections.abc import Iterator
from itertools import islice
from typing import Final

import msgspec

from .texts import counted

__all__ = ["NOT_APPLIED_BY_ALL", "NOT_FOLLOWED", "AddressOutcome", "FanoutReport", "ProcessOutcome"]

NOT_FOLLOWED: Final = "not followed"
"""The outcome of a process none of whose subscribers follows the namespace."""

NOT_APPLIED_BY_ALL: Final = "not applied by all"
"""The outcome of an address one of whose processes has not applied it."""

_UNREACHED_SHOWN_MAX: Final = 5
"""How many unreached replicas a text names: enough to investigate one, few enough to read."""


class ProcessOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one of the processes that serve an address has done.

    Shape:  `pid` is null where it is not known. `outcome` is e.g. `applied` or `not followed`, of all its subscribers;
            null if the process has not answered the one that was called: `error` says why. `replicas` are the ids of
            its subscribers. `dropped` is how many entries they dropped.
    """

    pid: int | None
    outcome: str | None = None
    replicas: tuple[str, ...] = ()
    dropped: int | None = None
    error: str | None = None


class AddressOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """The result of calling one address.

    Shape:  `address` is the full URL that was called. `status_code` is None when there was no response. `error` is None
            when a replica has applied the invalidation, or does not follow its namespace; otherwise it says what was
            expected and what was received.
            `replica` and `outcome` are from the response: the replica's id, and e.g. `applied` or `not followed`.
            `dropped` is how many entries the replicas dropped. `replicas` are the ids of all that have applied it:
            those of each subscriber of each process. `processes` are all that serve the address. `doubt` says why there
            may be others, which may serve old values; None when there are none.
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
    processes: tuple[ProcessOutcome, ...] = ()
    doubt: str | None = None

    @property
    def is_success(self) -> bool:
        """Whether the invalidation was applied at this address, by each process named in `processes`."""
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
            do not follow its namespace, and `failed` the others. `discovery` is how the addresses were found: `dns`,
            `srv` or `list`; `discovery_complete` is whether they are all, null from senders that do not tell.
            `complete` is whether all processes at these addresses are known too; otherwise `doubt` says why. `problem`
            is why no replica was called: the service was not found, the resolver failed, or the policy does not allow
            the service.
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
    discovery_complete: bool | None = None
    doubt: str | None = None

    @property
    def is_delivered(self) -> bool:
        """Whether every known process at every existing address has applied the invalidation. False when none has.

        Whether all processes are known says `complete`.
        """
        has_all_addresses = self.complete if self.discovery_complete is None else self.discovery_complete
        return self.succeeded > 0 and self.failed == 0 and has_all_addresses and self.problem is None

    def summary(self) -> str:
        """Return one line: how many replicas were reached, and which were not."""
        if self.problem is not None:
            return f"fan-out called no replica of {self.service}: {self.problem}"
        if self.total == 0:
            return f"fan-out found no replica of {self.service}"
        unreached = "".join(self._unreached())
        has_all_addresses = self.complete if self.discovery_complete is None else self.discovery_complete
        unsure = "" if has_all_addresses else "; discovery may not have named every replica"
        unsure += "" if self.doubt is None else f"; {self.doubt}"
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
