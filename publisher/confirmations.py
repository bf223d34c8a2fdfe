"""Waits for replicas to say that they have applied an invalidation."""

import asyncio
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from ..shared.address import RedisAddress
from ..shared.clock import Clock
from ..shared.confirmation import Confirmation, ReplicaConfirmation, Report, decode_reports
from ..shared.delivery import Outcome
from ..shared.errors import LinkLost, MalformedFrame
from ..shared.invalidation import Position
from ..shared.link import Link, Refused
from ..shared.names import names_of
from ..shared.presence import Presence
from ..shared.question import Answer
from .kept_link import KeptLinks

__all__ = ["Confirmations", "Wait"]

_log = logging.getLogger("broadcache.publisher")

_CHECK_SECONDS: Final = 0.25


class Wait:
    """One publish that waits: who is expected, and what has been heard of whom.

    A replica applies in order. So it has applied the invalidation when it reports the last part of it, and also when
    its position, in the same epoch, is not before that part.
    """

    def __init__(self, id: str, clock: Clock) -> None:
        self.id: Final = id
        self.has_heard = False
        self._clock = clock
        self._began_at = clock()
        self._expected: dict[str, None] = {}
        self._position: Position | None = None
        self._reports: dict[str, list[tuple[Report, float]]] = {}
        self._confirmed: dict[str, ReplicaConfirmation] = {}
        self._is_complete = asyncio.Event()

    @property
    def missing(self) -> list[str]:
        """The replicas that are expected and have not confirmed."""
        return [replica for replica in self._expected if replica not in self._confirmed]

    def expect(self, replicas: Collection[str]) -> None:
        """Expect these replicas, and those of before: the log is asked again when an answer was lost."""
        self._expected.update(dict.fromkeys(replicas))

    def accept(self, position: Position) -> None:
        """Take note of where the log has the invalidation."""
        self._position = position
        for replica in self._reports:
            self._look_at(replica)
        self._note()

    def take(self, replica: str, report: Report) -> None:
        """Take what a replica reports of this invalidation, or of a part of it."""
        self.has_heard = True
        self._reports.setdefault(replica, []).append((report, self._clock()))
        self._look_at(replica)
        self._note()

    def take_position(self, presence: Presence) -> None:
        """Take what a replica said with its last echo."""
        theirs, wanted = presence.position, self._position
        if wanted is None or theirs is None or presence.replica in self._confirmed:
            return
        if theirs.epoch == wanted.epoch and theirs.sequence >= wanted.sequence:
            self._confirm(presence.replica, self._clock(), "echo")
            self._note()

    def take_answer(self, outcome: Outcome) -> None:
        """Take what a replica answered to a fan-out: whoever names itself, and has taken it, has applied it."""
        if outcome.replica is None or outcome.error is not None or outcome.replica in self._confirmed:
            return
        self._confirmed[outcome.replica] = ReplicaConfirmation(
            replica=outcome.replica,
            outcome="confirmed",
            is_expected=outcome.replica in self._expected,
            latency_ms=outcome.latency_ms,
            dropped=outcome.dropped,
            how="http",
        )
        self._note()

    async def until_complete(self) -> None:
        """Wait until nobody is missing."""
        await self._is_complete.wait()

    def confirmation(self) -> Confirmation:
        """Return what is known now."""
        known = {replica: ReplicaConfirmation(replica=replica, outcome="missing") for replica in self._expected}
        known.update(self._confirmed)
        return Confirmation(replicas=tuple(known[replica] for replica in sorted(known)))

    def _look_at(self, replica: str) -> None:
        position = self._position
        if position is None or replica in self._confirmed:
            return
        for report, at in self._reports[replica]:
            if report.reaches(position):
                self._confirm(replica, at, "message")
                return

    def _confirm(self, replica: str, at: float, how: str) -> None:
        reports = [report for report, _ in self._reports.get(replica, ())]
        counts = [report.dropped for report in reports]
        self._confirmed[replica] = ReplicaConfirmation(
            replica=replica,
            outcome="confirmed",
            is_expected=replica in self._expected,
            latency_ms=(at - self._began_at) * 1_000,
            dropped=sum(count for count in counts if count is not None) if counts and None not in counts else None,
            how="message" if how == "message" else "echo",
        )

    def _note(self) -> None:
        if self._position is not None and not self.missing:
            self._is_complete.set()


class TakesAnswers(Protocol):
    """Who has asked replicas something."""

    def take(self, replica: str, answer: Answer) -> None:
        """Take what a replica answers."""


class Confirmations:
    """Hears the reports and answers of replicas, over links of its own, and hands them to those who wait.

    A link is opened, and a namespace's channel subscribed to, when somebody first waits for it. Both are kept.
    """

    def __init__(self, address: RedisAddress, *, clock: Clock) -> None:
        self._links = KeptLinks(address, client_name="broadcache:confirmations", on_message=self._receive)
        self._clock = clock
        self._namespaces: dict[bytes, str] = {}
        self._heard_over: dict[str, Link] = {}
        self._waits: dict[tuple[str, str], list[Wait]] = {}
        self._asked: dict[tuple[str, str], TakesAnswers] = {}

    async def close(self) -> None:
        """Close the links. Closing twice is harmless."""
        self._heard_over.clear()
        await self._links.close()

    @contextmanager
    def waiting(self, namespace: str, id: str) -> Iterator[Wait]:
        """Hand what is reported of this invalidation to the wait that is given, for as long as the block runs."""
        wait = Wait(id, self._clock)
        waits = self._waits.setdefault((namespace, id), [])
        waits.append(wait)
        try:
            yield wait
        finally:
            waits.remove(wait)
            if not waits and self._waits.get((namespace, id)) is waits:
                del self._waits[namespace, id]

    @contextmanager
    def asking(self, namespace: str, asked: TakesAnswers, ids: Collection[str]) -> Iterator[None]:
        """Hand what is answered to these questions to `asked`, for as long as the block runs."""
        keys = [(namespace, id) for id in ids]
        self._asked.update(dict.fromkeys(keys, asked))
        try:
            yield
        finally:
            for key in keys:
                del self._asked[key]

    async def listen(self, namespace: str, timeout_seconds: float) -> bool:
        """Hear the reports of a namespace from now on; return whether that could be had in time.

        Without it, what replicas say with their echoes has to do, which comes later.
        """
        channel = names_of(namespace).confirmed
        try:
            async with asyncio.timeout(timeout_seconds):
                link = await (await self._links.of(namespace)).connected()
                if self._heard_over.get(namespace) is not link:
                    self._namespaces[channel.encode()] = namespace
                    await link.subscribe(channel)
                    self._heard_over[namespace] = link
        except (LinkLost, Refused, TimeoutError) as error:
            _log.warning(
                "expected to hear what replicas of %r report, cannot: %s; their echoes tell a little later",
                namespace,
                str(error) or f"no answer within {timeout_seconds:g} s",
            )
            return False
        return True

    async def distrust(self, namespace: str) -> None:
        """Give up the link of a namespace: it has brought nothing, although replicas had something to say."""
        if (link := self._heard_over.pop(namespace, None)) is not None:
            await link.close()

    async def check(self, namespace: str) -> None:
        """Give up the link of a namespace if it keeps silent: it has brought nothing that was waited for."""
        link = self._heard_over.get(namespace)
        if link is None:
            return
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                await link.call("PING")
        except Refused:
            pass  # whoever refuses is there
        except (LinkLost, TimeoutError):
            await self.distrust(namespace)

    def _receive(self, channel: bytes, frame: bytes) -> None:
        namespace = self._namespaces.get(channel)
        if namespace is None or not (self._waits or self._asked):
            return
        try:
            reports = decode_reports(frame)
        except MalformedFrame as error:
            _log.warning("a report of %r proves nothing: %s", namespace, error)
            return
        for report in reports.reports:
            # A part of a split invalidation has its id and a number.
            for id in {report.id, report.id.rpartition(".")[0]}:
                for wait in self._waits.get((namespace, id), ()):
                    wait.take(reports.replica, report)
        for answer in reports.answers:
            if (asked := self._asked.get((namespace, answer.id))) is not None:
                asked.take(reports.replica, answer)
