"""The follower: follows some namespaces over one link, for as long as the subscriber lives.

Connect, subscribe, recover, stay coherent by proving again and again that the link delivers, lose the link, and begin
again. What it cannot prove it does not claim.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn, TypeAlias, TypeVar

from ...shared.clock import Clock
from ...shared.errors import BroadcacheError, LinkLost, LogRefused
from ...shared.process.backoff import backoff_seconds
from ...shared.transport.redis.link import Link, RedisAddress, Refused
from ...shared.transport.redis.log import (
    Entry,
    Identity,
    echo,
    echo_channel_of,
    identity,
    names_of,
    read_from,
    read_head,
)
from ...shared.transport.redis.registry import withdraw
from ..cache.local_cache import LocalCache
from .answerer import Answerer
from .presence import PresencePublisher
from .reporter import Reporter
from .sequencer import Mark, Sequencer

__all__ = ["Follower", "State", "Timing"]

T = TypeVar("T")
State: TypeAlias = Literal["connecting", "recovering", "coherent", "lost", "closed"]

_log = logging.getLogger("broadcache.subscriber")

_BACKOFF_SECONDS_MIN: Final = 0.1
_PAGE_ENTRIES_MIN: Final = 2
"""The entries of a replay page: the one at the replica's own position, and at least one more."""
_PAGE_ENTRIES_FIRST: Final = 16
_PAGE_ENTRIES_MAX: Final = 256
_PAGE_SECONDS_AIMED_AT: Final = 0.1
_PAGE_SECONDS_MAX: Final = 60.0
"""The longest that one page may take while bytes arrive. The next link is asked for half as many entries."""
_PAGES_WITHOUT_PROGRESS_MAX: Final = 8
_GAP_PAUSE_SECONDS: Final = 0.02
"""The least time between two looks into the log for what frames claim: anyone may claim what the log does not have."""
_WITHDRAW_SECONDS: Final = 0.25
_PRESENCE_SECONDS_MAX: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Timing:
    """How often, and how long. What each number is for: `Subscriber`."""

    echo_interval_seconds: float
    echo_timeout_seconds: float
    connect_timeout_seconds: float
    backoff_seconds_max: float


class Follower:
    """Keeps the caches of its namespaces coherent, over a link of its own.

    Namespaces may come and go meanwhile: `add` and `remove`. One without namespaces must not be running.

    Shape:  `on_change` is called, without arguments, when dead entries may be left to sweep. `echoes` counts proofs of
            coherence, `subscriptions` how often it subscribed anew, `lost` how often it had no link.
    """

    def __init__(
        self,
        address: RedisAddress,
        *,
        replica_id: str,
        timing: Timing,
        clock: Clock,
        uniform: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self.state: State = "closed"
        self.link: Link | None = None
        self.echoes = 0
        self.subscriptions = 0
        self.lost = 0
        self._address = address
        self._sequencers: dict[str, Sequencer] = {}
        self._replica_id = replica_id
        self._timing = timing
        self._clock = clock
        self._uniform = uniform
        self._on_change = on_change
        self._of_channel: dict[bytes, Sequencer] = {}
        self._of_question: dict[bytes, Sequencer] = {}
        # What the server has confirmed on the link that there is, and the namespaces whose position it has told.
        self._subscribed: set[str] = set()
        self._resumed: set[str] = set()
        # The same for the channels on which replicas are asked; what was refused is not tried again on the same link.
        self._asked_on: set[str] = set()
        self._not_asked_on: set[str] = set()
        self._server: Identity | None = None
        self._probe = b""
        self._echo_channel = ""
        # When the next echo is due, and when the log was last looked into for what frames claim.
        self._echo_due_at = 0.0
        self._looked_at = 0.0
        # The namespaces that the echo under way asks about, and where each was when its probe was handled.
        self._asked: dict[str, Sequencer] = {}
        self._marks: dict[str, Mark] = {}
        self._has_warned_of_identity = False
        # How many entries the next replay page asks for. Links come and go; how fast they are changes less.
        self._page_entries = _PAGE_ENTRIES_FIRST
        self._presence_publisher = PresencePublisher(replica_id)
        self._reporter = Reporter(replica_id)
        self._answerer = Answerer(replica_id)
        # The namespaces in which others may find this replica, and what last kept it from being found.
        self._present: set[str] = set()
        self._complaint = ""
        self._has_news = asyncio.Event()
        self._has_probe = asyncio.Event()
        self._is_coherent = asyncio.Event()

    @property
    def namespaces(self) -> tuple[str, ...]:
        """The namespaces that it follows."""
        return tuple(self._sequencers)

    @property
    def caches(self) -> list[LocalCache]:
        """The caches of all its namespaces."""
        return [cache for sequencer in self._sequencers.values() for cache in sequencer.caches]

    def add(self, sequencer: Sequencer) -> None:
        """Follow one more namespace, or one whose caches have become more, from now on."""
        self._sequencers[sequencer.namespace] = sequencer
        names = names_of(sequencer.namespace)
        self._of_channel[names.channel.encode()] = sequencer
        self._of_question[names.question.encode()] = sequencer
        if self.state == "coherent":
            self._enter("recovering")
        self._has_news.set()

    def remove(self, namespace: str) -> None:
        """Follow one namespace less."""
        del self._sequencers[namespace]
        names = names_of(namespace)
        del self._of_channel[names.channel.encode()], self._of_question[names.question.encode()]
        self._resumed.discard(namespace)
        self._has_news.set()

    def prepare(self) -> None:
        """Get ready to follow in whichever event loop comes next."""
        # Events belong to the event loop that first waits for them, and the next life may have another.
        self._has_news = asyncio.Event()
        self._has_probe = asyncio.Event()
        self._is_coherent = asyncio.Event()
        self._reporter.prepare()
        self._answerer.prepare()

    async def wait_coherent(self) -> None:
        """Wait until every namespace has been proven coherent over the link that there is."""
        await self._is_coherent.wait()

    async def follow_for_ever(self) -> NoReturn:
        """Follow, over one link after the other. Ends only by being cancelled."""
        failures = 0
        while True:
            echoes_before = self.echoes
            try:
                await self._follow()
            except BroadcacheError as error:
                # One line an outage, not one an attempt.
                is_news = self.echoes != echoes_before or not failures
                _log.log(logging.WARNING if is_news else logging.DEBUG, "caches bypassed: %s", error)
            except Exception:  # noqa: BLE001  (the outermost task: a replica must outlive our mistakes)
                _log.exception("caches bypassed: an error of our own, please report it")
            self.lost += 1
            # A link that has carried more than the first echo was a good one: the next attempt is the first again.
            failures = 1 if self.echoes > echoes_before + 1 else failures + 1
            await asyncio.sleep(
                backoff_seconds(
                    failures,
                    seconds_min=_BACKOFF_SECONDS_MIN,
                    seconds_max=self._timing.backoff_seconds_max,
                    uniform=self._uniform,
                )
            )

    async def _follow(self) -> NoReturn:
        """Follow the namespaces over one link, until it is lost. Raises: BroadcacheError."""
        self._enter("connecting")
        link = await Link.open(
            self._address,
            client_name=f"broadcache:{self._replica_id}",
            timeout_seconds=self._timing.connect_timeout_seconds,
            on_message=self._receive,
        )
        reporting = [
            asyncio.create_task(self._reporter.send_for_ever(link), name="broadcache report"),
            asyncio.create_task(self._answerer.answer_for_ever(link), name="broadcache answer"),
        ]
        try:
            link.lost.add_done_callback(self._on_loss)
            self._enter("recovering")
            server = await self._recover(link)
            # Only now: what the log has told may have been told by a server that is no primary any more.
            await self._echo(link, server)
            self._server = server
            self.subscriptions += 1
            self.link = link
            _log.info("coherent: subscribed to %s at %s", ", ".join(self._sequencers), link.label)
            while True:
                await self._pause(link)
                await self._resume(link, is_same_server=True)
                for sequencer in tuple(self._sequencers.values()):
                    await self._catch_up(link, sequencer)
                if link.lost.done():
                    raise link.lost.result()
                if self.state != "coherent" or self._clock() >= self._echo_due_at:
                    await self._echo(link, server)
        except asyncio.CancelledError:
            self.leave("lost")
            await self._withdraw(link, self._present)
            raise
        finally:
            self.leave("lost")
            for task in reporting:
                task.cancel()
            try:
                await link.close()
            finally:
                await asyncio.wait(reporting)

    async def _recover(self, link: Link) -> Identity:
        """Subscribe, and catch up with what was published since the last subscription ended."""
        server = await self._identity(link)
        self._subscribed = set()
        self._asked_on, self._not_asked_on = set(), set()
        self._resumed = set()
        if not server.is_known or server != self._server:
            # Until an echo has proven the other one, positions are of neither.
            self._server = None
        for sequencer in self._sequencers.values():
            sequencer.rewind()
        await self._resume(link, is_same_server=self._server is not None)
        return server

    async def _identity(self, link: Link) -> Identity:
        """Return which server answers, as far as it tells: one that is not known is equal to none."""
        refusal: LogRefused | None = None
        server = Identity("", "")
        try:
            async with link.within(self._timing.echo_timeout_seconds):
                server = await identity(link)
        except LogRefused as error:
            refusal = error
        if not server.is_known and not self._has_warned_of_identity:
            self._has_warned_of_identity = True
            _log.warning(
                "a restart of %s cannot be told from a lost connection, so the caches are cleared with each new "
                "subscription: expected INFO to have run_id and master_replid, got: %s",
                link.label,
                refusal or "neither or one of them",
            )
        return server

    async def _resume(self, link: Link, *, is_same_server: bool) -> None:
        """Subscribe to what is to be followed and is not yet, and catch up with what was published before.

        The log tells what was missed, if it is still the same log of the same server and reaches back. Otherwise
        everything is dropped, and what was missed no longer matters.
        """
        await self._subscribe(link)
        for namespace, sequencer in tuple(self._sequencers.items()):
            if namespace in self._resumed or names_of(namespace).channel not in self._subscribed:
                continue
            async with link.within(self._timing.echo_timeout_seconds):
                newest = await read_head(link, namespace)
            reason = sequencer.resume(newest, is_same_server=is_same_server)
            if reason is not None:
                sequencer.restart(newest, reason)
            await self._catch_up(link, sequencer)
            if self._sequencers.get(namespace) is sequencer:
                self._resumed.add(namespace)

    async def _subscribe(self, link: Link) -> None:
        """Have the link carry the channels of the namespaces that are followed, and no others."""
        namespaces = self.namespaces
        wanted = {names_of(namespace).channel for namespace in namespaces}
        self._echo_channel = echo_channel_of(namespaces[0], self._replica_id)
        wanted.add(self._echo_channel)
        try:
            async with link.within(self._timing.echo_timeout_seconds):
                if missing := wanted - self._subscribed:
                    await link.subscribe(*missing)
                if too_many := self._subscribed - wanted:
                    await link.unsubscribe(*too_many)
        except Refused as refusal:
            raise LinkLost(f"expected {link.label} to let this user subscribe, got: {refusal}") from refusal
        self._subscribed = wanted
        await self._listen_for_questions(link, {names_of(namespace).question for namespace in namespaces})
        if gone := self._present.difference(namespaces):
            await self._withdraw(link, gone)

    async def _listen_for_questions(self, link: Link, wanted: set[str]) -> None:
        """Have the link carry the channels on which this replica is asked, as far as it may.

        To be asked is a courtesy. That a user may not must not cost a replica its link.
        """
        missing, too_many = wanted - self._asked_on - self._not_asked_on, self._asked_on - wanted
        if not missing and not too_many:
            return
        changes = [
            *((link.subscribe, channel) for channel in missing),
            *((link.unsubscribe, each) for each in too_many),
        ]
        async with link.within(self._timing.echo_timeout_seconds):
            # Each by itself: a user may have the right to one and not to another.
            results = await asyncio.gather(*(change(channel) for change, channel in changes), return_exceptions=True)
        refusals = {channel: result for (_, channel), result in zip(changes, results, strict=True) if result}
        for refusal in refusals.values():
            if not isinstance(refusal, Refused):
                raise refusal
        self._not_asked_on |= refusals.keys()
        self._asked_on = wanted - self._not_asked_on
        if refusals:
            reasons = "; ".join({str(refusal) for refusal in refusals.values()})
            _log.warning("expected %s to let this user hear what is asked, got: %s", link.label, reasons)

    async def _withdraw(self, link: Link, namespaces: Iterable[str]) -> None:
        """Have nobody expect this replica any more, if that can be had at once; else it disappears by itself."""
        gone = tuple(namespaces)
        self._present.difference_update(gone)
        if not gone or link.lost.done():
            return
        try:
            async with asyncio.timeout(_WITHDRAW_SECONDS):
                await withdraw(link, gone, self._replica_id)
        except (BroadcacheError, TimeoutError) as error:
            _log.info("%s is listed until its presence ends: %s", self._replica_id, str(error) or "no answer in time")

    async def _catch_up(self, link: Link, sequencer: Sequencer) -> bool:
        """Apply from the log what did not come over the channel; drop everything if the log no longer holds it.

        Returns: False when everything was dropped.
        """
        least, pages_without_progress = sequencer.backlog, 0
        while sequencer.is_behind:
            claimed, count = sequencer.claimed, self._page_entries
            reason = "log trimmed"
            entries: list[Entry] = []
            try:
                entries = await self._page(link, sequencer.namespace, sequencer.sequence)
            except LogRefused as refusal:  # e.g. another type stands in its place
                _log.warning("the log of namespace %s cannot be read: %s", sequencer.namespace, refusal)
                reason = "log unreadable"
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
                break  # what is claimed beyond the end is looked for with the next echo
        return True

    async def _page(self, link: Link, namespace: str, sequence: int) -> list[Entry]:
        """Read the next page of the log, and learn from it how large the one after it should be.

        It may take as long as it needs while bytes arrive: only silence is a reason to give the link up.
        """
        count, began_at = self._page_entries, self._clock()
        self._page_entries = max(_PAGE_ENTRIES_MIN, count // 2)  # for the next link, should this one be lost by it
        try:
            async with asyncio.timeout(_PAGE_SECONDS_MAX):
                entries = await _while_heard(
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
        """Drop everything, and go on from the head that the log has now."""
        async with link.within(self._timing.echo_timeout_seconds):
            newest = await read_head(link, sequencer.namespace)
        sequencer.restart(newest, reason)

    async def _pause(self, link: Link) -> None:
        """Wait until the next echo is due, or until there is something to catch up with, or the link is lost."""
        self._has_news.clear()
        if link.lost.done() or self.state != "coherent":
            return
        if not self._is_behind:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._echo_due_at - self._clock())):
                    await self._has_news.wait()
        if self._is_behind:
            # Any client may claim what the log does not have: that must not set the pace.
            await asyncio.sleep(max(0.0, self._looked_at + _GAP_PAUSE_SECONDS - self._clock()))
            self._looked_at = self._clock()

    @property
    def _is_behind(self) -> bool:
        return any(sequencer.is_behind for sequencer in self._sequencers.values())

    async def _echo(self, link: Link, server: Identity) -> None:
        """Send this replica a probe through the publish path, and compare what is applied with the heads.

        Everything on a link arrives in the order in which the server did it, and all that arrives is applied. So when
        the probe is back, all that was accepted before the question was asked has been applied; unless the log tells
        another history than what came over the channel.
        """
        asked_at = self._clock()
        # Others may come while the answer is under way, namespaces as well as caches: the next echo is theirs.
        asked = {namespace: each for namespace, each in self._sequencers.items() if namespace in self._resumed}
        if not asked:
            return
        caches = [cache for sequencer in asked.values() for cache in sequencer.caches]
        self._asked, self._marks = asked, {}
        self._probe = secrets.token_hex(8).encode()
        self._has_probe.clear()
        presence_seconds = self._presence_seconds
        self._present.update(asked)
        async with link.within(self._timing.echo_timeout_seconds):
            heads = await echo(
                link,
                tuple(asked),
                probe_channel=self._echo_channel,
                replica_id=self._replica_id,
                probe=self._probe.decode(),
                presences=[self._presence(each, presence_seconds) for each in asked.values()],
                presence_seconds=presence_seconds,
            )
            await self._has_probe.wait()
            if link.lost.done():
                raise link.lost.result()
        if heads.replication_id != server.replication_id:
            raise LinkLost(f"{link.label} was demoted, or promoted: what it had accepted may be lost")
        self._note_complaint(heads.complaint)
        for namespace, sequencer in asked.items():
            mark, newest = self._marks[namespace], heads.anchors[namespace]
            reason = sequencer.compare(mark, newest)
            if reason is not None:
                sequencer.restart(newest, reason)
            elif await self._catch_up(link, sequencer):
                sequencer.prove(mark, newest)
        self.echoes += 1
        self._echo_due_at = self._clock() + self._timing.echo_interval_seconds * (0.9 + 0.2 * self._uniform())
        self._confirm(asked_at, caches)

    @property
    def _presence_seconds(self) -> float:
        """How long this replica is listed after an echo.

        As long as the echo may be used to serve reads: who is not listed any more serves nothing from its caches.
        """
        two_echoes_seconds = 2 * self._timing.echo_interval_seconds + self._timing.echo_timeout_seconds
        bound_seconds = max((cache.max_staleness_seconds for cache in self.caches), default=0.0)
        return min(_PRESENCE_SECONDS_MAX, max(two_echoes_seconds, bound_seconds))

    def _presence(self, sequencer: Sequencer, lifetime_seconds: float) -> bytes:
        """What others can read of this replica while it lives."""
        return self._presence_publisher.publish(
            sequencer,
            namespaces=self.namespaces,
            state=self.state,
            lifetime_seconds=lifetime_seconds,
            lag_ms=self._reporter.lag_ms(sequencer.namespace),
        )

    def _note_complaint(self, complaint: str) -> None:
        """Log, once, why others do not see this replica."""
        if complaint != self._complaint and complaint:
            _log.warning("expected Redis to list replica %s, got: %s", self._replica_id, complaint)
        self._complaint = complaint

    def _confirm(self, as_of: float, caches: Iterable[LocalCache]) -> None:
        """Renew the lease of `caches`, as far as they are still followed: those for which the echo was sent."""
        followed = set(self.caches)
        for cache in caches:
            if cache in followed:
                cache.confirm_coherent(as_of)
        if self._is_whole and followed.issubset(caches):
            self._enter("coherent")

    def leave(self, state: State) -> None:
        """Bypass the caches: there is no link, or it is not to be used any more."""
        self.link = None
        for cache in self.caches:
            cache.disconnect()
        self._enter(state)

    @property
    def _is_whole(self) -> bool:
        """Whether every namespace is followed over the link that there is."""
        return self._resumed == self._sequencers.keys()

    def _enter(self, state: State) -> None:
        """Be in `state`, and tell: the caches have to be in it already, since whoever hears of it may look at them."""
        self.state = state
        if state == "coherent":
            self._is_coherent.set()
        else:
            self._is_coherent.clear()
        self._on_change()

    def _on_loss(self, _: object) -> None:
        """Wake up whoever waits for what can no longer come."""
        self._has_news.set()
        self._has_probe.set()

    def _receive(self, channel: bytes, frame: bytes) -> None:
        sequencer = self._of_channel.get(channel)
        if sequencer is None:
            if (asked := self._of_question.get(channel)) is not None:
                self._answerer.receive(asked, frame)
            elif frame == self._probe and not self._has_probe.is_set():
                # Here, because what comes behind the probe was published after the heads were read.
                self._marks = {namespace: each.mark() for namespace, each in self._asked.items()}
                self._has_probe.set()
        elif sequencer.receive(frame):
            if sequencer.reports:
                self._reporter.record(sequencer)
            self._on_change()
            if sequencer.is_behind:
                self._has_news.set()


async def _while_heard(link: Link, answer: Coroutine[Any, Any, T], seconds: float) -> T:
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
