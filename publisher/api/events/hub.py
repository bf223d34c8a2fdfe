"""One feed for each followed namespace, shared by all clients that follow it."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Final, Literal

from ....shared.errors import BroadcacheError, LinkLost, LogRefused, MalformedFrame
from ....shared.invalidation import Invalidation, Position
from ....shared.transport.redis.address import RedisAddress
from ....shared.transport.redis.link import Link
from ....shared.transport.redis.log import head
from ...history.feed import Feed
from ...history.replay import BEFORE_THE_FIRST, Gap, read_missed
from . import event
from .event import HEARTBEAT, Event

__all__ = ["Client", "Hub", "HubFull"]

logger: logging.Logger = logging.getLogger("broadcache.publisher")


class HubFull(BroadcacheError):
    """The maximum number of clients is reached, or the publisher is shutting down."""


class Hub:
    """Follows a namespace while it has clients, over one subscription that they share.

    Shape:  `clients_max` limits the number of clients. A client with more than `waiting_bytes_max` of unsent events is
            disconnected: it reconnects with the id of its last event, and reads the rest from the log.
    """

    def __init__(
        self,
        redis_url: str | RedisAddress,
        *,
        clients_max: int = 100,
        heartbeat_seconds: float = 15.0,
        waiting_bytes_max: int = 2**20,
    ) -> None:
        self._redis_url = redis_url
        self._clients_max = clients_max
        self._heartbeat_seconds = heartbeat_seconds
        self._waiting_bytes_max = waiting_bytes_max
        self._rooms: dict[str, _Room] = {}
        self._clients: set[Client] = set()
        self._is_closed = False

    @asynccontextmanager
    async def client(self, namespace: str, after: Position | None) -> AsyncIterator["Client"]:
        """Follow `namespace` from now on; with `after`, from that position on.

        Raises: HubFull; InvalidNamespace, InvalidSettings.
        """
        if self._is_closed:
            raise HubFull("the publisher is shutting down; reconnect in a few seconds")
        if len(self._clients) >= self._clients_max:
            raise HubFull(
                f"expected at most {self._clients_max} clients of GET /events, got one more; reconnect later, or raise "
                "BROADCACHE_EVENT_CLIENTS_MAX"
            )
        room = self._rooms.get(namespace)
        if room is None:
            room = self._rooms[namespace] = _Room(Feed(self._redis_url, namespace, client_name="broadcache:events"))
            room.start()
        client = Client(room, after, self._heartbeat_seconds, self._waiting_bytes_max)
        self._clients.add(client)
        room.clients_count += 1
        try:
            yield client
        finally:
            self._clients.discard(client)
            room.leave(client)
            room.clients_count -= 1
            if not room.clients_count:
                # Only this room: another may have been opened for the same namespace.
                if self._rooms.get(namespace) is room:
                    del self._rooms[namespace]
                await room.close()

    async def close(self) -> None:
        """End the events of every client, and accept no more clients. Closing twice is harmless."""
        self._is_closed = True
        for client in self._clients:
            client.end()
        rooms, self._rooms = self._rooms, {}
        await asyncio.gather(*[room.close() for room in rooms.values()])


class _Room:
    """A followed namespace, and its clients. It is the observer of the feed."""

    def __init__(self, feed: Feed) -> None:
        self.feed: Final = feed
        self.clients_count = 0
        self.lost: Event | None = None
        self._listening: set[Client] = set()
        self._has_changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def link(self) -> Link | None:
        """The current link; None while it is lost."""
        link = self.feed.link
        return link if link is not None and link.is_open else None

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow(), name=f"broadcache events {self.feed.namespace}")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def join(self, client: "Client") -> None:
        self._listening.add(client)

    def leave(self, client: "Client") -> None:
        self._listening.discard(client)

    async def changed(self) -> None:
        """Return when the link was made or lost."""
        await self._has_changed.wait()

    def wake(self) -> None:
        """Wake the clients that wait for a change of the link."""
        changed, self._has_changed = self._has_changed, asyncio.Event()
        changed.set()

    async def _follow(self) -> None:
        try:
            await self.feed.follow(self)
        except Exception:
            logger.exception("following %s failed", self.feed.namespace)
            for client in tuple(self._listening):
                client.cut()

    def on_invalidation(self, invalidation: Invalidation) -> None:
        self._publish(event.of_invalidation(invalidation))

    def on_unreadable(self, frame: bytes, error: MalformedFrame, position: Position | None = None) -> None:
        self._publish(event.of_unreadable(str(error), position))

    def on_gap(self, gap: Gap) -> None:
        self._publish(event.of_gap(gap))

    def on_link(self, label: str) -> None:
        self.lost = None
        self._publish(event.of_link())
        self.wake()

    def on_lost(self, error: LinkLost) -> None:
        self.lost = event.of_loss(str(error))
        self._publish(self.lost)
        self.wake()

    def _publish(self, event: Event) -> None:
        for client in tuple(self._listening):
            client.put(event)


class Client:
    """One client of GET /events: its unsent events, and what it has missed.

    Shape: `is_cut` is set when the client was too slow: its unsent events are discarded.
    """

    def __init__(self, room: _Room, after: Position | None, heartbeat_seconds: float, waiting_bytes_max: int) -> None:
        self.is_cut: Final = asyncio.Event()
        self.is_sending = False
        self._room = room
        self._phase: Literal["waiting", "resuming", "live"] = "waiting"
        # Missed events are read over this link.
        self._link: Link | None = None
        self._knows_of_loss = False
        # The last event that it received from the log; None for a client that asks for no old events.
        self._position = after
        self._heartbeat_seconds = heartbeat_seconds
        self._waiting: deque[Event] = deque()
        self._waiting_bytes_max = waiting_bytes_max
        self._left_bytes = waiting_bytes_max
        self._has_news = asyncio.Event()
        self._is_ended = False

    def put(self, event: Event) -> None:
        """Queue an event for this client; disconnect it when the queue is full."""
        self._left_bytes -= len(event.frame)
        if self._left_bytes < 0:
            self.cut()
        else:
            self._waiting.append(event)
            self._has_news.set()

    def cut(self) -> None:
        """Disconnect the client."""
        self._room.leave(self)
        self._waiting.clear()
        self.is_cut.set()

    def end(self) -> None:
        """End the events after the queued ones; a client that is not reading is disconnected at once."""
        if self.is_sending:
            self.cut()
        self._is_ended = True
        self._has_news.set()
        self._room.wake()

    async def next(self) -> bytes | None:
        """Return what to send next, events or a heartbeat; None at the end."""
        steps = {"waiting": self._await_link, "resuming": self._resume, "live": self._next_event}
        chunk: bytes | None = b""
        while chunk == b"":
            chunk = await steps[self._phase]()
        return chunk

    async def _await_link(self) -> bytes | None:
        """Wait until the namespace is followed. From then on, events are queued for this client."""
        link = self._room.link
        if link is None:
            if self._is_ended:
                return None
            if self._room.lost is not None and not self._knows_of_loss:
                self._knows_of_loss = True
                return self._room.lost.frame
            return b"" if await self._is_in_time(self._room.changed()) else HEARTBEAT
        self._room.join(self)
        self._link = link
        self._knows_of_loss = False
        if self._position is not None:
            self._phase = "resuming"
            return event.of_link().frame
        self._phase = "live"
        return event.of_link(self._room.feed.position).frame

    async def _resume(self) -> bytes | None:
        """Return the next page of missed events from the log. Newer events are already queued."""
        assert self._link is not None, "a client resumes only after it has joined over a link"
        try:
            missed, is_all = await self._replayed(self._link)
        except LinkLost:
            self._room.leave(self)
            self._waiting.clear()
            self._left_bytes = self._waiting_bytes_max
            self._phase = "waiting"
            return b""
        if is_all:
            self._phase = "live"
        return b"".join([each.frame for each in missed])

    async def _next_event(self) -> bytes | None:
        """Return the next queued event, or wait for it."""
        if self._waiting:
            queued = self._waiting.popleft()
            self._left_bytes += len(queued.frame)
            return b"" if self._has(queued.position) else queued.frame
        if self._is_ended:
            return None
        self._has_news.clear()
        return b"" if await self._is_in_time(self._has_news.wait()) else HEARTBEAT

    async def _replayed(self, link: Link) -> tuple[list[Event], bool]:
        """Read the next page of missed events, and whether it is the last. Raises: LinkLost."""
        after = self._position
        assert after is not None, "only a client that resumes has missed events"
        try:
            newest = await head(link, self._room.feed.namespace)
            missed = await read_missed(link, self._room.feed.namespace, after=after, until=newest)
        except LogRefused as error:
            return [event.of_gap(Gap("log-refused", str(error)))], True
        self._position = missed.position
        events = [
            event.of_gap(item) if isinstance(item, Gap) else event.of_entry(item, missed.position.epoch)
            for item in missed.items
        ]
        return events, missed.position == (newest or BEFORE_THE_FIRST)

    def _has(self, position: Position | None) -> bool:
        """Whether the client received the event at `position` from the log."""
        ours = self._position
        return ours is not None and position is not None and ours.reaches(position)

    async def _is_in_time(self, news: Awaitable[object]) -> bool:
        """Wait for news; return whether they came before the next heartbeat is due."""
        try:
            async with asyncio.timeout(self._heartbeat_seconds):
                await news
        except TimeoutError:
            return False
        return True
