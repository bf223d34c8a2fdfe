"""The observer of a publisher: it receives outcomes to count. The publisher itself depends on no metrics library."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal, Protocol, TypeAlias

from ...shared.errors import BroadcacheError, IdempotencyConflict, LinkLost, LogRefused
from ...shared.receipt import Receipt

__all__ = [
    "UNOBSERVED",
    "CallResult",
    "CalledAddress",
    "PublisherObserver",
    "Unobserved",
    "observed",
    "publish_outcome_of",
]

CallResult: TypeAlias = Literal["success", "status", "not applied", "refused", "timeout", "not tried", "failed"]
"""How the call of one address ended: with a response (the first three: 200 to 299; another status; 200 to 299, but the
request objects to it), or without one."""


class CalledAddress(Protocol):
    """One address of a broadcast, and how its call ended."""

    @property
    def result(self) -> CallResult:
        """How the call ended: a fixed word, for counting."""
        ...

    @property
    def status_code(self) -> int | None:
        """The status of the response; None without a response."""
        ...

    @property
    def error(self) -> str | None:
        """For people: why there was no response, or why a response of 200 to 299 is no success."""
        ...


class PublisherObserver(Protocol):
    """Receives outcomes on the event loop of the publisher. It must neither block nor raise."""

    def published(self, namespace: str, outcome: str, seconds: float) -> None:
        """Record a publish. `outcome`: `accepted`, `repeat`, `fanned out`, or one of `publish_outcome_of`."""
        ...

    def broadcast(
        self, service: str, addresses: tuple[CalledAddress, ...], seconds: float, *, is_complete: bool
    ) -> None:
        """Record a broadcast, with the result of each address."""
        ...

    def not_broadcast(self, service: str, why: str) -> None:
        """Record a broadcast that called no address. `why` is the name of the error."""
        ...

    def answered(self, method: str, route: str, status: int) -> None:
        """Record an HTTP request. `route` is a template, never a path from a client."""
        ...


class Unobserved:
    """An observer that ignores everything."""

    def published(self, namespace: str, outcome: str, seconds: float) -> None:
        """Ignore it."""

    def broadcast(
        self, service: str, addresses: tuple[CalledAddress, ...], seconds: float, *, is_complete: bool
    ) -> None:
        """Ignore it."""

    def not_broadcast(self, service: str, why: str) -> None:
        """Ignore it."""

    def answered(self, method: str, route: str, status: int) -> None:
        """Ignore it."""


UNOBSERVED: Final = Unobserved()


class Recorded(Protocol):
    """Records the receipt of a publish."""

    def __call__(self, receipt: Receipt) -> Receipt:
        """Return the receipt unchanged."""
        ...


@contextmanager
def observed(observer: PublisherObserver, namespace: str) -> Iterator[Recorded]:
    """Report the outcome of the publish inside to `observer`. A cancelled publish has none, and is not reported."""
    began_at = time.perf_counter()
    outcome = "accepted"

    def recorded(receipt: Receipt) -> Receipt:
        nonlocal outcome
        outcome = "repeat" if receipt.is_repeat else "accepted"
        if receipt.position is None:
            outcome = "fanned out"
        return receipt

    try:
        yield recorded
    except BroadcacheError as error:
        observer.published(namespace, publish_outcome_of(error), time.perf_counter() - began_at)
        raise
    observer.published(namespace, outcome, time.perf_counter() - began_at)


def publish_outcome_of(error: BroadcacheError) -> str:
    """Return the outcome of a publish that raised.

    Shape:  `unreachable` (it is not known whether it was logged), `refused`, `conflict`; `not delivered` for any other
            error.
    """
    match error:
        case LinkLost():
            return "unreachable"
        case LogRefused():
            return "refused"
        case IdempotencyConflict():
            return "conflict"
        case _:
            return "not delivered"
