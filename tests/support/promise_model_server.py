"""Servers, replication and links in memory: what Redis does for a log, in the order in which a link would show it.

Nothing moves by itself. A link's requests wait until the schedule has the server carry them out, and the replies and
messages wait, in one order, until the schedule delivers them.
"""

import asyncio
import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from broadcache.shared import LinkLost
from broadcache.shared.link import Argument, OnMessage, RedisAddress, Refused
from broadcache.shared.names import names_of


class Log:
    """The head, the entries and the receipts of one namespace."""

    def __init__(self) -> None:
        self.epoch: str | None = None
        self.sequence = 0
        self.entries: list[tuple[int, bytes]] = []
        self.receipts: dict[str, list[Any]] = {}

    @property
    def head(self) -> tuple[str, int] | None:
        return None if self.epoch is None else (self.epoch, self.sequence)

    def lose_tail(self, count: int) -> None:
        """Go back by `count` invalidations, as a server does that comes back from an older file."""
        if self.epoch is not None:
            self.sequence = max(0, self.sequence - count)
        self.entries = [entry for entry in self.entries if entry[0] <= self.sequence]
        self.receipts = {id: row for id, row in self.receipts.items() if row[1] <= self.sequence}


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
        self.links: list[ModelLink] = []


class Push(NamedTuple):
    channel: bytes
    frame: bytes


class Reply(NamedTuple):
    future: asyncio.Future[Any]
    value: object


class Accepted(NamedTuple):
    """What the primary has logged: told to whoever watches over the promise, at that moment."""

    namespace: str
    epoch: str
    sequence: int
    id: str


class Network:
    """All servers, of which one is the primary, and the address that new links are opened to."""

    def __init__(self, namespaces: Sequence[str], on_accepted: Callable[[Accepted], None]) -> None:
        self._namespace_of_log = {names_of(namespace).log: namespace for namespace in namespaces}
        self._namespace_of_head = {names_of(namespace).head: namespace for namespace in namespaces}
        self._on_accepted = on_accepted
        self._numbers = itertools.count(1)
        self.primary = self.addressed = Server("0", Logs())
        self.servers = [self.primary]
        self.is_refusing = False
        self.links: list[ModelLink] = []
        # Commands of links that are gone, which their server has still to carry out.
        self.strays: deque[tuple[ModelLink, tuple[Argument, ...]]] = deque()

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

    def append(self, namespace: str, id: str, tails: Iterable[bytes]) -> list[Any]:
        """Do what append.lua does."""
        log = self.primary.logs[namespace]
        if id in log.receipts:
            return [*log.receipts[id], 1]
        if log.epoch is None:
            log.epoch, log.sequence, log.entries = f"E{next(self._numbers)}", 0, []
        for tail in tails:
            log.sequence += 1
            frame = b'{"v":1,"epoch":"%s","seq":%d,' % (log.epoch.encode(), log.sequence) + tail
            if log.entries and log.entries[-1][0] >= log.sequence:
                log.entries = []
            log.entries.append((log.sequence, frame))
            self.publish(namespace, frame)
            self._on_accepted(Accepted(namespace, log.epoch, log.sequence, id))
        log.receipts[id] = [log.epoch.encode(), log.sequence, 1]
        return [*log.receipts[id], 0]

    def publish(self, namespace: str, frame: bytes) -> None:
        """Send a frame to whoever is subscribed, on the primary or on a server that replicates it."""
        self._publish(self.primary, names_of(namespace).channel, frame)

    def _publish(self, publisher: Server, channel: str, frame: bytes) -> None:
        for server in self.servers:
            if server is publisher or (publisher.is_primary and server.logs is publisher.logs):
                for link in server.links:
                    if channel in link.channels:
                        link.incoming.append(Push(channel.encode(), frame))

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
        if self.addressed is self.primary:
            return
        self.primary.is_primary = False
        new = self.addressed
        self.primary.logs = copy.deepcopy(self.primary.logs)
        new.logs = copy.deepcopy(new.logs)
        new.replication_id = f"replication-{next(self._numbers)}"
        new.is_primary = True
        self.primary = new

    def replicate(self) -> None:
        """Have every other server replicate the primary, from now on."""
        for server in self.servers:
            server.logs = self.primary.logs
            server.replication_id = self.primary.replication_id

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
            case ("HMGET", str(key), "epoch", "seq"):
                return list(self._head_of(server, key))
            case ("XRANGE", str(key), str(after), "+", "COUNT", int(count)):
                after_sequence = int(after.removeprefix("(").removesuffix("-0"))
                entries = server.logs[self._namespace_of_log[key]].entries
                rows = [(b"%d-0" % sequence, [b"f", frame]) for sequence, frame in entries if sequence > after_sequence]
                return rows[:count]
            case ("EVALSHA", _, int(key_count), *rest):
                keys, arguments = [str(key) for key in rest[:key_count]], rest[key_count:]
                if not server.is_primary:
                    return Refused("READONLY You can't write against a read only replica.")
                if keys[2] == names_of(self._namespace_of_head[keys[0]]).registry:
                    return self._echo(server, keys, arguments)
                return self._append(keys, arguments)
            case ("ZREM" | "DEL", str(), *_):
                return 1  # nobody asks here who is there
        raise AssertionError(f"expected a command that the model knows, got {command!r}")

    def _head_of(self, server: Server, key: str) -> tuple[bytes | None, bytes | None]:
        head = server.logs[self._namespace_of_head[key]].head
        return (None, None) if head is None else (head[0].encode(), b"%d" % head[1])

    def _append(self, keys: list[str], arguments: list[Argument]) -> list[Any]:
        namespace = self._namespace_of_head[keys[0]]
        id = keys[2].removeprefix(names_of(namespace).receipt_prefix).partition(":")[2]
        fingerprint, tails = arguments[4], [each for each in arguments[5:] if isinstance(each, bytes)]
        return [*self.append(namespace, id, tails), str(fingerprint).encode()]

    def _echo(self, server: Server, keys: list[str], arguments: list[Argument]) -> list[Any]:
        self._publish(server, str(arguments[0]), str(arguments[1]).encode())
        heads = [field for key in keys[0::3] for field in self._head_of(server, key)]
        return [server.replication_id.encode(), b"", *heads]


class ModelLink:
    """Stands in for `Link`: one connection to one server, whose two directions stand still between two operations."""

    label = "redis://model"
    is_sharded = False

    def __init__(self, network: Network, server: Server, on_message: OnMessage) -> None:
        self.server = server
        self.channels: set[str] = set()
        self.requests: deque[tuple[tuple[Argument, ...], asyncio.Future[Any]]] = deque()
        self.incoming: deque[Push | Reply] = deque()
        self.delivered: deque[Push] = deque(maxlen=8)
        self.is_black_hole = False
        self.lost: asyncio.Future[LinkLost] = asyncio.get_running_loop().create_future()
        self._network = network
        self._on_message = on_message

    async def call(self, *command: Argument) -> object:
        return await self._send(command)

    async def call_all(self, commands: Iterable[Sequence[Argument]]) -> list[object]:
        return list(await asyncio.gather(*[self._send(tuple(command)) for command in commands]))

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
        if self.is_black_hole or not self.requests:
            return False
        command, future = self.requests.popleft()
        self.incoming.append(Reply(future, self._network.execute(self, command)))
        return True

    def deliver(self) -> bool:
        """Hand over what has come first; return whether there was anything."""
        if self.is_black_hole or not self.incoming:
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

    def lose(self, reason: str) -> None:
        """End the link. What was on its way here is gone; what was on its way there may still be carried out."""
        if self.lost.done():
            return
        self.lost.set_result(LinkLost(reason))
        self.server.links.remove(self)
        waiting = [future for _, future in self.requests]
        waiting += [item.future for item in self.incoming if isinstance(item, Reply)]
        self._network.strays.extend((self, command) for command, _ in self.requests)
        self.requests.clear()
        self.incoming.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(LinkLost(reason))
