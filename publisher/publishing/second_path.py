"""The second path: an invalidation that Redis does not log at once is sent to the replicas by HTTP."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeAlias

from ...shared.errors import LinkLost, LogRefused, NotDelivered
from ...shared.fanout_report import FanoutReport
from ...shared.invalidation import Invalidation
from ...shared.receipt import Receipt
from ...shared.wire import encode_unsequenced
from .backlog import Pending
from .delivery import Delivery, InvalidationSender
from .retry_queue import RetryQueue

__all__ = ["Log", "SecondPath"]

Log: TypeAlias = Callable[[Pending, Callable[[], None]], Coroutine[Any, Any, Receipt]]
"""Logs an invalidation, with all retries of a publish. Calls the second argument after each failed attempt."""

FANOUT_SECONDS_MAX: Final = 20.0
"""How long `close` waits for senders. With its default limits, a fan-out of ours ends in about 14 s."""
_CANCELLED_SECONDS_MAX: Final = 1.0
"""How long a sender that was cancelled may take to end."""

logger: logging.Logger = logging.getLogger("broadcache.publisher")


class SecondPath:
    """Delivers through the log and by HTTP. It owns the deliveries under way: a fan-out that has begun is completed.

    Units:  `fallback_after_seconds` is how long a delivery waits for Redis before its fan-out begins.
            `fanout_seconds_max` is how long `close` waits for fan-outs: then their sender is cancelled.
    """

    def __init__(
        self,
        delivery: Delivery,
        sender: InvalidationSender,
        *,
        log: Log,
        retry_queue: RetryQueue,
        fallback_after_seconds: float,
        fanout_seconds_max: float = FANOUT_SECONDS_MAX,
    ) -> None:
        self.delivery: Final = delivery
        self.sender: Final = sender
        self.log: Final = log
        self.retry_queue: Final = retry_queue
        self.fallback_after_seconds: Final = fallback_after_seconds
        self.fanout_seconds_max: Final = fanout_seconds_max
        self._under_way: dict[asyncio.Task[Receipt], _UnderWay] = {}

    async def deliver(self, pending: Pending) -> Receipt:
        """Deliver the invalidation by either path. Raises: NotDelivered, IdempotencyConflict."""
        under_way = _FanoutAlone(self, pending) if self.delivery == "fanout" else _BothPaths(self, pending)
        task = asyncio.create_task(under_way.run(), name="broadcache publisher delivery")
        self._under_way[task] = under_way
        task.add_done_callback(self._forget)
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            under_way.is_abandoned = True
            if under_way.fanout is None:
                task.cancel()
            raise
        return task.result()

    async def close(self, last_attempt_seconds: float) -> None:
        """Wait for the fan-outs that have begun, then flush the retry queue once. Closing twice is harmless.

        A sender that does not return within `fanout_seconds_max` is cancelled: what it was sending goes to the retry
        queue. One that ignores even this is left behind, and logged as an error.
        """
        try:
            for under_way in self._under_way.values():
                under_way.stop_logging()
            await self._end_fanouts()
        finally:
            try:
                await self.retry_queue.close(last_attempt_seconds)
            finally:
                await self._close_sender()

    async def _end_fanouts(self) -> None:
        if self._under_way:
            await asyncio.wait(list(self._under_way), timeout=self.fanout_seconds_max)
        if self._under_way:
            logger.error(
                "%d fan-outs had not ended %g s after the publisher began to close: they are cancelled; `send` of an "
                "InvalidationSender must return in bounded time",
                len(self._under_way),
                self.fanout_seconds_max,
            )
            for under_way in self._under_way.values():
                under_way.give_up(self.fanout_seconds_max)
            await asyncio.wait(list(self._under_way), timeout=_CANCELLED_SECONDS_MAX)
        if self._under_way:
            logger.error("%d fan-outs ignore their cancellation, and are left behind", len(self._under_way))

    async def _close_sender(self) -> None:
        closing = asyncio.ensure_future(self.sender.close())
        try:
            await asyncio.wait([closing], timeout=self.fanout_seconds_max)
        finally:
            if not closing.done():
                closing.cancel()
                await asyncio.wait([closing], timeout=_CANCELLED_SECONDS_MAX)
        if closing.done() and not closing.cancelled():
            closing.result()
        else:
            logger.error("%r had not closed after %g s, and was cancelled", self.sender, self.fanout_seconds_max)

    async def resume(self) -> None:
        """Continue on this event loop: the one before has ended, and with it the deliveries that were under way."""
        self._under_way.clear()
        self.retry_queue.resume()
        try:
            await self.sender.close()
        except Exception:  # a user's sender may need the loop that has ended
            logger.warning("the sender of the fan-out could not be closed on a new event loop", exc_info=True)
        await self.sender.__aenter__()

    def _forget(self, task: asyncio.Task[Receipt]) -> None:
        under_way = self._under_way.pop(task, None)
        if under_way is None:
            return
        error = None if task.cancelled() else task.exception()
        if error is not None and under_way.is_abandoned:
            logger.warning("a publish failed after its caller was cancelled: %s", error)


class _UnderWay:
    """The delivery of one invalidation. `fanout` is set as soon as its fan-out has begun."""

    def __init__(self, path: SecondPath, pending: Pending) -> None:
        self.is_abandoned = False
        self.fanout: asyncio.Task[FanoutReport] | None = None
        self._path = path
        self._pending = pending
        self._given_up_after: float | None = None

    async def run(self) -> Receipt:
        raise NotImplementedError

    def stop_logging(self) -> None:
        """Stop trying to log it: the publisher closes."""

    def give_up(self, seconds: float) -> None:
        """Cancel a fan-out that has not ended within this time. Its report says so."""
        self._given_up_after = seconds
        if self.fanout is not None:
            self.fanout.cancel()

    def _fan_out(self) -> asyncio.Task[FanoutReport]:
        return asyncio.create_task(self._send(), name="broadcache publisher fan-out")

    async def _send(self) -> FanoutReport:
        try:
            return await self._path.sender.send(encode_unsequenced(self._pending.invalidation))
        except asyncio.CancelledError:
            if self._given_up_after is None:
                raise
            return _report_of(f"the publisher closed, and the fan-out had not ended {self._given_up_after:g} s later")
        except Exception as error:  # a user's sender may raise, and the invalidation must reach the retry queue anyway
            logger.exception("the fan-out of invalidation %s failed", self._pending.invalidation.id)
            return _report_of(f"{type(error).__name__}: {error}")

    def _receipt(self, report: FanoutReport, *, pending: bool) -> Receipt:
        invalidation = self._pending.invalidation
        return Receipt(invalidation.id, invalidation.namespace, None, 0, fanout=report, pending=pending)


class _FanoutAlone(_UnderWay):
    """One publish by HTTP alone, without a log and without retries."""

    async def run(self) -> Receipt:
        self.fanout = self._fan_out()
        report = await self.fanout
        if report.is_delivered:
            return self._receipt(report, pending=False)
        raise _not_delivered(self._pending.invalidation, (("fanout", report.summary()),), report, is_pending=False)


class _BothPaths(_UnderWay):
    """One publish through the log and by HTTP: by HTTP at once, or when the log fails or is slow to answer."""

    def __init__(self, path: SecondPath, pending: Pending) -> None:
        super().__init__(path, pending)
        self._has_failed_once: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._appending: asyncio.Task[Receipt] = asyncio.create_task(
            path.log(pending, self._record_failure), name="broadcache publisher log"
        )

    async def run(self) -> Receipt:
        try:
            is_redis_away = self._path.retry_queue.is_stuck
            if is_redis_away or self._path.delivery == "both":
                self.fanout = self._fan_out()
            if not is_redis_away:
                await self._first_result_of_log()
            if self.fanout is None and (not self._appending.done() or self._failure_of_log() is not None):
                self.fanout = self._fan_out()
            return await self._result()
        finally:
            self._appending.cancel()
            await asyncio.wait([self._appending])
            if not self._appending.cancelled():
                self._appending.exception()  # retrieved: it was raised, or the invalidation is in the retry queue

    def stop_logging(self) -> None:
        self._appending.cancel()

    def _record_failure(self) -> None:
        if not self._has_failed_once.done():
            self._has_failed_once.set_result(None)

    async def _first_result_of_log(self) -> None:
        """Wait until Redis has answered, an attempt has failed, or `fallback_after_seconds` have passed."""
        awaited: list[asyncio.Future[Receipt] | asyncio.Future[None]] = [self._appending, self._has_failed_once]
        await asyncio.wait(awaited, timeout=self._path.fallback_after_seconds, return_when=asyncio.FIRST_COMPLETED)

    def _failure_of_log(self) -> LinkLost | LogRefused | None:
        """Return why it is not logged, or None when it is. Raises: IdempotencyConflict, and errors of ours."""
        if self._appending.cancelled():
            return LinkLost("the publisher was closed during the call")
        error = self._appending.exception()
        if error is None or isinstance(error, LinkLost | LogRefused):
            return error
        raise error

    async def _result(self) -> Receipt:
        if self.fanout is None:
            return self._appending.result()
        await asyncio.wait([self._appending, self.fanout], return_when=asyncio.FIRST_COMPLETED)
        if not self._appending.done():
            report = self.fanout.result()
            if report.is_delivered and self._path.retry_queue.offer(self._pending) is None:
                return self._receipt(report, pending=True)
            await asyncio.wait([self._appending])
        # A fan-out that has begun is awaited: each replica receives all frames, and the receipt names those it reached.
        report = await self.fanout
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
        "it waits in the retry queue until Redis logs it; publish again"
        if is_pending
        else "it is not tried again; publish again"
    )
    details = "; ".join(f"{path}: {detail}" for path, detail in reasons)
    return NotDelivered(
        f"the invalidation was neither acknowledged by Redis nor applied by every replica: {outlook} with "
        f"id={invalidation.id!r}, which is harmless. {details}",
        reasons=reasons,
        report=report,
        is_pending=is_pending,
    )


def _report_of(problem: str) -> FanoutReport:
    """Return a report for a sender that raised or did not return, which senders must not."""
    return FanoutReport(
        service="?",
        total=0,
        succeeded=0,
        failed=0,
        complete=False,
        discovery=None,
        elapsed_ms=0.0,
        outcomes=(),
        problem=problem,
    )
