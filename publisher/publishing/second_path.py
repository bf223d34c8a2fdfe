"""The second path: an invalidation that Redis does not take at once reaches the replicas by HTTP."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

from ...shared.errors import LinkLost, LogRefused, NotDelivered
from ...shared.fanout_report import FanoutReport
from ...shared.invalidation import Invalidation
from ...shared.receipt import Receipt
from ...shared.wire import encode_unsequenced
from .backlog import Pending
from .delivery import Delivery, InvalidationSender
from .retry_queue import RetryQueue

__all__ = ["Log", "SecondPath"]

Log: TypeAlias = Callable[[Pending, Callable[[], None]], Awaitable[Receipt]]
"""Logs it, trying as long as a publish may take; calls the second argument whenever an attempt has failed."""

logger = logging.getLogger("broadcache.publisher")


class SecondPath:
    """Delivers through the log and by HTTP, and owns what is under way: a fan-out that has begun is not left half done.

    Units:  `fallback_after_seconds` is how long Redis is waited for before the fan-out begins.
    """

    def __init__(
        self,
        delivery: Delivery,
        sender: InvalidationSender,
        *,
        log: Log,
        retry_queue: RetryQueue,
        fallback_after_seconds: float,
    ) -> None:
        self.delivery: Final = delivery
        self.sender: Final = sender
        self.log: Final = log
        self.retry_queue: Final = retry_queue
        self.fallback_after_seconds: Final = fallback_after_seconds
        self._under_way: dict[asyncio.Task[Receipt], _UnderWay] = {}

    async def deliver(self, pending: Pending) -> Receipt:
        """Return as soon as it is delivered. Raises: NotDelivered, IdempotencyConflict."""
        under_way = _FanoutAlone(self, pending) if self.delivery == "fanout" else _BothPaths(self, pending)
        task = asyncio.create_task(under_way.run(), name="broadcache publisher delivery")
        self._under_way[task] = under_way
        task.add_done_callback(self._forget)
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            under_way.is_abandoned = True
            if under_way.telling is None:
                task.cancel()
            raise
        return task.result()

    async def close(self, last_attempt_seconds: float) -> None:
        """Wait for the fan-outs that have begun, then have the retry queue try once more. Closing twice is harmless."""
        try:
            for under_way in self._under_way.values():
                under_way.stop_logging()
            while self._under_way:
                await asyncio.wait(list(self._under_way))
        finally:
            try:
                await self.retry_queue.close(last_attempt_seconds)
            finally:
                await self.sender.close()

    def _forget(self, task: asyncio.Task[Receipt]) -> None:
        under_way = self._under_way.pop(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and under_way.is_abandoned:
            logger.warning("a publish whose caller was cancelled meanwhile failed: %s", error)


class _UnderWay:
    """One invalidation on its way. `telling` is set as soon as its fan-out has begun."""

    def __init__(self, path: SecondPath, pending: Pending) -> None:
        self.is_abandoned = False
        self.telling: asyncio.Task[FanoutReport] | None = None
        self._path = path
        self._pending = pending

    async def run(self) -> Receipt:
        raise NotImplementedError

    def stop_logging(self) -> None:
        """Give up the log, because the publisher closes."""

    def _fan_out(self) -> asyncio.Task[FanoutReport]:
        return asyncio.create_task(self._told(), name="broadcache publisher fan-out")

    async def _told(self) -> FanoutReport:
        try:
            return await self._path.sender.send(encode_unsequenced(self._pending.invalidation))
        except Exception as error:  # a sender may be anybody's, and its mistakes must not keep it from the retry queue
            logger.exception("the fan-out of invalidation %s failed", self._pending.invalidation.id)
            return _report_of_mistake(error)

    def _receipt(self, report: FanoutReport, *, pending: bool) -> Receipt:
        invalidation = self._pending.invalidation
        return Receipt(invalidation.id, invalidation.namespace, None, 0, fanout=report, pending=pending)


class _FanoutAlone(_UnderWay):
    """By HTTP, and into no log: what is not delivered now is not delivered."""

    async def run(self) -> Receipt:
        self.telling = self._fan_out()
        report = await self.telling
        if report.is_delivered:
            return self._receipt(report, pending=False)
        raise _not_delivered(self._pending.invalidation, (("fanout", report.summary()),), report, is_pending=False)


class _BothPaths(_UnderWay):
    """Through the log, and by HTTP: at once, or when the log fails or is slow to answer."""

    def __init__(self, path: SecondPath, pending: Pending) -> None:
        super().__init__(path, pending)
        self._has_failed_once: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._appending: asyncio.Task[Receipt] = asyncio.create_task(self._logged(), name="broadcache publisher log")

    async def run(self) -> Receipt:
        try:
            is_redis_away = self._path.retry_queue.is_stuck
            if is_redis_away or self._path.delivery == "both":
                self.telling = self._fan_out()
            if not is_redis_away:
                await self._first_answer()
            if self.telling is None and (not self._appending.done() or self._failure_of_log() is not None):
                self.telling = self._fan_out()
            return await self._settled()
        finally:
            self._appending.cancel()
            await asyncio.wait([self._appending])
            if not self._appending.cancelled():
                self._appending.exception()  # whatever it was, it was told or waits in the retry queue

    def stop_logging(self) -> None:
        self._appending.cancel()

    async def _logged(self) -> Receipt:
        return await self._path.log(self._pending, self._note_failure)

    def _note_failure(self) -> None:
        if not self._has_failed_once.done():
            self._has_failed_once.set_result(None)

    async def _first_answer(self) -> None:
        """Return when the log has answered, when an attempt has failed, or when it takes too long."""
        awaited: list[asyncio.Future[Receipt] | asyncio.Future[None]] = [self._appending, self._has_failed_once]
        await asyncio.wait(awaited, timeout=self._path.fallback_after_seconds, return_when=asyncio.FIRST_COMPLETED)

    def _failure_of_log(self) -> LinkLost | LogRefused | None:
        """Return why the log has not taken it, or None when it has. Raises: what no second path can mend."""
        if self._appending.cancelled():
            return LinkLost("the publisher was closed meanwhile")
        error = self._appending.exception()
        if error is None or isinstance(error, LinkLost | LogRefused):
            return error
        raise error

    async def _settled(self) -> Receipt:
        if self.telling is None:
            return self._appending.result()
        await asyncio.wait([self._appending, self.telling], return_when=asyncio.FIRST_COMPLETED)
        if not self._appending.done():
            report = self.telling.result()
            if report.is_delivered and self._path.retry_queue.offer(self._pending) is None:
                return self._receipt(report, pending=True)
            await asyncio.wait([self._appending])
        # Once begun, the fan-out is heard to its end: nobody is told by half, and the receipt says who was.
        report = await self.telling
        failure = self._failure_of_log()
        return self._appending.result()._replace(fanout=report) if failure is None else self._unlogged(failure, report)

    def _unlogged(self, failure: LinkLost | LogRefused, report: FanoutReport) -> Receipt:
        refusal = self._path.retry_queue.offer(self._pending)
        if report.is_delivered and refusal is None:
            return self._receipt(report, pending=True)
        reasons = [("redis", str(failure))]
        if not report.is_delivered:
            reasons.append(("fanout", report.summary()))
        if refusal is not None:
            reasons.append(("retry_queue", refusal))
        raise _not_delivered(self._pending.invalidation, tuple(reasons), report, is_pending=refusal is None)


def _not_delivered(
    invalidation: Invalidation, reasons: tuple[tuple[str, str], ...], report: FanoutReport, *, is_pending: bool
) -> NotDelivered:
    outlook = (
        "it waits in the retry queue, to be logged when Redis takes it; publish again"
        if is_pending
        else "it is not tried again; publish again"
    )
    said = "; ".join(f"{path}: {detail}" for path, detail in reasons)
    return NotDelivered(
        f"expected the invalidation to be logged, or taken by every replica, got neither: {outlook} with "
        f"id={invalidation.id!r}, which is harmless. {said}",
        reasons=reasons,
        report=report,
        is_pending=is_pending,
    )


def _report_of_mistake(error: Exception) -> FanoutReport:
    return FanoutReport(
        service="?",
        total=0,
        succeeded=0,
        failed=0,
        complete=False,
        discovery=None,
        elapsed_ms=0.0,
        outcomes=(),
        problem=f"{type(error).__name__}: {error}",
    )
