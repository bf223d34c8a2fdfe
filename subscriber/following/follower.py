"""The follower: follows some namespaces over one link at a time, for as long as the subscriber runs.

It connects, subscribes and recovers. It then stays coherent by proving at intervals that the link delivers. When the
link is lost it starts again. It never reports coherence that it has not proven.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Iterable
from typing import Final, NoReturn

from ...shared.clock import Clock
from ...shared.errors import LinkLost, LogRefused, NotPrimary
from ...shared.invalidation import Invalidation
from ...shared.process.backoff import Backoff
from ...shared.receipt import Receipt
from ...shared.transport.redis.link import Link, RedisAddress
from ...shared.transport.redis.log import Identity, append, echo, read_head
from ..cache.local_cache import LocalCache
from .answerer import Answerer
from .channels import Channels
from .identity import IdentityReader
from .log_reader import LogReader
from .presence import PresencePublisher, Registration
from .reporter import Reporter
from .sequencer import Mark, Sequencer
from .settings import Timing
from .state import Events, State

__all__ = ["Follower"]

_log = logging.getLogger("broadcache.subscriber")

_BACKOFF_SECONDS_MIN: Final = 0.1
_GAP_PAUSE_SECONDS: Final = 0.02
"""The least time between two reads of the log because of gaps: any client may claim positions that the log lacks."""
_PRESENCE_SECONDS_MAX: Final = 86_400.0
_ECHO_NAMESPACES_MAX: Final = 64
"""The most namespaces of one echo: its script holds the server for about a millisecond."""


class Follower:
    """Keeps the caches of its namespaces coherent, over a link of its own.

    Namespaces may be added and removed while it runs: `add` and `remove`. It must not run without any.

    Shape:  `on_change` is called, without arguments, when dead entries may be left to sweep. `echoes` counts proofs of
            coherence, `subscriptions` how often it subscribed again, `lost` how often it had no link.
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
        events: Events,
    ) -> None:
        self.state: State = "closed"
        self.link: Link | None = None
        self.echoes: int = 0
        self.subscriptions: int = 0
        self.lost: int = 0
        self._address = address
        self._sequencers: dict[str, Sequencer] = {}
        self._replica_id = replica_id
        self._timing = timing
        self._backoff = Backoff(_BACKOFF_SECONDS_MIN, timing.backoff_seconds_max)
        self._clock = clock
        self._uniform = uniform
        self._on_change = on_change
        self._events = events
        self._of_channel: dict[bytes, Sequencer] = {}
        self._of_question: dict[bytes, Sequencer] = {}
        # The namespaces that are subscribed to over the current link, and have resumed from the log.
        self._resumed: set[str] = set()
        self._server: Identity | None = None
        self._probe = b""
        # When the next echo is due, and when the log was last read because of gaps.
        self._echo_due_at = 0.0
        self._gaps_checked_at = 0.0
        # The namespaces of the current echo, and the position of each when the probe arrived.
        self._probed: dict[str, Sequencer] = {}
        self._marks: dict[str, Mark] = {}
        self._identities = IdentityReader()
        self._channels = Channels(replica_id, timeout_seconds=timing.echo_timeout_seconds)
        self._reporter = Reporter(replica_id)
        self._answerer = Answerer(replica_id)
        self._log_reader = LogReader(reporter=self._reporter, timing=timing, clock=clock, on_change=on_change)
        self._presence_publisher = PresencePublisher(replica_id)
        self._registration = Registration(replica_id, clock)
        self._has_work = asyncio.Event()
        self._has_probe = asyncio.Event()
        self._is_coherent = asyncio.Event()

    @property
    def namespaces(self) -> tuple[str, ...]:
        """The followed namespaces."""
        return tuple(self._sequencers)

    @property
    def caches(self) -> list[LocalCache]:
        """The caches of all followed namespaces."""
        return [cache for sequencer in self._sequencers.values() for cache in sequencer.caches]

    def add(self, sequencer: Sequencer) -> None:
        """Follow one more namespace, or one that has a new cache."""
        self._sequencers[sequencer.namespace] = sequencer
        names = self._address.names_of(sequencer.namespace)
        self._of_channel[names.channel.encode()] = sequencer
        self._of_question[names.question.encode()] = sequencer
        if self.state == "coherent":
            self._enter("recovering")
        self._has_work.set()

    def remove(self, namespace: str) -> None:
        """Stop following a namespace."""
        del self._sequencers[namespace]
        names = self._address.names_of(namespace)
        del self._of_channel[names.channel.encode()], self._of_question[names.question.encode()]
        self._resumed.discard(namespace)
        self._has_work.set()

    def again(self, replica_id: str) -> "Follower":
        """Return a follower of the same namespaces for the next event loop: an event belongs to one loop.

        It may replay from the server that this one followed last.
        """
        follower = Follower(
            self._address,
            replica_id=replica_id,
            timing=self._timing,
            clock=self._clock,
            uniform=self._uniform,
            on_change=self._on_change,
            events=self._events,
        )
        follower.echoes, follower.subscriptions, follower.lost = self.echoes, self.subscriptions, self.lost
        follower._server, follower._registration = self._server, self._registration.again(replica_id)
        for sequencer in self._sequencers.values():
            follower.add(sequencer)
        return follower

    def abandon(self) -> None:
        """Change nothing any more: in a forked child, in which the parent's tasks must not act on its caches."""
        self._sequencers, self._of_channel, self._of_question = {}, {}, {}
        self._on_change = _do_nothing

    async def wait_coherent(self) -> None:
        """Wait until every namespace is proven coherent over the current link."""
        await self._is_coherent.wait()

    async def publish(self, invalidation: Invalidation, *, timeout_seconds: float) -> Receipt:
        """Append an invalidation of this replica's own, over the current link or a later one.

        Raises: LinkLost when it could not be published within `timeout_seconds`, or may not have been; LogRefused.
        """
        last: LinkLost | NotPrimary | None = None
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    await self.wait_coherent()
                    if (link := self.link) is None:
                        await asyncio.sleep(0)
                        continue
                    try:
                        return await append(link, invalidation, receipt_seconds=2 * timeout_seconds)
                    except LinkLost as error:
                        last = error
                        await asyncio.sleep(0)
                    except NotPrimary as error:
                        # The next echo would find this too, up to a second later.
                        last = last if isinstance(last, LinkLost) else error
                        await link.close()
                    except LogRefused as error:
                        if isinstance(last, LinkLost):
                            raise LinkLost(f"{last}; and then: {error}") from error
                        raise
        except TimeoutError:
            why = f": {last}" if last else "; there is no link to Redis"
            raise LinkLost(
                f"expected to publish within {timeout_seconds:g} s, could not{why}; this replica has dropped its "
                "entries, the other replicas may not have: publish again, which is harmless if they have"
            ) from last

    async def follow_for_ever(self) -> NoReturn:
        """Follow, over one link after another. Ends only by being cancelled."""
        failures, part = 0, self.namespaces[0]
        while True:
            echoes_before = self.echoes
            try:
                await self._follow(part)
            except asyncio.CancelledError:
                self._events.outages.forget(part)
                raise
            except Exception as error:  # noqa: BLE001  (the outermost task: a replica must survive our mistakes)
                self._events.outages.record_failure(part, error, namespaces_count=len(self._sequencers))
            self.lost += 1
            # A link that has carried more than the first echo was a good one: count failures from the start.
            failures = 1 if self.echoes > echoes_before + 1 else failures + 1
            await asyncio.sleep(self._backoff.seconds(failures, self._uniform))

    async def _follow(self, part: str) -> NoReturn:
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
            # Only the echo proves it: the log may have been read from a server that is no longer a primary.
            await self._echo(link, server)
            self._server = server
            self.subscriptions += 1
            self.link = link
            self._events.record_coherent(part, self.namespaces, link.label)
            while True:
                await self._pause(link)
                await self._resume(link, is_same_server=True)
                for sequencer in tuple(self._sequencers.values()):
                    await self._log_reader.catch_up(link, sequencer)
                if link.lost.done():
                    raise link.lost.result()
                if self.state != "coherent" or self._clock() >= self._echo_due_at:
                    await self._echo(link, server)
        except asyncio.CancelledError:
            self.leave("lost")
            for cache in self.caches:  # first of all: a replica that is not registered must not serve
                cache.leave()
            await self._registration.withdraw(link, self._registration.namespaces)
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
        """Subscribe, and catch up with the invalidations published since the last subscription ended."""
        server = await self._identities.read(link, timeout_seconds=self._timing.echo_timeout_seconds)
        self._channels.begin()
        self._presence_publisher.forget()
        self._resumed = set()
        if not server.is_known or server != self._server:
            # Until an echo has proven the new server, positions belong to neither.
            self._server = None
        for sequencer in self._sequencers.values():
            sequencer.rewind()
        await self._resume(link, is_same_server=self._server is not None)
        return server

    async def _resume(self, link: Link, *, is_same_server: bool) -> None:
        """Subscribe to namespaces that are not subscribed to yet, and catch up with what was published before.

        The log has the missed invalidations, if it is still the same log of the same server and goes back far enough.
        Otherwise everything is dropped, and the missed invalidations no longer matter.
        """
        await self._subscribe(link)
        for namespace, sequencer in tuple(self._sequencers.items()):
            if namespace in self._resumed or not self._channels.carries(link, namespace):
                continue
            async with link.within(self._timing.echo_timeout_seconds):
                newest = await read_head(link, namespace)
            reason = sequencer.resume(newest, is_same_server=is_same_server)
            if reason is not None:
                sequencer.restart(newest, reason)
            await self._log_reader.catch_up(link, sequencer)
            if self._sequencers.get(namespace) is sequencer:
                self._resumed.add(namespace)

    async def _subscribe(self, link: Link) -> None:
        """Subscribe to the channels of the followed namespaces, and withdraw from those followed no longer."""
        namespaces = self.namespaces
        await self._channels.follow(link, namespaces)
        if gone := self._registration.namespaces.difference(namespaces):
            self._presence_publisher.forget(gone)
            await self._registration.withdraw(link, gone)

    async def _pause(self, link: Link) -> None:
        """Wait until the next echo is due, a gap or a new namespace needs work, or the link is lost."""
        self._has_work.clear()
        if link.lost.done() or self.state != "coherent":
            return
        if not self._is_behind:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._echo_due_at - self._clock())):
                    await self._has_work.wait()
        if self._is_behind:
            # Any client may claim positions that the log lacks: such claims must not set the pace.
            await asyncio.sleep(max(0.0, self._gaps_checked_at + _GAP_PAUSE_SECONDS - self._clock()))
            self._gaps_checked_at = self._clock()

    @property
    def _is_behind(self) -> bool:
        return any(sequencer.is_behind for sequencer in self._sequencers.values())

    async def _echo(self, link: Link, server: Identity) -> None:
        """Prove everything accepted until now in the namespaces that have resumed, with an echo for some at a time."""
        sent_at = self._clock()
        namespaces = [each for each in self._sequencers if each in self._resumed]
        if not namespaces:
            return
        self._presence_publisher.begin_echo(len(namespaces))
        caches: list[LocalCache] = []
        for start in range(0, len(namespaces), _ECHO_NAMESPACES_MAX):
            caches += await self._echo_some(link, server, namespaces[start : start + _ECHO_NAMESPACES_MAX])
        self.echoes += 1
        self._echo_due_at = self._clock() + self._timing.echo_interval_seconds * (0.9 + 0.2 * self._uniform())
        self._confirm(sent_at, caches)
        self._events.log_clears()

    async def _echo_some(self, link: Link, server: Identity, namespaces: Iterable[str]) -> list[LocalCache]:
        """Send this replica a probe through the publish path, and compare the applied positions with the heads.

        A link delivers in the order in which the server acted, and every frame that arrives is applied. So when the
        probe is back, every invalidation accepted before the echo was sent has been applied, unless the log has
        another history than the channel.

        Returns: the caches that this proves.
        """
        # Namespaces and caches that are added while the echo is under way are proven by the next one.
        probed = {each: self._sequencers[each] for each in namespaces if each in self._resumed}
        if not probed:  # they have been removed since
            return []
        caches = [cache for sequencer in probed.values() for cache in sequencer.caches]
        self._probed, self._marks = probed, {}
        self._probe = secrets.token_hex(8).encode()
        self._has_probe.clear()
        presence_seconds = self._presence_seconds
        self._registration.namespaces.update(probed)
        async with link.within(self._timing.echo_timeout_seconds):
            heads = await echo(
                link,
                tuple(probed),
                probe_channel=self._channels.echo,
                replica_id=self._replica_id,
                probe=self._probe.decode(),
                life=self._registration.life,
                marks=(marks := [self._registration.marks(each, presence_seconds) for each in probed.values()]),
                presences=self._presence_publisher.publish(
                    probed.values(),
                    namespaces=self.namespaces,
                    state=self.state,
                    lifetime_seconds=presence_seconds,
                    lag_ms=self._reporter.lag_ms,
                    life=self._registration.life,
                    conflict=self._registration.conflict,
                ),
                presence_seconds=presence_seconds,
            )
            await self._has_probe.wait()
            if link.lost.done():
                raise link.lost.result()
        if heads.replication_id != server.replication_id:
            raise LinkLost(f"{link.label} was demoted or promoted: invalidations that it had accepted may be lost")
        self._registration.record_refusal(heads.complaint)
        self._registration.record_marks(probed.values(), [] if heads.complaint else marks)
        # Another process with this id is seen, and sees this one, only by presences that are written.
        self._presence_publisher.forget({*heads.unpublished, *self._registration.record(probed, heads.others)})
        for namespace, sequencer in probed.items():
            mark, newest = self._marks[namespace], heads.anchors[namespace]
            reason = sequencer.compare(mark, newest)
            if reason is not None:
                sequencer.restart(newest, reason)
            elif await self._log_reader.catch_up(link, sequencer):
                sequencer.prove(mark, newest)
        return caches

    @property
    def _presence_seconds(self) -> float:
        """How long this replica is listed after an echo.

        As long as its caches may serve reads because of that echo: a replica that is not listed serves none.
        """
        two_echoes_seconds = 2 * self._timing.echo_interval_seconds + self._timing.echo_timeout_seconds
        bound_seconds = max((cache.max_staleness_seconds for cache in self.caches), default=0.0)
        return min(_PRESENCE_SECONDS_MAX, max(two_echoes_seconds, bound_seconds))

    def _confirm(self, as_of: float, caches: Iterable[LocalCache]) -> None:
        """Renew the lease of `caches`, those of the echoes, as far as they are still followed."""
        followed = set(self.caches)
        for cache in caches:
            if cache in followed:
                cache.confirm_coherent(as_of)
        if self._is_whole and followed.issubset(caches):
            self._enter("coherent")

    def leave(self, state: State) -> None:
        """Bypass the caches, because the follower has no link, or is about to close it."""
        self.link = None
        for cache in self.caches:
            cache.disconnect()
        self._enter(state)

    @property
    def _is_whole(self) -> bool:
        """Whether every namespace has resumed over the current link."""
        return self._resumed == self._sequencers.keys()

    def _enter(self, state: State) -> None:
        """Change the state and report it. The caches have to be up to date already: `on_change` may read them."""
        self.state = state
        if state == "coherent":
            self._is_coherent.set()
        else:
            self._is_coherent.clear()
        self._on_change()

    def _on_loss(self, _: object) -> None:
        """Wake the tasks that wait for a message: none will arrive."""
        self._has_work.set()
        self._has_probe.set()

    def _receive(self, channel: bytes, frame: bytes) -> None:
        sequencer = self._of_channel.get(channel)
        if sequencer is None:
            if (questioned := self._of_question.get(channel)) is not None:
                self._answerer.receive(questioned, frame)
            elif frame == self._probe and not self._has_probe.is_set():
                # Now, because a frame behind the probe was published after the heads were read.
                self._marks = {namespace: each.mark() for namespace, each in self._probed.items()}
                self._has_probe.set()
        elif sequencer.receive(frame):
            if sequencer.reports:
                self._reporter.record(sequencer)
            self._on_change()
            if sequencer.is_behind:
                self._has_work.set()


def _do_nothing() -> None:
    pass
