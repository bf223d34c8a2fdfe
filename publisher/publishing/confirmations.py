"""Waits for replicas to say that they have applied an invalidation."""

import asyncio
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple, Protocol

from ...shared.clock import Clock
from ...shared.confirmation import Confirmation, ReplicaConfirmation, Report, decode_reports
from ...shared.errors import LinkLost, MalformedFrame
from ...shared.fanout_report import AddressOutcome as FanoutOutcome
from ...shared.invalidation import Invalidation, Position
from ...shared.presence import Presence
from ...shared.question import ReplicaAnswer
from ...shared.receipt import Receipt
from ...shared.transport.redis.address import RedisAddress
from ...shared.transport.redis.link import Link, Refused
from ...shared.transport.redis.log import Entry
from ...shared.transport.redis.names import names_of
from ...shared.wire import digest_of, encode_tails, frame_at, parts_of
from .kept_link import KeptLinks

__all__ = ["Confirmations", "Wait"]

_log = logging.getLogger("broadcache.publisher")

_CHECK_SECONDS: Final = 0.25
_REPORTS_MAX: Final = 2_000
"""How many reports of one invalidation are kept of one replica: more than it can have parts."""


class Wait:
    """One publish that waits: the replicas that are expected, and what each has reported.

    A replica has applied the invalidation when it has reported the digest of every frame of it. It also has when its
    proven position is not before the invalidation, and the log that has the invalidation has at the replica's position
    the frame that the replica knows of it: numbers alone may be those of another history.
    """

    def __init__(self, invalidation: Invalidation, clock: Clock) -> None:
        self.has_heard = False
        self._invalidation = invalidation
        self._clock = clock
        self._began_at = clock()
        self._expected: dict[str, None] = {}
        self._doubt: str | None = None
        self._parts: tuple[_Part, ...] = ()
        self._reports: dict[str, dict[str, _Reported]] = {}
        self._confirmed: dict[str, ReplicaConfirmation] = {}
        self._is_complete = asyncio.Event()

    @property
    def missing(self) -> list[str]:
        """The replicas that are expected and have not confirmed."""
        return [replica for replica in self._expected if replica not in self._confirmed]

    def expect(self, replicas: Collection[str], doubt: str | None = None) -> None:
        """Expect these replicas, and those of before: the log is asked again when an answer was lost.

        Shape: `doubt` says why there may be others; it stays.
        """
        self._expected.update(dict.fromkeys(replicas))
        self._doubt = doubt or self._doubt

    def accept(self, receipt: Receipt) -> None:
        """Record where the log has the invalidation."""
        assert receipt.position is not None, "what is not in the log is confirmed by HTTP"
        epoch, last = receipt.position
        tails = encode_tails(self._invalidation)
        parts = parts_of(self._invalidation) if receipt.is_repeat else [None] * len(tails)
        places = [Position(epoch, last - len(tails) + number) for number in range(1, len(tails) + 1)]
        self._parts = tuple(
            _Part(place, part, {digest_of(frame_at(place, tail))})
            for place, part, tail in zip(places, parts, tails, strict=True)
        )
        for replica in self._reports:
            self._look_at(replica)
        self._note()

    def record_report(self, replica: str, report: Report) -> None:
        """Record what a replica reports of this invalidation, or of a part of it."""
        self.has_heard = True
        if report.digest is None:
            return  # an older replica does not say which frame it has applied
        reports = self._reports.setdefault(replica, {})
        # A frame that came twice dropped something the first time.
        if len(reports) < _REPORTS_MAX:
            reports.setdefault(report.digest, _Reported(report.dropped, self._clock()))
        self._look_at(replica)
        self._note()

    def reaching(self, presences: Iterable[Presence]) -> list[Presence]:
        """Return the presences whose proven position would confirm, if it is of the history of the log."""
        if not self._parts:
            return []
        last = self._parts[-1].place
        return [
            each
            for each in presences
            if each.digest is not None
            and each.position is not None
            and each.position.reaches(last)
            and each.replica not in self._confirmed
        ]

    def sequences(self, presences: Iterable[Presence]) -> list[int]:
        """Return the sequences that `record_positions` compares: those of the invalidation, and of these presences."""
        theirs = [each.position.sequence for each in presences if each.position is not None]
        return [*(part.place.sequence for part in self._parts), *theirs]

    def record_positions(self, presences: Iterable[Presence], logged: Mapping[int, Entry]) -> None:
        """Record the proven positions of replicas, compared with what the log had afterwards at `sequences`.

        What cannot be compared, because the log has it no more or no digest of it is known, confirms nothing.
        """
        if not all(part.stands_in(logged) for part in self._parts):
            return
        for presence in self.reaching(presences):
            assert presence.position is not None, "it reaches a position"
            entry = logged.get(presence.position.sequence)
            if entry is not None and entry.digest == presence.digest:
                self._confirm(presence.replica, self._clock(), "echo", None)
        # Of a repeat, the frames are known only now.
        for replica in self._reports:
            self._look_at(replica)
        self._note()

    def record_response(self, outcome: FanoutOutcome) -> None:
        """Record a replica's answer to a fan-out. One that names the replica, and is no error, counts as applied."""
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
        """Wait until no replica is missing."""
        await self._is_complete.wait()

    def confirmation(self) -> Confirmation:
        """Return what is known now."""
        known = {replica: ReplicaConfirmation(replica=replica, outcome="missing") for replica in self._expected}
        known.update(self._confirmed)
        return Confirmation(replicas=tuple(known[replica] for replica in sorted(known)), doubt=self._doubt)

    def _look_at(self, replica: str) -> None:
        if not self._parts or replica in self._confirmed:
            return
        reports = self._reports[replica]
        reported = [part.reported_in(reports) for part in self._parts]
        whole = [each for each in reported if each is not None]
        if len(whole) == len(reported):
            counts = [each.dropped for each in whole if each.dropped is not None]
            dropped = sum(counts) if len(counts) == len(whole) else None
            self._confirm(replica, max(each.at for each in whole), "message", dropped)

    def _confirm(self, replica: str, at: float, how: Literal["message", "echo"], dropped: int | None) -> None:
        self._confirmed[replica] = ReplicaConfirmation(
            replica=replica,
            outcome="confirmed",
            is_expected=replica in self._expected,
            latency_ms=(at - self._began_at) * 1_000,
            dropped=dropped,
            how=how,
        )

    def _note(self) -> None:
        if self._parts and not self.missing:
            self._is_complete.set()


class _Reported(NamedTuple):
    dropped: int | None
    at: float


class _Part(NamedTuple):
    """One frame of an invalidation: its place in the log, and the digests that prove it to be this one.

    Shape:  `repeated` is what has to stand there when an earlier publish has logged it, of which the bytes are not
            known: the source, the time and the reason may differ. None when this publish has logged it.
    """

    place: Position
    repeated: Invalidation | None
    digests: set[str]

    def reported_in(self, reports: Mapping[str, _Reported]) -> _Reported | None:
        """Return the report of this frame, if there is one."""
        return next((reports[digest] for digest in self.digests if digest in reports), None)

    def stands_in(self, logged: Mapping[int, Entry]) -> bool:
        """Return whether the log has this frame in its place."""
        entry = logged.get(self.place.sequence)
        if entry is None:
            return False
        if entry.digest in self.digests:
            return True
        found, wanted = entry.invalidation, self.repeated
        if found is None or wanted is None or found.position != self.place or not _is_same(found, wanted):
            return False
        self.digests.add(entry.digest)
        return True


def _is_same(one: Invalidation, other: Invalidation) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in ("id", "keys", "tags", "prefixes", "everything"))


class ResponseRecorder(Protocol):
    """Who has asked replicas something."""

    def record(self, replica: str, answer: ReplicaAnswer) -> None:
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
        self._asked: dict[tuple[str, str], ResponseRecorder] = {}

    async def close(self) -> None:
        """Close the links. Closing twice is harmless."""
        self._heard_over.clear()
        await self._links.close()

    @contextmanager
    def waiting(self, invalidation: Invalidation) -> Iterator[Wait]:
        """Hand what is reported of this invalidation to the wait that is given, for as long as the block runs."""
        namespace, id = invalidation.namespace, invalidation.id
        wait = Wait(invalidation, self._clock)
        waits = self._waits.setdefault((namespace, id), [])
        waits.append(wait)
        try:
            yield wait
        finally:
            waits.remove(wait)
            if not waits and self._waits.get((namespace, id)) is waits:
                del self._waits[namespace, id]

    @contextmanager
    def receiving(self, namespace: str, asked: ResponseRecorder, ids: Collection[str]) -> Iterator[None]:
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
                    wait.record_report(reports.replica, report)
        for answer in reports.answers:
            if (asked := self._asked.get((namespace, answer.id))) is not None:
                asked.record(reports.replica, answer)
