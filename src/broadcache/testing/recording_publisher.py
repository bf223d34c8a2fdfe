"""A publisher that needs no Redis: it checks and records what is published."""

from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, NoReturn, Self

from ..shared.confirmation import Confirm, Confirmation, checked_confirm
from ..shared.errors import InvalidSettings
from ..shared.invalidation import (
    DEFAULT_NAMESPACE,
    SCOPE_BYTES_MAX,
    SOURCE_BYTES_MAX,
    Invalidation,
    Target,
    check_text,
    invalidation_of,
)
from ..shared.receipt import Receipt, checked_receipt_seconds
from .memory_log import MemoryLog

__all__ = ["Closed", "RecordedReceipt", "RecordingPublisher"]


class RecordedReceipt(Receipt, Coroutine[Any, Any, Receipt]):
    """A receipt that may also be awaited, so that one publisher serves code with and without an event loop."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, Any, Receipt]:
        yield from ()
        return Receipt(*self)

    def send(self, value: object, /) -> NoReturn:
        """End at once, as a coroutine that has nothing to wait for."""
        raise StopIteration(Receipt(*self))

    def throw(self, kind: Any, value: Any = None, trace: Any = None, /) -> NoReturn:
        """Raise what is thrown in."""
        raise kind if value is None else value

    def close(self) -> None:
        """Do nothing: there is nothing to close."""


class Closed(Coroutine[Any, Any, None]):
    """What `close` returns: it may be awaited, and need not."""

    def __await__(self) -> Generator[Any, Any, None]:
        yield from ()

    def send(self, value: object, /) -> NoReturn:
        """End at once, as a coroutine that has nothing to wait for."""
        raise StopIteration

    def throw(self, kind: Any, value: Any = None, trace: Any = None, /) -> NoReturn:
        """Raise what is thrown in."""
        raise kind if value is None else value

    def close(self) -> None:
        """Do nothing: there is nothing to close."""


class RecordingPublisher:
    """Stands in for a `Publisher` or a `SyncPublisher` in tests: it accepts what they accept, and records it.

    `publish` may be awaited or not, and the publisher be entered by `async with` or `with`, or not at all. In
    `coherent(subscriber, publisher=recorder)` the caches apply what it publishes, and it records what they publish.

    Shape:  `published` has each invalidation with its position; one whose id was repeated is in it once. While
            `failure` is set, `publish` raises it, after its checks, and records nothing.
    Raises: InvalidTarget when `source` is too long.
    """

    def __init__(self, source: str = "recording-publisher") -> None:
        self.published: list[Invalidation] = []
        self.failure: BaseException | None = None
        self.source: Final = check_text(source, SOURCE_BYTES_MAX, "source")
        self.delivery: Final = "redis"
        self.has_log: Final = True
        self.retry_queue_length: Final = 0
        self._is_closed = False
        self._log = MemoryLog()
        self._log.records.append(self.published)

    def publish(
        self,
        *targets: Target,
        namespace: str = DEFAULT_NAMESPACE,
        reason: str = "",
        id: str | None = None,
        scope: str | None = None,
        receipt_seconds: float | None = None,
        confirm: Confirm | None = None,
    ) -> RecordedReceipt:
        """Record an invalidation, after the checks of `Publisher.publish`; return a receipt, which may be awaited.

        Raises: InvalidTarget, InvalidNamespace, InvalidSettings, IdempotencyConflict, as `Publisher.publish` does;
                InvalidSettings when closed; `failure`.
        """
        if self._is_closed:
            raise InvalidSettings("the publisher is closed: make a new one, or use it within `with` or `async with`")
        if scope is not None:
            check_text(scope, SCOPE_BYTES_MAX, "scope")
        invalidation = invalidation_of(
            targets, namespace=namespace, reason=reason, source=self.source, id=id, confirm=confirm is not None
        )
        checked_receipt_seconds(receipt_seconds, 0.0)
        if confirm is not None:
            checked_confirm(confirm)
        if self.failure is not None:
            raise self.failure
        receipt = self._log.append(invalidation, scope)
        if confirm is not None:
            receipt = receipt._replace(confirmation=Confirmation(replicas=()))
        return RecordedReceipt(*receipt)

    def close(self, *, last_attempt_seconds: float = 1.0) -> Closed:
        """Publish no more. May be awaited, and need not. `published` stays."""
        self._is_closed = True
        return Closed()

    def __enter__(self) -> Self:
        self._is_closed = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closed = True

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closed = True

    @contextmanager
    def recording(self, log: MemoryLog) -> Iterator[None]:
        """Publish to the log of a `coherent` block, and record what others publish there."""
        own, self._log = self._log, log
        log.records.append(self.published)
        try:
            yield
        finally:
            log.records[:] = [each for each in log.records if each is not self.published]
            self._log = own

    def __repr__(self) -> str:
        return f"<RecordingPublisher {self.source!r}, {len(self.published)} published>"
