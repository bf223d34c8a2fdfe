"""Who is told of what a publisher does, so that it can be counted. The publisher itself knows no metrics library."""

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
    """Is told when something has ended, on the event loop on which it happened: it must not block, nor raise."""

    def published(self, namespace: str, outcome: str, seconds: float) -> None:
        """Take note of a publish. `outcome`: `accepted`, `repeat`, `fanned out`, or of `publish_outcome_of`."""
        ...

    def broadcast(
        self, service: str, addresses: tuple[CalledAddress, ...], seconds: float, *, is_complete: bool
    ) -> None:
        """Take note of a broadcast, and of what came of each address."""
        ...

    def not_broadcast(self, service: str, why: str) -> None:
        """Take note of a broadcast that called nobody. `why` is the name of the error."""
        ...

    def answered(self, method: str, route: str, status: int) -> None:
        """Take note of an HTTP request. `route` is a template, never a path that a client made up."""
        ...


class Unobserved:
    """An observer that forgets everything."""

    def published(self, namespace: str, outcome: str, seconds: float) -> None:
        """Forget it."""

    def broadcast(
        self, service: str, addresses: tuple[CalledAddress, ...], seconds: float, *, is_complete: bool
    ) -> None:
        """Forget it."""

    def not_broadcast(self, service: str, why: str) -> None:
        """Forget it."""

    def answered(self, method: str, route: str, status: int) -> None:
        """Forget it."""


UNOBSERVED: Final = Unobserved()


class Recorded(Protocol):
    """Takes the receipt of a publish."""

    def __call__(self, receipt: Receipt) -> Receipt:
        """Return it as it came."""
        ...


@contextmanager
def observed(observer: PublisherObserver, namespace: str) -> Iterator[Recorded]:
    """Tell `observer` how what is done within ends. A caller that gives up is not counted: nothing has ended."""
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
    """Say in a word what came of a publish that raised.

    Shape:  `unreachable` (it is not known whether it was logged), `refused`, `conflict`; `not delivered` for whatever
            else keeps it from the replicas.
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
