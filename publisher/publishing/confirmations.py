"""Receives the reports of replicas, and decides which of them have applied an invalidation."""

import asyncio
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple, Protocol

from ...shared.clock import Clock
from ...shared.confirmation import Confirmation, ReplicaConfirmation, Report, decode_reports
from ...shared.errors import LinkLost, MalformedFrame
from ...shared.fanout_report import NOT_FOLLOWED
from ...shared.fanout_report import AddressOutcome as FanoutOutcome
from ...shared.invalidation import Invalidation, Position
from ...shared.presence import Presence
from ...shared.question import ReplicaAnswer
from ...shared.receipt import Receipt
from ...shared.transport.redis.address import RedisAddress
from ...shared.transport.redis.link import Link, Refused
from ...shared.transport.redis.log import Entry
from ...shared.transport.redis.registry import Registry, SilentReplica
from ...shared.wire import digest_of, encode_tails, frame_at, parts_of
from .kept_link import KeptLinks

__all__ = ["Confirmations", "Wait"]

_log = logging.getLogger("broadcache.publisher")

_CHECK_SECONDS: Final = 0.25
_REPORTS_MAX: Final = 2_000
"""How many reports of one invalidation are kept of one replica: more than it can have parts."""


class Wait:
    """One publish that waits: the expected replicas, and the reports of each.

    A replica has applied the invalidation when it has reported the digest of every frame of it. It also has when its
    proven position is not before the invalidation, and both histories agree: the log has the invalidation in its place,
    and at the replica's position the frame whose digest the replica has. Numbers alone may be those of another history.
    """

    def __init__(self, invalidation: Invalidation, clock: Clock) -> None:
        self.has_report: bool = False
        self._invalidation = invalidation
        self._clock = clock
        self._began_at = clock()
        self._expected: dict[str, None] = {}
        self._silent: dict[str, SilentReplica] = {}
        self._seen_ms_ago: dict[str, int] = {}
        self._not_followed: set[str] = set()
        self._doubt: str | None = None
        self._parts: tuple[_Part, ...] = ()
        self._reports: dict[str, dict[str, _Reported]] = {}
        self._confirmed: dict[str, ReplicaConfirmation] = {}
        self._is_complete = asyncio.Event()

    @property
    def missing(self) -> list[str]:
        """The expected replicas that have not confirmed."""
        return [replica for replica in self._expected if replica not in self._confirmed]

    @property
    def silent(self) -> list[str]:
        """The replicas that have fallen silent: first those that may serve from their caches."""
        return sorted(self._silent, key=lambda replica: (not self._silent[replica].may_serve, replica))

    def expect_registered(self, registry: Registry) -> None:
        """Expect the replicas that the registry lists, beside those of earlier calls."""
        self._silent = dict(registry.silent)
        self.expect(registry.expected, registry.doubt)

    def expect(self, replicas: Collection[str], doubt: str | None = None) -> None:
        """Expect these replicas, beside those of earlier calls: a retried append reads the registry again.

        Shape: `doubt` says why there may be other replicas. An earlier one stays when it is None.
        """
        self._expected.update(dict.fromkeys(replicas))
        self._doubt = doubt or self._doubt

    def record_last_presences(self, presences: Iterable[Presence]) -> None:
        """Record the last presences of silent replicas."""
        for each in presences:
            if each.lifetime_ms and (silent := self._silent.get(each.replica)) is not None:
                self._seen_ms_ago[each.replica] = each.lifetime_ms + silent.ended_ms_ago

    def accept(self, receipt: Receipt) -> None:
        """Record the place of the invalidation in the log."""
        assert receipt.position is not None, "an invalidation that is not in the log is confirmed by HTTP"
        epoch, last = receipt.position
        tails = encode_tails(self._invalidation)
        parts = parts_of(self._invalidation) if receipt.is_repeat else [None] * len(tails)
        places = [Position(epoch, last - len(tails) + number) for number in range(1, len(tails) + 1)]
        self._parts = tuple(
            _Part(place, part, {digest_of(frame_at(place, tail))})
            for place, part, tail in zip(places, parts, tails, strict=True)
        )
        for replica in self._reports:
            self._match_reports(replica)
        self._check_complete()

    def record_report(self, replica: str, report: Report) -> None:
        """Record a replica's report of this invalidation, or of a part of it."""
        self.has_report = True
        if report.digest is None:
            return  # a replica of an older version does not report which frame it has applied
        reports = self._reports.setdefault(replica, {})
        # A frame that came twice dropped something the first time.
        if len(reports) < _REPORTS_MAX:
            reports.setdefault(report.digest, _Reported(report.dropped, self._clock()))
        self._match_reports(replica)
        self._check_complete()

    def reaching(self, presences: Iterable[Presence]) -> list[Presence]:
        """Return the presences whose proven position would confirm, if it belongs to the history of the log."""
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
        """Return the sequences for `record_positions`: those of the invalidation, and of these presences."""
        theirs = [each.position.sequence for each in presences if each.position is not None]
        return [*(part.place.sequence for part in self._parts), *theirs]

    def record_positions(self, presences: Iterable[Presence], logged: Mapping[int, Entry]) -> None:
        """Record the proven positions of replicas. `logged` is what the log had afterwards at `sequences`.

        A position confirms nothing when the log no longer holds its frame, or its digest is not known.
        """
        if not all(part.stands_in(logged) for part in self._parts):
            return
        for presence in self.reaching(presences):
            assert presence.position is not None, "`reaching` returns presences with a position"
            entry = logged.get(presence.position.sequence)
            if entry is not None and entry.digest == presence.digest:
                self._confirm(presence.replica, self._clock(), "echo", None)
        # The frames of a repeat are known only now.
        for replica in self._reports:
            self._match_reports(replica)
        self._check_complete()

    def record_response(self, outcome: FanoutOutcome) -> None:
        """Record the HTTP response of an address: of all replicas there that have applied the invalidation.

        One of a process that does not follow the namespace confirms nothing: an expected replica stays missing. Of an
        address that has failed, the named replicas have applied it all the same.
        """
        if outcome.error is not None and not outcome.replicas:
            return
        self._not_followed.update(
            replica for each in outcome.processes if each.outcome == NOT_FOLLOWED for replica in each.replicas
        )
        replicas = outcome.replicas or ((outcome.replica,) if outcome.replica else ())
        if outcome.is_not_followed:
            self._not_followed.update(replicas)
            return
        for replica in replicas:
            if replica not in self._confirmed:
                self._confirmed[replica] = ReplicaConfirmation(
                    replica=replica,
                    outcome="confirmed",
                    is_expected=replica in self._expected,
                    latency_ms=outcome.latency_ms,
                    dropped=outcome.dropped if len(replicas) == 1 else None,  # the count is of all together
                    how="http",
                )
        self._check_complete()

    async def until_complete(self) -> None:
        """Wait until no replica is missing."""
        await self._is_complete.wait()

    def confirmation(self) -> Confirmation:
        """Return the confirmation as of now."""
        known = {
            **{replica: self._unconfirmed(replica, "silent") for replica in self._silent},
            **{replica: self._unconfirmed(replica, "not followed") for replica in self._not_followed},
            **{replica: self._unconfirmed(replica, "missing") for replica in self._expected},
            **self._confirmed,
        }
        return Confirmation(replicas=tuple(known[replica] for replica in sorted(known)), doubt=self._doubt)

    def _unconfirmed(self, replica: str, outcome: Literal["missing", "silent", "not followed"]) -> ReplicaConfirmation:
        silent = self._silent.get(replica)
        return ReplicaConfirmation(
            replica=replica,
            outcome=outcome,
            is_expected=outcome == "missing",
            silent_ms=None if silent is None else silent.ended_ms_ago,
            seen_ms_ago=self._seen_ms_ago.get(replica),
        )

    def _match_reports(self, replica: str) -> None:
        """Confirm the replica if it has reported every part."""
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

    def _check_complete(self) -> None:
        if self._parts and not self.missing:
            self._is_complete.set()


class _Reported(NamedTuple):
    dropped: int | None
    at: float


class _Part(NamedTuple):
    """One frame of an invalidation: its place in the log, and the digests that identify it.

    Shape:  `repeated` is None when this publish has logged the frame. When an earlier publish has, its bytes are not
            known, since the source, the time and the reason may differ: then it is the invalidation to find there.
    """

    place: Position
    repeated: Invalidation | None
    digests: set[str]

    def reported_in(self, reports: Mapping[str, _Reported]) -> _Reported | None:
        """Return the report of this frame; None when there is none."""
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


class AnswerRecorder(Protocol):
    """Receives the answers of replicas to a query."""

    def record(self, replica: str, answer: ReplicaAnswer) -> None:
        """Record an answer of a replica."""


class Confirmations:
    """Receives the reports and answers of replicas over links of its own, and passes them to waits and queries.

    The first wait or query of a namespace opens a link and subscribes to its channel. Both are kept.
    """

    def __init__(self, address: RedisAddress, *, clock: Clock) -> None:
        self._links = KeptLinks(address, client_name="broadcache:confirmations", on_message=self._receive)
        self._clock = clock
        self._names_of = address.names_of
        self._namespaces: dict[bytes, str] = {}
        self._subscribed: dict[str, Link] = {}
        self._is_refused = False
        self._waits: dict[tuple[str, str], list[Wait]] = {}
        self._queries: dict[tuple[str, str], AnswerRecorder] = {}

    async def close(self) -> None:
        """Close the links. Closing twice is harmless."""
        self._subscribed.clear()
        await self._links.close()

    def abandon(self) -> None:
        """Close the links without their event loop, which has ended. The next wait or query opens new ones."""
        self._subscribed.clear()
        self._links.abandon()

    @contextmanager
    def waiting(self, invalidation: Invalidation) -> Iterator[Wait]:
        """Give a wait that receives the reports of this invalidation while the block runs."""
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
    def receiving(self, namespace: str, recorder: AnswerRecorder, ids: Collection[str]) -> Iterator[None]:
        """Pass the answers to these questions to `recorder` while the block runs."""
        keys = [(namespace, id) for id in ids]
        self._queries.update(dict.fromkeys(keys, recorder))
        try:
            yield
        finally:
            for key in keys:
                del self._queries[key]

    async def subscribe(self, namespace: str, timeout_seconds: float) -> bool:
        """Subscribe to the reports and answers of a namespace, once. Return whether that succeeded in time.

        Without the subscription, only the positions in echoes confirm, which is slower.
        """
        channel = self._names_of(namespace).confirmed
        try:
            async with asyncio.timeout(timeout_seconds):
                link = await self._links.connected(namespace)
                if self._subscribed.get(namespace) is not link:
                    self._namespaces[channel.encode()] = namespace
                    await link.subscribe(channel)
                    self._subscribed[namespace] = link
        except (LinkLost, Refused, TimeoutError) as error:
            self._links.distrust(namespace)
            # One line for all namespaces, until one is subscribed again.
            level, self._is_refused = logging.DEBUG if self._is_refused else logging.WARNING, True
            _log.log(
                level,
                "cannot subscribe to the confirmations of %r: %s; falling back to positions in echoes, which is slower",
                namespace,
                str(error) or f"no answer within {timeout_seconds:g} s",
            )
            return False
        self._is_refused = False
        return True

    async def distrust(self, namespace: str) -> None:
        """Close the link of a namespace: it delivered no report, although replicas have confirmed by other means."""
        if (link := self._subscribed.pop(namespace, None)) is not None:
            await link.close()

    async def check(self, namespace: str) -> None:
        """Close the link of a namespace if it does not answer a ping: it delivered none of the awaited answers."""
        link = self._subscribed.get(namespace)
        if link is None:
            return
        try:
            async with link.within(_CHECK_SECONDS):
                await link.call("PING")
        except Refused:
            pass  # a refusal is an answer
        except LinkLost:
            await self.distrust(namespace)

    def _receive(self, channel: bytes, frame: bytes) -> None:
        namespace = self._namespaces.get(channel)
        if namespace is None or not (self._waits or self._queries):
            return
        try:
            reports = decode_reports(frame)
        except MalformedFrame as error:
            _log.warning(
                "ignored a message on the channel for confirmations of %r, because it is malformed: %s",
                namespace,
                error,
            )
            return
        for report in reports.reports:
            # A part of a split invalidation has its id and a number.
            for id in {report.id, report.id.rpartition(".")[0]}:
                for wait in self._waits.get((namespace, id), ()):
                    wait.record_report(reports.replica, report)
        for answer in reports.answers:
            if (recorder := self._queries.get((namespace, answer.id))) is not None:
                recorder.record(reports.replica, answer)
