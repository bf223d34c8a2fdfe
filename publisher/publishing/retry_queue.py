"""The retry queue: invalidations that could not be logged when they were published, retried until they are."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Final

from ...shared.errors import IdempotencyConflict
from ...shared.process.backoff import Backoff
from ...shared.receipt import Receipt
from .backlog import Backlog, Pending

__all__ = ["RETRY_QUEUE_NAMES_MAX", "RetryQueue"]

RETRY_QUEUE_NAMES_MAX: Final = 10_000
"""The limit on names that wait to be logged, over all namespaces."""
_BATCH: Final = 100
"""How many are tried at once: enough to share round trips, few enough not to delay other calls on the link."""
_BACKOFF: Final = Backoff(seconds_min=0.02, seconds_max=2.0)
_NAMESPACES_SHOWN_MAX: Final = 10

logger: logging.Logger = logging.getLogger("broadcache.publisher")


class RetryQueue:
    """Retries to log invalidations in a task of its own, each with the id it was published with. In memory only.

    The task starts with the first invalidation, and ends when the queue is empty.

    Shape:  `log` tries once. It raises when that fails: IdempotencyConflict when the id was used for other targets.
    """

    def __init__(
        self,
        log: Callable[[Pending], Awaitable[object]],
        *,
        names_max: int = RETRY_QUEUE_NAMES_MAX,
        source: str = "",
        uniform: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._log = log
        self._backlog = Backlog(names_max=names_max, source=source)
        self._uniform = uniform
        self._sleep = sleep
        self._has_failed_last = False
        self._is_closed = False
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._backlog)

    @property
    def names_count(self) -> int:
        """How many names the queue holds: never more than `names_max`."""
        return self._backlog.names_count

    @property
    def is_stuck(self) -> bool:
        """Whether the queue is not empty, and Redis logged nothing of it at the last attempt."""
        return bool(self._backlog) and self._has_failed_last

    def offer(self, pending: Pending) -> str | None:
        """Add an invalidation to log later. Return None, or the reason when it cannot be added."""
        if self._is_closed:
            return "the publisher was closed"
        is_first = not self._backlog
        if not self._backlog.add(pending):
            return (
                f"{self._backlog.names_max} namespaces wait for Redis already, the most the retry queue holds; "
                "raise retry_queue_names_max"
            )
        if is_first:
            self._has_failed_last = True
            logger.warning(
                "Redis has not logged an invalidation of %r: it waits in the retry queue and is retried",
                pending.invalidation.namespace,
            )
        self._start()
        return None

    def resume(self) -> None:
        """Continue on this event loop: the one before has ended, and with it the queue's task."""
        self._task = None
        if self._backlog and not self._is_closed:
            self._start()

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="broadcache publisher retry queue")

    async def close(self, last_attempt_seconds: float) -> None:
        """Try once more within this time, and report what is left as lost. Closing twice is harmless."""
        self._is_closed = True
        try:
            await self._stop()
            async with asyncio.timeout(last_attempt_seconds):
                for _ in range(0, len(self._backlog), _BATCH):
                    await self._log_some()
        except TimeoutError:
            pass  # what is left is reported below
        finally:
            self._report_lost()

    async def _stop(self) -> None:
        task, self._task = self._task, None
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait([task])

    async def _run(self) -> None:
        failures = 0
        task = asyncio.current_task()
        while self._backlog:
            if self._task is not task:
                return  # the queue has been resumed on another event loop
            if await self._log_some():
                failures = 0
                continue
            failures += 1
            await self._sleep(_BACKOFF.seconds(failures, self._uniform))
        logger.info("Redis has logged everything in the retry queue")

    async def _log_some(self) -> bool:
        """Try the first batch. Return whether one of it was logged or got a new id."""
        batch = self._backlog.first(_BATCH)
        answers = await asyncio.gather(*[self._log(pending) for _, pending in batch], return_exceptions=True)
        has_progress = False
        for (ticket, pending), answer in zip(batch, answers, strict=True):
            if isinstance(answer, IdempotencyConflict) or _is_only_a_repeat(pending, answer):
                self._backlog.rename(ticket)
            elif isinstance(answer, BaseException):
                logger.debug("the retry queue could not log: %s", answer)
                self._backlog.postpone(ticket)
                continue
            else:
                self._backlog.remove(ticket)
            has_progress = True
        self._has_failed_last = not has_progress
        return has_progress

    def _report_lost(self) -> None:
        if not self._backlog:
            return
        names = self._backlog.namespaces
        more = f" and {len(names) - _NAMESPACES_SHOWN_MAX} more" if len(names) > _NAMESPACES_SHOWN_MAX else ""
        logger.error(
            "closed with %d invalidations that Redis has not logged, of the namespaces %s%s: replicas that did not "
            "receive them by HTTP keep the entries they name; publish Everything() for these namespaces",
            len(self._backlog),
            ", ".join(names[:_NAMESPACES_SHOWN_MAX]),
            more,
        )
        self._backlog.clear()


def _is_only_a_repeat(pending: Pending, answer: object) -> bool:
    """Whether the log had the id from before, and so has not logged the newer invalidations that this one covers."""
    return pending.stands_for_others and isinstance(answer, Receipt) and answer.is_repeat
