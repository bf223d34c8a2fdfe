"""The log reader: reads the pages of a log that a replica has missed, and applies them."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from ...shared.clock import Clock
from ...shared.errors import LinkLost, LogRefused
from ...shared.transport.redis.link import Link
from ...shared.transport.redis.log import Entry, read_from, read_head
from .reporter import Reporter
from .sequencer import Sequencer
from .settings import Timing

__all__ = ["LogReader"]

T = TypeVar("T")

_log = logging.getLogger("broadcache.subscriber")

_PAGE_ENTRIES_MIN: Final = 2
"""The entries of a page: the one at the replica's own position, and at least one more."""
_PAGE_ENTRIES_FIRST: Final = 16
_PAGE_ENTRIES_MAX: Final = 256
_PAGE_SECONDS_AIMED_AT: Final = 0.1
_PAGE_SECONDS_MAX: Final = 60.0
"""The longest that one page may take while bytes arrive. The next link requests half as many entries."""
_PAGES_WITHOUT_PROGRESS_MAX: Final = 8


class LogReader:
    """Catches up with logs, over the current link of a follower.

    Shape:  `on_change` is called, without arguments, after each page: its invalidations may have left dead entries.
    """

    def __init__(self, *, reporter: Reporter, timing: Timing, clock: Clock, on_change: Callable[[], None]) -> None:
        self._reporter = reporter
        self._timing = timing
        self._clock = clock
        self._on_change = on_change
        # How many entries the next page requests. It outlives a link: the next one is likely to be as fast.
        self._page_entries = _PAGE_ENTRIES_FIRST
        self._is_refused = False

    async def catch_up(self, link: Link, sequencer: Sequencer) -> bool:
        """Apply from the log what the channel did not deliver; drop everything if the log no longer has it.

        Returns: False when everything was dropped.
        """
        least, pages_without_progress = sequencer.backlog, 0
        while sequencer.is_behind:
            claimed, count = sequencer.claimed, self._page_entries
            reason = "log trimmed"
            entries: list[Entry] = []
            try:
                entries = await self._page(link, sequencer.namespace, sequencer.sequence)
            except LogRefused as refusal:  # e.g. the key has another type
                # One line for all namespaces, until a log can be read again.
                level, self._is_refused = logging.DEBUG if self._is_refused else logging.WARNING, True
                _log.log(level, "the log of namespace %s cannot be read: %s", sequencer.namespace, refusal)
                reason = "log unreadable"
            else:
                self._is_refused = False
            is_end = len(entries) < count
            is_whole = sequencer.replay(entries, claimed=claimed, is_end=is_end)
            if sequencer.backlog < least:
                least, pages_without_progress = sequencer.backlog, 0
            else:
                pages_without_progress += 1
            if is_whole and pages_without_progress >= _PAGES_WITHOUT_PROGRESS_MAX:
                is_whole, reason = False, "fell behind"
            if not is_whole:
                await self._restart(link, sequencer, reason)
                return False
            if sequencer.reports:
                self._reporter.record(sequencer)
            self._on_change()
            await asyncio.sleep(0)
            if is_end:
                break  # positions that frames claim beyond the end are checked with the next echo
        return True

    async def _page(self, link: Link, namespace: str, sequence: int) -> list[Entry]:
        """Read the next page of the log, and set the size of the one after it by how long it took.

        It may take as long as it needs while bytes arrive: only silence is a reason to give up the link.
        """
        count, began_at = self._page_entries, self._clock()
        self._page_entries = max(_PAGE_ENTRIES_MIN, count // 2)  # for the next link, if this page loses the current one
        try:
            async with asyncio.timeout(_PAGE_SECONDS_MAX):
                entries = await _while_receiving(
                    link, read_from(link, namespace, sequence=sequence, count=count), self._timing.echo_timeout_seconds
                )
        except TimeoutError:
            raise LinkLost(
                f"expected {count} entries of the log from {link.label} within {_PAGE_SECONDS_MAX:g} s, got fewer"
            ) from None
        is_slow = self._clock() - began_at > _PAGE_SECONDS_AIMED_AT
        self._page_entries = max(_PAGE_ENTRIES_MIN, count // 2) if is_slow else min(_PAGE_ENTRIES_MAX, count * 2)
        return entries

    async def _restart(self, link: Link, sequencer: Sequencer, reason: str) -> None:
        """Drop everything, and continue from the current head of the log."""
        async with link.within(self._timing.echo_timeout_seconds):
            newest = await read_head(link, sequencer.namespace)
        sequencer.restart(newest, reason)


async def _while_receiving(link: Link, answer: Coroutine[Any, Any, T], seconds: float) -> T:
    """Return the answer, however long it takes while bytes arrive. Raises: LinkLost after `seconds` without any."""
    task = asyncio.ensure_future(answer)
    try:
        while True:
            received_bytes = link.received_bytes
            await asyncio.wait([task], timeout=seconds)
            if task.done():
                return task.result()
            if link.received_bytes == received_bytes:
                raise LinkLost(f"expected an answer from {link.label}, got not one byte of it within {seconds:g} s")
    finally:
        task.cancel()
