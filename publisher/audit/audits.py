"""The audits that an application runs beside what it serves."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Final, Self

from ...shared.clock import Clock, monotonic
from ...shared.process.closing import Closing
from ...shared.transport.redis.address import RedisAddress
from ..publishing.publisher import Publisher
from .auditor import Auditor
from .source import source_at
from .stats import AuditStats, Inconsistency

__all__ = ["Audits"]

logger: logging.Logger = logging.getLogger("broadcache.publisher")

_PAUSE_SECONDS: Final = 60.0
"""The pause after an unexpected error in an audit."""
_QUIET_SECONDS: Final = 60.0
"""A replica that is found inconsistent in the same way again is not logged again for this time."""
_REMEMBERED_MAX: Final = 1_000


class Audits(Closing):
    """One auditor for each namespace, from entering until closing. An error in one ends neither the others nor the app.

    They have their own links to Redis: an audit's reads never delay a publish.

    Shape:  `source_url` is the URL of the source, see `source_at`; without one, replicas are compared with each other.
    Raises: InvalidSettings, InvalidNamespace.
    """

    def __init__(
        self,
        redis_url: str | RedisAddress,
        namespaces: Sequence[str],
        *,
        sample: float,
        source_url: str | None = None,
        timeout_seconds: float = 2.0,
    ) -> None:
        self._publisher = Publisher(redis_url, timeout_seconds=timeout_seconds)
        self._auditors = tuple(
            Auditor(
                self._publisher,
                namespace,
                sample=sample,
                source=None if source_url is None else source_at(source_url, namespace),
                on_found=_InconsistencyLog(namespace),
            )
            for namespace in namespaces
        )
        self._tasks: list[asyncio.Task[None]] = []

    def stats(self) -> tuple[AuditStats, ...]:
        """Return the counters of each audit."""
        return tuple(auditor.stats() for auditor in self._auditors)

    async def __aenter__(self) -> Self:
        await self._publisher.__aenter__()
        self._tasks = [
            asyncio.create_task(_audit_for_ever(auditor), name=f"broadcache audit {auditor.namespace}")
            for auditor in self._auditors
        ]
        return self

    async def close(self) -> None:
        """End the audits. Closing twice, or before entering, is harmless."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._publisher.close()


async def _audit_for_ever(auditor: Auditor) -> None:
    while True:
        try:
            await auditor.run()
        except Exception:
            logger.exception("the audit of %s failed; it goes on in %g s", auditor.namespace, _PAUSE_SECONDS)
        await asyncio.sleep(_PAUSE_SECONDS)


class _InconsistencyLog:
    """Logs the inconsistent replicas by name: the metrics do not name them, and may be read when a replica is gone."""

    def __init__(self, namespace: str, *, clock: Clock = monotonic) -> None:
        self._namespace = namespace
        self._clock = clock
        self._logged_at: dict[tuple[str, str], float] = {}

    def __call__(self, found: Inconsistency) -> None:
        subject, now = (found.replica, found.kind), self._clock()
        if now - self._logged_at.get(subject, -_QUIET_SECONDS) < _QUIET_SECONDS:
            return
        if len(self._logged_at) >= _REMEMBERED_MAX:
            self._logged_at.clear()
        self._logged_at[subject] = now
        # %r keeps the names of replicas and keys, which are foreign text, on one line.
        logger.warning("the audit of %s found %r", self._namespace, str(found))
