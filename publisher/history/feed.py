"""Follows the invalidations of a namespace: live, and from the log after an interruption of the link."""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, Protocol, TypeVar

import msgspec

from ...shared.errors import LinkLost, LogRefused, MalformedFrame
from ...shared.invalidation import Invalidation, Position, check_namespace
from ...shared.process.backoff import Backoff
from ...shared.transport.redis.address import RedisAddress, address_of
from ...shared.transport.redis.link import Link, Refused
from ...shared.transport.redis.log import head, read_after
from ...shared.wire import decode
from .replay import BEFORE_THE_FIRST, Gap, read_missed

__all__ = ["Feed", "FeedObserver"]

T = TypeVar("T")

_ANSWER_SECONDS: Final = 2.0
_PING_INTERVAL_SECONDS: Final = 1.0
_BACKOFF: Final = Backoff(seconds_min=0.1, seconds_max=5.0)
_WAITING_BYTES_MAX: Final = 16 * 2**20
"""The limit on received frames that wait for the observer. Beyond it the link is closed, and the log is read."""
_WAITING_FRAME_BYTES: Final = 200
"""The approximate overhead of a frame in memory."""
_SLICE_FRAMES: Final = 100
"""How many frames are processed before other tasks on the event loop run."""
_UNREADABLE_REMEMBERED: Final = 100


class FeedObserver(Protocol):
    """Receives the invalidations of a namespace: in the order of the log, each entry once."""

    def on_invalidation(self, invalidation: Invalidation) -> None:
        """Receive an invalidation. Its `position` is None when it was published without the log."""

    def on_unreadable(self, frame: bytes, error: MalformedFrame, position: Position | None = None) -> None:
        """Receive a frame that is no invalidation, for which replicas drop everything. `position` is its place in the
        log, if it has one."""

    def on_gap(self, gap: Gap) -> None:
        """Invalidations were missed, or may have been, and the log does not have them."""

    def on_link(self, label: str) -> None:
        """The link is open: first the missed entries of the log follow, then live messages."""

    def on_lost(self, error: LinkLost) -> None:
        """The link is lost. Called once per outage."""


class Feed:
    """Follows one namespace until cancelled, over links of its own. It replaces a link that is lost or silent.

    Each new link subscribes first, and then reads from the log what came after the last reported entry.

    Shape:  `position` is that of the last reported entry; None until the head of the log is known.
            `link` is the current link; None during an outage. `prefix` begins the names in Redis, as for a Publisher.
    Units:  with `since_ms`, a publisher's Unix clock in milliseconds, it begins with the entries of the log that were
            sent since then; without, with what is published from now on.
    """

    def __init__(
        self,
        redis_url: str | RedisAddress,
        namespace: str,
        *,
        since_ms: int | None = None,
        prefix: str | None = None,
        client_name: str = "broadcache:watch",
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self.namespace: Final = check_namespace(namespace)
        self.position: Position | None = None
        self.link: Link | None = None
        self._address = address_of(redis_url, prefix=prefix).of(namespace)
        self._since_ms = since_ms
        # The head when following began: entries up to it that were sent before `since_ms` are not reported.
        self._first_head: Position | None = None
        self._client_name = client_name
        self._uniform = uniform
        self._last_id = ""
        self._unreadable_live = _Remembered()
        self._unreadable_logged = _Remembered()

    async def follow(self, observer: FeedObserver) -> None:
        """Report everything to `observer`, until cancelled. An error that the observer raises ends it."""
        failures = 0
        is_lost = False
        while True:
            try:
                async with self._subscribed() as arrivals:
                    newest = await _answered(arrivals.link, head(arrivals.link, self.namespace))
                    if self.position is None:
                        await self._begin(arrivals.link, newest, observer)
                    self.link = arrivals.link
                    is_lost = False
                    observer.on_link(arrivals.link.label)
                    await self._catch_up(arrivals.link, newest, observer)
                    failures = 0
                    while True:
                        await self._receive(await arrivals.next(), arrivals.link, observer)
            except (LinkLost, LogRefused) as error:
                self.link = None
                if not is_lost:
                    is_lost = True
                    observer.on_lost(error if isinstance(error, LinkLost) else LinkLost(str(error)))
                failures += 1
            await asyncio.sleep(_BACKOFF.seconds(failures, self._uniform))

    @asynccontextmanager
    async def _subscribed(self) -> AsyncIterator["_Arrivals"]:
        """Subscribe on a new link, and give the frames that arrive. Raises: LinkLost."""
        frames = _Frames()
        link = await Link.open(
            self._address, client_name=self._client_name, timeout_seconds=_ANSWER_SECONDS, on_message=frames.put
        )
        try:
            link.lost.add_done_callback(lambda lost: frames.has_news.set())
            await _answered(link, link.subscribe(link.names_of(self.namespace).channel))
            yield _Arrivals(link, frames)
        finally:
            await link.close()

    async def _begin(self, link: Link, newest: Position | None, observer: FeedObserver) -> None:
        """Choose the first position: the head, or with `since_ms` the place before the oldest entry of the log."""
        if newest is None or self._since_ms is None:
            self.position = newest or BEFORE_THE_FIRST
            return
        self._first_head = newest
        oldest = await _answered(link, read_after(link, self.namespace, after=0, count=1))
        self.position = Position(newest.epoch, min(oldest[0].sequence - 1, newest.sequence) if oldest else 0)
        sent_at_ms = oldest[0].invalidation.sent_at_ms if oldest and oldest[0].invalidation else None
        if self.position.sequence and sent_at_ms is not None and sent_at_ms > self._since_ms:
            detail = f"the log reaches back to sequence {oldest[0].sequence} only, not to the requested time"
            observer.on_gap(Gap("log-trimmed", detail))

    async def _catch_up(self, link: Link, newest: Position | None, observer: FeedObserver) -> None:
        """Report the entries of the log between the position and the head `newest`."""
        position = self.position or BEFORE_THE_FIRST
        while True:
            missed = await _answered(
                link,
                read_missed(link, self.namespace, after=position, until=newest, last_id=self._last_id),
            )
            for item in missed.items:
                if isinstance(item, Gap):
                    observer.on_gap(item)
                else:
                    assert newest is not None, "only a log has entries"
                    self._report(item.invalidation, Position(newest.epoch, item.sequence), item.frame, observer)
            if missed.position != position:
                self._last_id = self._last_id if self.position == missed.position else ""
                position = self.position = missed.position
            if newest is None or position == newest:
                return

    async def _receive(self, frame: bytes, link: Link, observer: FeedObserver) -> None:
        """Report a message if it is the next of the log; otherwise first the entries of the log before it."""
        try:
            invalidation = decode(frame, self.namespace)
        except MalformedFrame as error:
            if not self._unreadable_logged.forget(frame):
                self._unreadable_live.remember(frame)
                observer.on_unreadable(frame, error)
            return
        position = invalidation.position
        epoch, sequence = self.position or BEFORE_THE_FIRST
        if position is None:
            observer.on_invalidation(invalidation)
        elif position == (epoch or position.epoch, sequence + 1):
            self._report(invalidation, position, frame, observer)
        elif not Position(epoch, sequence).reaches(position):
            newest = await _answered(link, head(link, self.namespace))
            await self._catch_up(link, newest, observer)
            if newest is None or not newest.reaches(position):
                # The log has no such place. As a position, it would hide the entry that gets this place later.
                observer.on_invalidation(msgspec.structs.replace(invalidation, epoch=None, seq=None))

    def _report(
        self, invalidation: Invalidation | None, position: Position, frame: bytes, observer: FeedObserver
    ) -> None:
        """Report the entry at `position`, which becomes the position of the feed."""
        self.position = position
        self._last_id = invalidation.id if invalidation else ""
        if invalidation is None:
            # The channel may have delivered it already, without its place in the log.
            if not self._unreadable_live.forget(frame):
                self._unreadable_logged.remember(frame)
                error = MalformedFrame(f"invalid entry: expected an invalidation at {position.sequence} in the log")
                observer.on_unreadable(frame, error, position)
        elif not self._is_too_old(invalidation, position):
            observer.on_invalidation(invalidation)

    def _is_too_old(self, invalidation: Invalidation, position: Position) -> bool:
        first, sent_at_ms = self._first_head, invalidation.sent_at_ms
        if first is None or self._since_ms is None or sent_at_ms is None:
            return False
        return first.reaches(position) and sent_at_ms < self._since_ms


class _Remembered:
    """Unreadable messages from the channel or from the log, remembered so that each is reported once."""

    def __init__(self) -> None:
        self._hashes: deque[int] = deque(maxlen=_UNREADABLE_REMEMBERED)

    def remember(self, frame: bytes) -> None:
        self._hashes.append(hash(frame))

    def forget(self, frame: bytes) -> bool:
        """Forget a message. Return whether it was remembered."""
        try:
            self._hashes.remove(hash(frame))
        except ValueError:
            return False
        return True


class _Frames:
    """A bounded queue of the frames that a link has received: the observer may be slow."""

    def __init__(self) -> None:
        self.has_news = asyncio.Event()
        self.is_overflown = False
        self._frames: deque[bytes] = deque()
        self._left_bytes = _WAITING_BYTES_MAX

    def put(self, channel: bytes, frame: bytes) -> None:
        self._left_bytes -= len(frame) + _WAITING_FRAME_BYTES
        self.is_overflown = self.is_overflown or self._left_bytes < 0
        if not self.is_overflown:
            self._frames.append(frame)
        self.has_news.set()

    def pop(self) -> bytes | None:
        if not self._frames:
            return None
        frame = self._frames.popleft()
        self._left_bytes += len(frame) + _WAITING_FRAME_BYTES
        return frame


class _Arrivals:
    """A subscription: the link, and its frames one by one."""

    def __init__(self, link: Link, frames: _Frames) -> None:
        self.link: Final = link
        self._frames = frames
        self._count = 0

    async def next(self) -> bytes:
        """Return the next frame. When none arrives for a second, ping the server.

        Raises: LinkLost, after the last frame that the link has received.
        """
        self._count += 1
        if self._count % _SLICE_FRAMES == 0:
            await asyncio.sleep(0)
        while (frame := self._frames.pop()) is None:
            if self._frames.is_overflown:
                raise LinkLost(
                    f"more than {_WAITING_BYTES_MAX} bytes from {self.link.label} wait; the log is read instead"
                )
            if self.link.lost.done():
                raise self.link.lost.result()
            self._frames.has_news.clear()
            try:
                async with asyncio.timeout(_PING_INTERVAL_SECONDS):
                    await self._frames.has_news.wait()
            except TimeoutError:
                await _answered(self.link, self.link.call("PING"))
        return frame


async def _answered(link: Link, call: Awaitable[T]) -> T:
    """Await an answer for at most `_ANSWER_SECONDS`. Raises: LinkLost, also when Redis refuses the command."""
    try:
        async with link.within(_ANSWER_SECONDS):
            return await call
    except Refused as refusal:
        raise LinkLost(
            f"{link.label} refused the subscription: {refusal}; check the rights of this Redis user"
        ) from refusal
