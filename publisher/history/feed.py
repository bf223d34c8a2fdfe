"""Follows what is published for a namespace: live, and from the log whatever came while there was no link."""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, Protocol, TypeVar

import msgspec

from ...shared.errors import LinkLost, LogRefused, MalformedFrame
from ...shared.invalidation import Invalidation, Position, check_namespace
from ...shared.process.backoff import backoff_seconds
from ...shared.transport.redis.link import Link, RedisAddress, Refused
from ...shared.transport.redis.log import head, names_of, read_after
from ...shared.wire import decode
from .replay import BEFORE_THE_FIRST, Gap, read_missed

__all__ = ["Feed", "FeedObserver"]

T = TypeVar("T")

_ANSWER_SECONDS: Final = 2.0
_PING_INTERVAL_SECONDS: Final = 1.0
_BACKOFF_SECONDS_MIN: Final = 0.1
_BACKOFF_SECONDS_MAX: Final = 5.0
_WAITING_BYTES_MAX: Final = 16 * 2**20
"""How much may wait to be told. Beyond it the link is given up, and what it brought is read from the log."""
_WAITING_FRAME_BYTES: Final = 200
"""What a frame costs besides its bytes, about."""
_SLICE_FRAMES: Final = 100
"""How many frames are told before others on the event loop have their turn."""
_UNREADABLE_REMEMBERED: Final = 100


class FeedObserver(Protocol):
    """What is told of a namespace: in the order of the log, each entry once."""

    def on_invalidation(self, invalidation: Invalidation) -> None:
        """Take an invalidation; its `position` is None when it was published past the log."""

    def on_unreadable(self, frame: bytes, error: MalformedFrame, position: Position | None = None) -> None:
        """Take what is no invalidation; `position` is where the log has it. Replicas drop everything."""

    def on_gap(self, gap: Gap) -> None:
        """Take note that something was missed which the log cannot tell."""

    def on_link(self, label: str) -> None:
        """Take note that messages arrive from now on; first those of the log that came meanwhile."""

    def on_lost(self, error: LinkLost) -> None:
        """Take note that they no longer do. Called once an outage."""


class Feed:
    """Follows one namespace over links of its own, each made anew when it is lost or silent, for ever.

    Each new link subscribes first, and then reads from the log what came since the last entry that was told.

    Shape:  `position` is that of the last entry that was told; None as long as nothing is known of the log.
            `link` is the one that there is.
    Units:  with `since_ms`, a publisher's Unix clock in milliseconds, it begins with what the log holds that was sent
            since; without, with what is published from now on.
    """

    def __init__(
        self,
        redis_url: str,
        namespace: str,
        *,
        since_ms: int | None = None,
        client_name: str = "broadcache:watch",
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self.namespace: Final = check_namespace(namespace)
        self.position: Position | None = None
        self.link: Link | None = None
        self._address = RedisAddress(redis_url).of(namespace)
        self._since_ms = since_ms
        # The head when following began: what is older and was sent before `since_ms` is not told.
        self._first_head: Position | None = None
        self._client_name = client_name
        self._uniform = uniform
        self._last_id = ""
        self._unreadable_live = _Remembered()
        self._unreadable_logged = _Remembered()

    async def follow(self, observer: FeedObserver) -> None:
        """Tell `observer` of everything, until cancelled. Whatever the observer raises ends it."""
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
                        await self._take(await arrivals.next(), arrivals.link, observer)
            except (LinkLost, LogRefused) as error:
                self.link = None
                if not is_lost:
                    is_lost = True
                    observer.on_lost(error if isinstance(error, LinkLost) else LinkLost(str(error)))
                failures += 1
            await asyncio.sleep(
                backoff_seconds(
                    failures,
                    seconds_min=_BACKOFF_SECONDS_MIN,
                    seconds_max=_BACKOFF_SECONDS_MAX,
                    uniform=self._uniform,
                )
            )

    @asynccontextmanager
    async def _subscribed(self) -> AsyncIterator["_Arrivals"]:
        """Subscribe on a new link, and give what arrives. Raises: LinkLost."""
        frames = _Frames()
        link = await Link.open(
            self._address, client_name=self._client_name, timeout_seconds=_ANSWER_SECONDS, on_message=frames.put
        )
        try:
            link.lost.add_done_callback(lambda lost: frames.has_news.set())
            await _answered(link, link.subscribe(names_of(self.namespace).channel))
            yield _Arrivals(link, frames)
        finally:
            await link.close()

    async def _begin(self, link: Link, newest: Position | None, observer: FeedObserver) -> None:
        """Take a first position: the head, or what stands before the oldest entry when old ones are asked for."""
        if newest is None or self._since_ms is None:
            self.position = newest or BEFORE_THE_FIRST
            return
        self._first_head = newest
        oldest = await _answered(link, read_after(link, self.namespace, after=0, count=1))
        self.position = Position(newest.epoch, min(oldest[0].sequence - 1, newest.sequence) if oldest else 0)
        sent_at_ms = oldest[0].invalidation.sent_at_ms if oldest and oldest[0].invalidation else None
        if self.position.sequence and sent_at_ms is not None and sent_at_ms > self._since_ms:
            detail = f"expected all that was sent since, the log reaches back to sequence {oldest[0].sequence} only"
            observer.on_gap(Gap("log-trimmed", detail))

    async def _catch_up(self, link: Link, newest: Position | None, observer: FeedObserver) -> None:
        """Tell from the log what came between the position and the head `newest`."""
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
                    self._tell(item.invalidation, Position(newest.epoch, item.sequence), item.frame, observer)
            if missed.position != position:
                self._last_id = self._last_id if self.position == missed.position else ""
                position = self.position = missed.position
            if newest is None or position == newest:
                return

    async def _take(self, frame: bytes, link: Link, observer: FeedObserver) -> None:
        """Tell of a message, if its turn has come; otherwise of what stands before it in the log."""
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
            self._tell(invalidation, position, frame, observer)
        elif not Position(epoch, sequence).reaches(position):
            newest = await _answered(link, head(link, self.namespace))
            await self._catch_up(link, newest, observer)
            if newest is None or not newest.reaches(position):
                # No place of the log that there is: taking it for one would hide what comes there later.
                observer.on_invalidation(msgspec.structs.replace(invalidation, epoch=None, seq=None))

    def _tell(
        self, invalidation: Invalidation | None, position: Position, frame: bytes, observer: FeedObserver
    ) -> None:
        """Tell of the entry at `position`, which becomes the position."""
        self.position = position
        self._last_id = invalidation.id if invalidation else ""
        if invalidation is None:
            # It may have come over the channel, which does not say where the log has it.
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
    """The unreadable messages that were met in one of two places, so that each is told once."""

    def __init__(self) -> None:
        self._hashes: deque[int] = deque(maxlen=_UNREADABLE_REMEMBERED)

    def remember(self, frame: bytes) -> None:
        self._hashes.append(hash(frame))

    def forget(self, frame: bytes) -> bool:
        """Whether it was remembered."""
        try:
            self._hashes.remove(hash(frame))
        except ValueError:
            return False
        return True


class _Frames:
    """What a link has brought and nobody has taken: bounded, because whoever is told may be slow."""

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
        self._taken = 0

    async def next(self) -> bytes:
        """Return the next frame; when none comes for a while, have the server prove that it is there.

        Raises: LinkLost, after the last frame that the link has brought.
        """
        self._taken += 1
        if self._taken % _SLICE_FRAMES == 0:
            await asyncio.sleep(0)
        while (frame := self._frames.pop()) is None:
            if self._frames.is_overflown:
                raise LinkLost(f"more came from {self.link.label} than could be told; the log is read instead")
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
    """Wait for an answer, for a while. Raises: LinkLost."""
    try:
        async with link.within(_ANSWER_SECONDS):
            return await call
    except Refused as refusal:
        raise LinkLost(f"expected {link.label} to let this user subscribe, got: {refusal}") from refusal
