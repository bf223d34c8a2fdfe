"""Servers, replication and links in memory: what Redis does for a log, in the order in which a link would show it.

Nothing moves by itself. A link's requests wait until the schedule has the server carry them out, and the replies and
messages wait, in one order, until the schedule delivers them. What a primary that was replaced still publishes waits on
the cluster bus, until the schedule puts it between the messages of the primary that replaced it.
"""

import asyncio
import copy
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

from broadcache.shared import LinkLost, Position
from broadcache.shared.clock import Clock
from broadcache.shared.transport.redis.link import Argument, OnMessage, RedisAddress, Refused
from broadcache.shared.transport.redis.names import Naming, names_of
from broadcache.shared.wire import digest_of, frame_at

_STATES_MAX = 4
_SECONDS_BUFFERED_MAX = 5.0


class LogState(NamedTuple):
    """What the keys of one namespace held at one moment."""

    epoch: str | None = None
    sequence: int = 0
    digest: str = ""
    digest_sequence: int = 0
    entries: tuple[tuple[int, bytes], ...] = ()
    receipts: tuple[tuple[str, tuple[Any, ...]], ...] = ()


class Log:
    """The head, the entries and the receipts of one namespace."""

    def __init__(self) -> None:
        self.epoch: str | None = None
        self.sequence = 0
        self.digest = ""
        self.digest_sequence = 0
        self.entries: list[tuple[int, bytes]] = []
        # Whether the log's key holds a value of another type.
        self.is_other_type = False
        self.receipts: dict[str, tuple[Any, ...]] = {}
        self._past: deque[LogState] = deque(maxlen=_STATES_MAX)

    @property
    def head(self) -> tuple[str, int] | None:
        return None if self.epoch is None else (self.epoch, self.sequence)

    @property
    def fields(self) -> list[bytes | None]:
        """The fields of the head, as HMGET returns them."""
        if self.epoch is None:
            return [None] * 4
        texts = (self.epoch, self.sequence, self.digest, self.digest_sequence)
        return [str(text).encode() for text in texts]

    def begin(self, epoch: str) -> None:
        """Make a head where there is none."""
        self.epoch, self.sequence, self.digest, self.digest_sequence = epoch, 0, "", 0

    def remember(self) -> None:
        """Keep the state of now, for `lose_tail`."""
        self._past.append(
            LogState(
                self.epoch,
                self.sequence,
                self.digest,
                self.digest_sequence,
                tuple(self.entries),
                tuple(self.receipts.items()),
            )
        )

    def add(self, tail: bytes, *, next_epoch: str | None = None, is_digest_kept: bool = True) -> bytes:
        """Move the head and add a frame; return the frame. Where it has no place in the log, begin `next_epoch`."""
        assert self.epoch is not None
        has_no_place = self.is_other_type or (self.entries and self.entries[-1][0] > self.sequence)
        if has_no_place and next_epoch is not None:
            self.epoch, self.sequence = next_epoch, 0
        self.sequence += 1
        frame = frame_at(Position(self.epoch, self.sequence), tail)
        if is_digest_kept:
            self.digest, self.digest_sequence = digest_of(frame), self.sequence
        if has_no_place:
            self.is_other_type, self.entries = False, []
        self.entries.append((self.sequence, frame))
        return frame

    def lose_tail(self, count: int) -> None:
        """Go back by `count` invalidations, as a server does that comes back from an older file."""
        state: LogState | None = None
        for _ in range(min(count, len(self._past))):
            state = self._past.pop()
        if state is not None:
            self.epoch, self.sequence, self.digest, self.digest_sequence = state[:4]
            self.entries, self.receipts = list(state.entries), dict(state.receipts)


class Logs(dict[str, Log]):
    """The logs of a server, by namespace. Servers that replicate one another share them."""

    def __missing__(self, namespace: str) -> Log:
        return self.setdefault(namespace, Log())


class Server:
    def __init__(self, name: str, logs: Logs) -> None:
        self.run_id = f"run-{name}"
        self.replication_id = f"replication-{name}"
        self.logs = logs
        self.is_primary = True
        self.is_frozen = False
        self.links: list[ModelLink] = []


class Push(NamedTuple):
    channel: bytes
    frame: bytes


class Reply(NamedTuple):
    future: asyncio.Future[Any]
    value: object


class Accepted(NamedTuple):
    """A frame that the primary has logged: the oracle learns of it at that moment."""

    namespace: str
    frame: bytes


class Network:
    """All servers, of which one is the primary, and the address that new links are opened to.

    A primary that was frozen and replaced takes itself for the primary until it is demoted. Its messages reach the
    subscribers of the real one over the bus of the cluster.

    Units: `bytes_per_second` is how much a slow link carries; None for links that are not slow.
    """

    def __init__(self, namespaces: Sequence[str], on_accepted: Callable[[Accepted], None], clock: Clock) -> None:
        self.clock = clock
        self._namespace_of_log = {names_of(namespace).log: namespace for namespace in namespaces}
        self._namespace_of_head = {names_of(namespace).head: namespace for namespace in namespaces}
        self._on_accepted = on_accepted
        self._numbers = itertools.count(1)
        self.primary = self.addressed = Server("0", Logs())
        self.servers = [self.primary]
        self.is_refusing = False
        self.links: list[ModelLink] = []
        # Commands of links that are gone, which their server has still to carry out.
        self.strays: deque[tuple[Server, Callable[[], object]]] = deque()
        # What primaries that were replaced have published, and has not reached the subscribers of the real one.
        self.bus: deque[Push] = deque()
        self.bytes_per_second: int | None = None
        self.is_identity_hidden = False

    @property
    def link(self) -> "ModelLink | None":
        """The link that is open now."""
        return self.links[-1] if self.links and not self.links[-1].lost.done() else None

    async def open(
        self, address: RedisAddress, *, client_name: str, timeout_seconds: float, on_message: OnMessage | None = None
    ) -> "ModelLink":
        """Stand in for `Link.open`."""
        if self.is_refusing:
            raise LinkLost("expected a connection, got a refusal")
        assert on_message is not None
        link = ModelLink(self, self.addressed, on_message)
        self.addressed.links.append(link)
        self.links.append(link)
        return link

    # --- publishing --------------------------------------------------------------------------------------------------

    def append(self, namespace: str, receipt: str, tails: Iterable[bytes], *, at: Server | None = None) -> list[Any]:
        """Do what append.lua does, at the primary or at the server `at`."""
        server = at or self.primary
        log = server.logs[namespace]
        if receipt in log.receipts:
            return [*log.receipts[receipt], 1]
        log.remember()
        if log.epoch is None:
            log.begin(f"E{next(self._numbers)}")
            log.entries, log.is_other_type = [], False
        for tail in tails:
            self._publish_logged(server, namespace, log.add(tail, next_epoch=f"E{next(self._numbers)}"))
        log.receipts[receipt] = (str(log.epoch).encode(), log.sequence, 1)
        return [*log.receipts[receipt], 0]

    def append_without_digest(self, namespace: str, tails: Iterable[bytes]) -> None:
        """Do what the script of an older publisher does."""
        log = self.primary.logs[namespace]
        log.remember()
        if log.epoch is None:
            log.begin(f"E{next(self._numbers)}")
            log.entries, log.is_other_type = [], False
        for tail in tails:
            self._publish_logged(self.primary, namespace, log.add(tail, is_digest_kept=False))

    def append_later(self, namespace: str, receipt: str, tails: Iterable[bytes]) -> None:
        """Send an invalidation to the primary, which carries it out with the strays: the publisher has given up."""
        server = self.primary
        self.strays.append((server, partial(self.append, namespace, receipt, list(tails), at=server)))

    def publish(self, namespace: str, frame: bytes) -> None:
        """Send a frame to all that are subscribed, on the primary or on a server that replicates it."""
        self._publish(self.primary, names_of(namespace).channel, frame)

    def carry(self, place: int) -> None:
        """Have one message come over the bus, at some place among those that are on their way."""
        if self.bus:
            push = self.bus.popleft()
            for link in self.primary.links:
                if push.channel.decode() in link.channels:
                    link.incoming.insert(place % (len(link.incoming) + 1), push)

    def _publish_logged(self, server: Server, namespace: str, frame: bytes) -> None:
        self._publish(server, names_of(namespace).channel, frame)
        if server is self.primary:
            self._on_accepted(Accepted(namespace, frame))

    def _publish(self, publisher: Server, channel: str, frame: bytes) -> None:
        push = Push(channel.encode(), frame)
        for server in self.servers:
            if server is publisher or (publisher.is_primary and server.logs is publisher.logs):
                for link in server.links:
                    if channel in link.channels:
                        link.incoming.append(push)
        if publisher.is_primary and publisher is not self.primary:
            self.bus.append(push)

    # --- faults ------------------------------------------------------------------------------------------------------

    def restart(self, lost_count: int) -> None:
        """Kill the primary, and start it again without what it had not written to its disk."""
        old = self.primary
        for link in list(old.links):
            link.lose("the server was killed")
        self.servers.remove(old)
        new = Server(str(next(self._numbers)), copy.deepcopy(old.logs))
        self._roll_back(new, lost_count)
        if self.addressed is old:
            self.addressed = new
        self.servers.append(new)
        self.primary = new

    def fail_over(self, lost_count: int) -> None:
        """Promote another server, which had not received everything; the old one stays up, and accepts nothing."""
        old = self.primary
        new = Server(str(next(self._numbers)), copy.deepcopy(old.logs))
        self._roll_back(new, lost_count)
        self.servers.append(new)
        old.is_primary = False
        self.primary = new

    def promote_addressed(self) -> None:
        """Make the server at the address the primary: it goes on from what it has."""
        if self.addressed is self.primary or self.addressed.is_frozen:
            return
        self.primary.is_primary = False
        new = self.addressed
        self.primary.logs = copy.deepcopy(self.primary.logs)
        new.logs = copy.deepcopy(new.logs)
        new.replication_id = f"replication-{next(self._numbers)}"
        new.is_primary = True
        self.primary = new

    def freeze(self, lost_count: int) -> None:
        """Freeze the primary, and promote another server, which had not received everything."""
        if any(server.is_frozen for server in self.servers):
            return
        old = self.primary
        old.is_frozen = True
        new = Server(str(next(self._numbers)), copy.deepcopy(old.logs))
        self._roll_back(new, lost_count)
        self.servers.append(new)
        self.primary = self.addressed = new

    def thaw(self) -> None:
        """Thaw a server: it takes itself for the primary still. Its clients had given it up before."""
        for server in self.servers:
            if server.is_frozen:
                server.is_frozen = False
                for link in list(server.links):
                    link.lose("the server was frozen")
                if self.addressed is server:
                    self.addressed = self.primary

    def demote(self) -> None:
        """Have a primary that was replaced learn of it."""
        for server in self.servers:
            if server.is_primary and server is not self.primary and not server.is_frozen:
                server.is_primary = False
                server.logs = self.primary.logs
                server.replication_id = self.primary.replication_id

    def replicate(self) -> None:
        """Have every other server replicate the primary, from now on."""
        self.demote()
        for server in self.servers:
            if not server.is_frozen:
                server.logs = self.primary.logs
                server.replication_id = self.primary.replication_id

    @property
    def addressable(self) -> list[Server]:
        """The servers that the address may lead to. No client is led to a second primary that is alive."""
        return [each for each in self.servers if not each.is_primary or each is self.primary or each.is_frozen]

    def part(self) -> None:
        """Cut the replication: what other servers hold stands still."""
        for server in self.servers:
            if not server.is_primary and server.logs is self.primary.logs:
                server.logs = copy.deepcopy(server.logs)

    def _roll_back(self, server: Server, lost_count: int) -> None:
        for log in server.logs.values():
            log.lose_tail(lost_count)

    # --- commands ----------------------------------------------------------------------------------------------------

    def execute(self, link: "ModelLink", command: tuple[Argument, ...]) -> object:
        """Carry out one command on the link's server; return its reply, None for a subscription, or a `Refused`."""
        server = link.server
        match command:
            case ("INFO", *_) if self.is_identity_hidden:
                return b"# Server\r\n"
            case ("INFO", "server"):
                return b"# Server\r\nrun_id:%s\r\n" % server.run_id.encode()
            case ("INFO", "replication"):
                role = "master" if server.is_primary else "slave"
                return f"role:{role}\r\nmaster_replid:{server.replication_id}\r\n".encode()
            case ("SUBSCRIBE", *channels):
                link.channels.update(map(str, channels))
                return None
            case ("UNSUBSCRIBE", *channels):
                link.channels.difference_update(map(str, channels))
                return None
            case ("HMGET", str(key), "epoch", "seq", "digest", "digest_seq"):
                return server.logs[self._namespace_of_head[key]].fields
            case ("XRANGE", str(key), str(start), "+", "COUNT", int(count)):
                log = server.logs[self._namespace_of_log[key]]
                if log.is_other_type:
                    return Refused("WRONGTYPE Operation against a key holding the wrong kind of value")
                first = int(start.removesuffix("-0"))
                return [(b"%d-0" % sequence, [b"f", frame]) for sequence, frame in log.entries if sequence >= first][
                    :count
                ]
            case ("EVALSHA", _, int(key_count), *rest):
                keys, arguments = [str(key) for key in rest[:key_count]], rest[key_count:]
                if not server.is_primary:
                    return Refused("READONLY You can't write against a read only replica.")
                if keys[0] not in self._namespace_of_head:
                    return 1  # a withdrawal: the registry is no part of the model
                if keys[2] == names_of(self._namespace_of_head[keys[0]]).registry:
                    return self._echo(server, keys, arguments)
                return self._append(server, keys, arguments)
        raise AssertionError(f"expected a command that the model knows, got {command!r}")

    def _append(self, server: Server, keys: list[str], arguments: list[Argument]) -> list[Any]:
        namespace = self._namespace_of_head[keys[0]]
        fingerprint, tails = arguments[4], [each for each in arguments[5:] if isinstance(each, bytes)]
        return [*self.append(namespace, keys[2], tails, at=server), str(fingerprint).encode()]

    def _echo(self, server: Server, keys: list[str], arguments: list[Argument]) -> list[Any]:
        heads: list[bytes | int | None] = []
        for key in keys[0::3]:
            log = server.logs[self._namespace_of_head[key]]
            if log.epoch is None:
                log.begin(f"E{next(self._numbers)}")
            heads += [*log.fields, 1]  # presences are no part of the model
        self._publish(server, str(arguments[0]), str(arguments[1]).encode())
        return [b"" if self.is_identity_hidden else server.replication_id.encode(), b"", [], *heads]


class ModelLink:
    """Stands in for `Link`: one connection to one server, whose two directions stand still between two operations."""

    label = "redis://model"
    is_sharded = False
    publish_command = "PUBLISH"
    naming = Naming()
    names_of = staticmethod(names_of)

    def __init__(self, network: Network, server: Server, on_message: OnMessage) -> None:
        self.server = server
        self.channels: set[str] = set()
        self.requests: deque[tuple[tuple[Argument, ...], asyncio.Future[Any]]] = deque()
        self.incoming: deque[Push | Reply] = deque()
        self.delivered: deque[Push] = deque(maxlen=8)
        self.is_black_hole = False
        self.lost: asyncio.Future[LinkLost] = asyncio.get_running_loop().create_future()
        self.received_bytes = 0
        self._network = network
        self._on_message = on_message
        # Of a slow link: when bytes last came, how many came that were not handed over, and how many have to.
        self._came_at = network.clock()
        self._partial_bytes = 0.0

    def new_epoch(self) -> str:
        return "unused"  # the model's server draws its own

    async def call(self, *command: Argument) -> object:
        return await self._send(command)

    async def call_all(self, commands: Iterable[Sequence[Argument]]) -> list[object]:
        return list(await asyncio.gather(*[self._send(tuple(command)) for command in commands]))

    async def publish(self, channel: str, message: bytes) -> object:
        return await self.call(self.publish_command, channel, message)

    @asynccontextmanager
    async def within(self, seconds: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise LinkLost(f"no answer within {seconds:g} s") from None

    async def subscribe(self, *channels: str) -> None:
        await self._send(("SUBSCRIBE", *channels))

    async def unsubscribe(self, *channels: str) -> None:
        await self._send(("UNSUBSCRIBE", *channels))

    async def close(self) -> None:
        self.lose("it was closed")

    def _send(self, command: tuple[Argument, ...]) -> asyncio.Future[Any]:
        if self.lost.done():
            raise LinkLost(str(self.lost.result()))
        future: asyncio.Future[Any] = self.lost.get_loop().create_future()
        self.requests.append((command, future))
        return future

    def serve(self) -> bool:
        """Have the server carry out the oldest request; return whether there was one."""
        if self.is_black_hole or self.server.is_frozen or not self.requests:
            return False
        command, future = self.requests.popleft()
        self.incoming.append(Reply(future, self._network.execute(self, command)))
        return True

    def deliver(self) -> bool:
        """Hand over what has come first; return whether there was anything."""
        if self.is_black_hole or not self.incoming or not self._is_whole(_size_of(self.incoming[0])):
            return False
        match self.incoming.popleft():
            case Push(channel, frame) as push:
                self.delivered.append(push)
                self._on_message(channel, frame)
            case Reply(future, value) if not future.done():
                if isinstance(value, Refused):
                    future.set_exception(value)
                else:
                    future.set_result(value)
        return True

    def _is_whole(self, size_bytes: int) -> bool:
        """Receive some bytes of what comes next; return whether it is whole."""
        rate, now = self._network.bytes_per_second, self._network.clock()
        if rate is None:
            self.received_bytes += max(0, size_bytes - int(self._partial_bytes))
            self._partial_bytes, self._came_at = 0.0, now
            return True
        before = int(self._partial_bytes)
        # What is more than the item is whole with belongs to the next one: it has come as well.
        self._partial_bytes += rate * min(_SECONDS_BUFFERED_MAX, now - self._came_at)
        self._came_at = now
        self.received_bytes += int(self._partial_bytes) - before
        if self._partial_bytes < size_bytes:
            return False
        self._partial_bytes -= size_bytes
        if len(self.incoming) == 1:
            self._partial_bytes = 0.0
        return True

    def lose(self, reason: str) -> None:
        """End the link. What was on its way here is gone; what was on its way there may still be carried out."""
        if self.lost.done():
            return
        self.lost.set_result(LinkLost(reason))
        self.server.links.remove(self)
        waiting = [future for _, future in self.requests]
        waiting += [item.future for item in self.incoming if isinstance(item, Reply)]
        self._network.strays.extend(
            (self.server, partial(self._network.execute, self, command)) for command, _ in self.requests
        )
        self.requests.clear()
        self.incoming.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(LinkLost(reason))


def _size_of(item: object) -> int:
    match item:
        case Push(channel, frame):
            return len(channel) + len(frame)
        case Reply(_, value):
            return _size_of(value)
        case bytes(text):
            return len(text)
        case list(values) | tuple(values):
            return sum(map(_size_of, values))
    return 1
