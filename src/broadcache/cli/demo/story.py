"""The demo's story: a price changes, one publish, and what each replica serves before and after."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Final, Protocol

from .fleet import Fleet, Invalidated, Replica, RequestFailed

__all__ = ["Row", "Screen", "Story"]

# The first price of the source is not among them: the naive replica would look fresh by accident.
_PRICES: Final = tuple(map(Decimal, ("19.90", "22.50", "18.75")))
_STALE_READS: Final = 20
_READ_INTERVAL_SECONDS: Final = 0.5
_READS_A_ROUND: Final = 12
_STALE_READS_A_ROUND: Final = 4


@dataclass(slots=True)
class Row:
    """The last observation of one replica.

    Shape:  `stale_reads` counts the reads of an old price that began after every subscribed replica had dropped it.
    Units:  `dropped_after_ms` is from sending POST until the entry was dropped, including the HTTP request.
    """

    replica: Replica
    price: Decimal | None = None
    is_stale: bool = False
    read: str = ""
    state: str = ""
    sequence: int | None = None
    dropped_after_ms: float | None = None
    stale_reads: int = 0


class Screen(Protocol):
    """Displays the story."""

    def say(self, text: str) -> None:
        """Add a line to the narration."""

    def show(self, rows: Iterable[Row], source_price: Decimal) -> None:
        """Show the last observation of each replica."""


class Story:
    """Runs the story and shows it on a screen. `failures` has violations of the promise; it should stay empty.

    Units: `pause_seconds` is how long each scene is shown, for people to read.
    """

    def __init__(self, fleet: Fleet, screen: Screen, *, pause_seconds: float = 0.0) -> None:
        self.failures: Final[list[str]] = []
        self._fleet = fleet
        self._screen = screen
        self._pause_seconds = pause_seconds
        self._rows = [Row(replica) for replica in fleet.replicas]
        self._source_price = Decimal(0)
        # The price at the last invalidation that all subscribed replicas have applied: they must serve it.
        self._invalidated_price: Decimal | None = None
        self._last_sequence = 0
        self._prices = itertools.cycle(_PRICES)

    async def run(self) -> None:
        """Run it once, from cold caches to the new price. Raises: RequestFailed."""
        self._screen.say("Each replica reads product 1: its cache is empty, so it loads from the source …")
        await self._scene()
        self._screen.say("… and reads it again: a hit in its own memory.")
        await self._scene()
        old_price = self._source_price
        await self._change_price()
        await self._scene()
        await self._invalidate()
        await self._scene()
        self._expect_new_price(old_price)
        for _ in range(_STALE_READS):
            await self._read_all()
        self._screen.say(f"{_STALE_READS} more reads of each: the naive replica, not subscribed, serves {old_price}.")
        await self._scene()

    async def run_outage(self) -> None:
        """Kill the server, and invalidate by HTTP while it is down. Raises: RequestFailed."""
        subscribed = [row for row in self._rows if row.replica.is_subscribed]
        await self._fleet.kill_server()
        await self._await(subscribed, "detected the outage", lambda row: row.replica.await_state(is_coherent=False))
        await self._read_all()  # so that the replica that keeps serving has the price in its cache
        self._screen.say("Valkey was killed. Replicas bypass their caches; replica-3 may keep serving.")
        await self._scene()
        await self._change_price()
        await self._scene()
        await self._invalidate()
        await self._scene()
        await self._fleet.restart_server()
        await self._await(subscribed, "reconnected", lambda row: row.replica.await_state(is_coherent=True))
        await self._await(subscribed, "read it from the log", lambda row: row.replica.await_sequence(1))
        self._last_sequence = 1  # of a new log: the restarted server is empty
        self._screen.say("Valkey is back. The queued invalidation is logged, and applied once more.")
        await self._scene()

    async def _await(self, rows: Iterable[Row], what: str, waiting: Callable[[Row], Awaitable[bool]]) -> None:
        rows = list(rows)
        for row, has_happened in zip(rows, await asyncio.gather(*map(waiting, rows)), strict=True):
            if not has_happened:
                self._fail(f"{row.replica.name} has not {what}")

    async def go_on(self) -> None:
        """Change the price and invalidate it every few seconds, without end. Failed requests are shown."""
        for number in itertools.count(1):
            await asyncio.sleep(_READ_INTERVAL_SECONDS)
            try:
                match number % _READS_A_ROUND:
                    case 0:
                        await self._invalidate()
                    case reads if reads == _READS_A_ROUND - _STALE_READS_A_ROUND:
                        await self._change_price()
                await self._read_all()
            except RequestFailed as error:
                self._screen.say(str(error))
            self._detect_other_publishes()
            self._show()

    async def _scene(self) -> None:
        await self._read_all()
        self._show()
        await asyncio.sleep(self._pause_seconds)

    async def _change_price(self) -> None:
        old_price = await self._fleet.source_price()
        new_price = next(price for price in self._prices if price != old_price)
        await self._fleet.replicas[0].set_price(new_price)
        self._screen.say(f"PUT to the source: {old_price} → {new_price}. Not invalidated yet: every cache is stale.")

    async def _invalidate(self) -> None:
        price = await self._fleet.source_price()
        invalidated = await self._fleet.invalidate()
        self._last_sequence = invalidated.sequence or self._last_sequence
        rows = [row for row in self._rows if row.replica.is_subscribed]
        await asyncio.gather(*(self._await_drop(row, invalidated) for row in rows))
        self._invalidated_price = price
        times_ms = [row.dropped_after_ms for row in rows if row.dropped_after_ms is not None]
        path = f"logged as #{invalidated.sequence}"
        if invalidated.sequence is None:
            path = f"by HTTP to {invalidated.sent_by_http}"
        self._screen.say(
            f"One POST /invalidations ({path}): "
            f"{len(times_ms)} of {len(rows)} replicas dropped it in {max(times_ms, default=0):.1f} ms."
        )

    async def _await_drop(self, row: Row, invalidated: Invalidated) -> None:
        row.dropped_after_ms = None
        try:
            drop = await row.replica.drop_of(invalidated)
        except RequestFailed:  # the next read will fail too, and show it
            return
        if drop is None:
            self._fail(f"{row.replica.name} has not applied {invalidated.id}")
        else:
            row.dropped_after_ms = (drop.applied_at_ns - invalidated.sent_at_ns) / 1e6

    async def _read_all(self) -> None:
        self._source_price = await self._fleet.source_price()
        await asyncio.gather(*map(self._read, self._rows))

    async def _read(self, row: Row) -> None:
        invalidated_price = self._invalidated_price
        try:
            read = await row.replica.read()
            row.state, row.sequence = await row.replica.status() if row.replica.is_subscribed else ("naive", None)
        except RequestFailed:
            row.price, row.read, row.state = None, "", "no answer"
            return
        row.price, row.read = read.price, "hit" if read.from_cache else "load"
        row.is_stale = read.price != self._source_price
        # Until the new price has been invalidated, a replica may serve the old one.
        if row.is_stale and invalidated_price == self._source_price:
            row.stale_reads += 1
            if row.replica.is_subscribed:
                self._fail(
                    f"{row.replica.name} served {read.price} after it had dropped it: expected {invalidated_price}"
                )

    def _expect_new_price(self, old_price: Decimal) -> None:
        for row in self._rows:
            if row.replica.is_subscribed and (row.price, row.read) != (self._source_price, "load"):
                self._fail(
                    f"{row.replica.name}: expected a load of {self._source_price}, got {row.read} of {row.price}"
                )
            if not row.replica.is_subscribed and row.price != old_price:
                self._fail(f"{row.replica.name}: expected a naive cache to serve {old_price}, got {row.price}")

    def _detect_other_publishes(self) -> None:
        newest = max((row.sequence or 0 for row in self._rows), default=0)
        if newest > self._last_sequence:
            self._last_sequence = newest
            self._invalidated_price = None
            self._screen.say(f"#{newest} was published by another client, perhaps you; the replicas have applied it.")

    def _fail(self, text: str) -> None:
        self.failures.append(text)
        self._screen.say(f"FAILED: {text}")

    def _show(self) -> None:
        self._screen.show(self._rows, self._source_price)
