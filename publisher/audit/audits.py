"""The audits that an application runs beside what it serves."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Final, Self

from ...shared.clock import Clock, monotonic
from ...shared.process.closing import Closing
from ..publishing.publisher import Publisher
from .auditor import Auditor
from .source import source_at
from .stats import AuditStats, Inconsistency

__all__ = ["Audits"]

logger = logging.getLogger("broadcache.publisher")

_PAUSE_SECONDS: Final = 60.0
"""How long an audit rests that failed as none should."""
_QUIET_SECONDS: Final = 60.0
"""How long nothing more is logged of a replica that is found inconsistent in the same way again."""
_TOLD_MAX: Final = 1_000


class Audits(Closing):
    """One auditor for each namespace, from entering until closing. Whatever becomes of them ends nothing else.

    They have links of their own to Redis: what an audit reads never stands before a publish.

    Shape:  `source_url` is where to read the source, see `source_at`; without one, replicas are compared.
    Raises: InvalidSettings, InvalidNamespace.
    """

    def __init__(
        self,
        redis_url: str,
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
                on_found=_Teller(namespace),
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
        """End them. Closing twice, or before entering, is harmless."""
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


class _Teller:
    """Logs who is found inconsistent: numbers do not say who, and may be looked at when the replica is gone."""

    def __init__(self, namespace: str, *, clock: Clock = monotonic) -> None:
        self._namespace = namespace
        self._clock = clock
        self._told_at: dict[tuple[str, str], float] = {}

    def __call__(self, found: Inconsistency) -> None:
        about, now = (found.replica, found.kind), self._clock()
        if now - self._told_at.get(about, -_QUIET_SECONDS) < _QUIET_SECONDS:
            return
        if len(self._told_at) >= _TOLD_MAX:
            self._told_at.clear()
        self._told_at[about] = now
        # What a replica or a publisher names itself or a key stays on one line.
        logger.warning("the audit of %s found %r", self._namespace, str(found))
