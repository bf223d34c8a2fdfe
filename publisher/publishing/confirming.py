"""A publish that waits for confirmation."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

from ...shared.clock import Clock
from ...shared.errors import BroadcacheError
from ...shared.fanout_report import FanoutReport
from ...shared.receipt import Receipt
from ...shared.transport.redis.link import Link
from ...shared.transport.redis.log import read_at
from ...shared.transport.redis.registry import Registries, Registry, presences
from .backlog import Pending
from .calls import Calls
from .confirmations import Confirmations, Wait

__all__ = ["Confirming"]

_POSITIONS_INTERVAL_SECONDS: Final = 0.25
"""How often a publish that waits reads the positions of replicas: a report may have been lost."""
_POSITIONS_SECONDS: Final = 0.25
"""The limit for one such read, which may exceed the time to wait."""
_LAST_PRESENCES_MAX: Final = 50


class Confirming:
    """Delivers invalidations, and waits until every registered replica has applied them.

    Shape:  `deliver` delivers one, through the log or by HTTP. `confirmations` is None for a publisher without a log:
            then only the responses to a fan-out confirm.
    Units:  `subscribe_seconds_max` limits how long a publish waits for the channel for confirmations.
    """

    def __init__(
        self,
        deliver: Callable[[Pending], Awaitable[Receipt]],
        *,
        calls: Calls,
        confirmations: Confirmations | None,
        registries: Registries,
        subscribe_seconds_max: float,
        clock: Clock,
    ) -> None:
        self._deliver = deliver
        self._calls = calls
        self._confirmations = confirmations
        self._registries = registries
        self._subscribe_seconds_max = subscribe_seconds_max
        self._clock = clock

    async def publish(self, pending: Pending, timeout_seconds: float) -> Receipt:
        """Deliver `pending`, wait at most `timeout_seconds`, and return the receipt with its confirmation."""
        if self._confirmations is None:
            return _confirmed_by_http(await self._deliver(pending), Wait(pending.invalidation, self._clock), None)
        namespace = pending.invalidation.namespace

        async def expect_registered(link: Link) -> None:
            wait.expect_registered(await self._registries.read(link, namespace))

        with self._confirmations.waiting(pending.invalidation) as wait:
            subscribe_seconds = min(self._subscribe_seconds_max, timeout_seconds)
            has_reports = await self._confirmations.subscribe(namespace, subscribe_seconds)
            # The registry is read before the append, so that a user without the right to read it is refused while
            # nothing has been logged.
            receipt = await self._deliver(pending._replace(before_append=expect_registered))
            if receipt.position is None:
                return _confirmed_by_http(receipt, wait, self._registries.last(namespace))
            try:
                # And again after the append: a replica may have registered in between, with entries of before.
                await self._calls.once(namespace, expect_registered)
            except BroadcacheError as error:
                wait.expect(
                    (), f"the registry of replicas could not be read after the invalidation was logged: {error}"
                )
            for outcome in receipt.fanout.outcomes if receipt.fanout else ():
                wait.record_response(outcome)
            wait.accept(receipt)
            # A repeat is not published again, so no replica reports it: only positions can confirm it.
            has_reports = has_reports and not receipt.is_repeat
            await self._wait(wait, namespace, timeout_seconds, has_reports=has_reports)
            if has_reports and not wait.has_report and wait.confirmation().confirmed:
                await self._confirmations.distrust(namespace)
            await self._read_last_presences(wait, namespace)
            return receipt._replace(confirmation=wait.confirmation())

    async def _wait(self, wait: Wait, namespace: str, timeout_seconds: float, *, has_reports: bool) -> None:
        """Wait until no replica is missing, at most `timeout_seconds`; read positions at intervals."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        pause_seconds = _POSITIONS_INTERVAL_SECONDS if has_reports else 0.0
        while self._calls.is_open and wait.missing and (left_seconds := deadline - loop.time()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_seconds, pause_seconds)):
                    await wait.until_complete()
            await self._read_positions(wait, namespace)
            pause_seconds = _POSITIONS_INTERVAL_SECONDS

    async def _read_positions(self, wait: Wait, namespace: str) -> None:
        """Compare the proven positions of the missing replicas with the log."""
        missing = wait.missing
        if not missing or not self._calls.is_open:
            return
        with contextlib.suppress(BroadcacheError, TimeoutError):
            async with asyncio.timeout(_POSITIONS_SECONDS):
                link = await self._calls.link(namespace)
                reaching = wait.reaching((await presences(link, namespace, missing)).values())
                if reaching:
                    # The log is read after the positions: it must still hold what a replica has proven.
                    wait.record_positions(reaching, await read_at(link, namespace, wait.sequences(reaching)))

    async def _read_last_presences(self, wait: Wait, namespace: str) -> None:
        """Read when the silent replicas were seen last, for people."""
        silent = wait.silent[:_LAST_PRESENCES_MAX]
        if not silent or not self._calls.is_open:
            return
        with contextlib.suppress(BroadcacheError, TimeoutError):
            async with asyncio.timeout(_POSITIONS_SECONDS):
                link = await self._calls.link(namespace)
                wait.record_last_presences((await presences(link, namespace, silent)).values())


def _confirmed_by_http(receipt: Receipt, wait: Wait, registry: Registry | None) -> Receipt:
    """Return the receipt of an invalidation that is not in the log, confirmed by the responses to its fan-out.

    Shape: `registry` is as it was last read: a replica that it lists does follow the namespace, whatever it answers,
           and also if it was not called. It may have ended since; it may also serve on, where only the publisher is cut
           off.
    """
    outcomes = receipt.fanout.outcomes if receipt.fanout else ()
    listed, doubt = ((), None) if registry is None else (registry.expected, registry.doubt_of_ids)
    # A response without a replica id proves nothing: its address stays missing, as does a process that was not told.
    expected = [
        replica
        for each in outcomes
        for replica in each.replicas or (each.replica or each.address,)
        if not each.is_not_followed or replica in listed
    ]
    expected += [
        f"process {'?' if process.pid is None else process.pid} at {each.address}"
        for each in outcomes
        for process in each.processes
        if process.error is not None
    ]
    wait.expect([*expected, *listed], _doubt_of(receipt.fanout) or doubt)
    for outcome in outcomes:
        wait.record_response(outcome)
    return receipt._replace(confirmation=wait.confirmation())


def _doubt_of(report: FanoutReport | None) -> str | None:
    """Return why there may be replicas that the fan-out did not call; None when it called all."""
    if report is not None and report.total and report.complete and report.problem is None:
        return None
    result = "there was no fan-out" if report is None else report.summary()
    if report is not None and report.doubt is not None and report.discovery_complete and report.problem is None:
        return result
    return (
        f"{result}: a replica that was not called may serve old values; expected discovery to name every replica: "
        "check the service's name and the resolver, then publish again"
    )
