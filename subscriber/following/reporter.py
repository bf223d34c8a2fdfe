"""The reporter: confirms applied invalidations to the publishers that wait for it."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

from ...shared.confirmation import Report, encode_reports
from ...shared.errors import BroadcacheError
from ...shared.transport.redis.link import Link, Refused
from .sequencer import Sequencer

__all__ = ["Reporter"]

_log = logging.getLogger("broadcache.subscriber")

_REPORTS_MAX: Final = 10_000
_BATCH_REPORTS: Final = 100


class Reporter:
    """Sends reports over the current link, in the order in which they were recorded, many in one message.

    Recording never waits. Reports beyond `_REPORTS_MAX` are left out; the position in the replica's presence confirms
    those invalidations a little later. Reports recorded without a link are sent over the next one.

    Shape:  `left_out` counts reports that were not sent.
    Units:  `unix_ms` is the wall clock in milliseconds, used for the displayed lag only.
    """

    def __init__(self, replica_id: str, *, unix_ms: Callable[[], float] = lambda: time.time_ns() / 1_000_000) -> None:
        self.left_out: int = 0
        self._replica_id = replica_id
        self._unix_ms = unix_ms
        self._waiting: deque[tuple[str, Report]] = deque()
        self._lag_ms: dict[str, float] = {}
        self._has_reports = asyncio.Event()

    def lag_ms(self, namespace: str) -> float | None:
        """How late the last invalidation with a report was applied, by two wall clocks."""
        return self._lag_ms.get(namespace)

    def record(self, sequencer: Sequencer) -> None:
        """Queue the reports of `sequencer`."""
        now_ms = self._unix_ms()
        while sequencer.reports:
            report, sent_at_ms = sequencer.reports.popleft()
            if sent_at_ms is not None:
                self._lag_ms[sequencer.namespace] = lag_ms = now_ms - sent_at_ms
                report = msgspec.structs.replace(report, lag_ms=lag_ms)
            if len(self._waiting) < _REPORTS_MAX:
                self._waiting.append((sequencer.namespace, report))
            else:
                self.left_out += 1
        self._has_reports.set()

    async def send_for_ever(self, link: Link) -> None:
        """Send reports until the link is lost."""
        try:
            while True:
                if not self._waiting:
                    self._has_reports.clear()
                    await self._has_reports.wait()
                await self._send(link)
        except BroadcacheError:
            return  # the follower handles the loss
        except Exception:  # noqa: BLE001  (the outermost task: publishers see the position in the next presence)
            _log.exception("no reports are sent over this link: an error in broadcache, please report it")

    async def _send(self, link: Link) -> None:
        """Send the oldest reports, of one namespace. Raises: LinkLost."""
        namespace = self._waiting[0][0]
        batch: list[Report] = []
        while len(batch) < _BATCH_REPORTS and self._waiting and self._waiting[0][0] == namespace:
            batch.append(self._waiting.popleft()[1])
        try:
            await link.publish(link.names_of(namespace).confirmed, encode_reports(self._replica_id, batch))
        except Refused as refusal:
            self.left_out += len(batch)
            _log.warning("expected %s to let this user confirm, got: %s", link.label, refusal)
