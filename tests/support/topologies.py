"""Several servers that belong together: a primary with its replica and sentinels, and clusters of three and of six."""

import contextlib
import itertools
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from redis import Redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry
from tests.support.servers import Server, ServerName, binary_of
from tests.support.waiting import wait_until

from broadcache.shared.transport.redis.embedded import EmbeddedServer, ServerStartFailed, dying_with_us
from broadcache.shared.transport.redis.names import names_of

SERVICE = "orders"
SLOTS = 16_384
# Away from the ports that embedded servers choose from, and from those lent to outgoing connections.
BUS_PORTS = range(10_000, 20_000)
# A cluster's bus listens 10,000 above the server's port; Redis 6.2 knows no other place for it.
CLUSTER_PORTS: Final = range(10_000, 20_000)
START_ATTEMPTS: Final = 10
FROZEN_SECONDS: Final = 0.5
"""After this long, a server that has not answered counts as frozen."""


@dataclass
class Watched:
    """A primary, its replica, and the ports of three sentinels that watch over them."""

    primary: EmbeddedServer
    replica: EmbeddedServer
    sentinel_ports: list[int]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.sentinel_ports)
        return f"redis+sentinel://{hosts}/{SERVICE}"

    @property
    def servers(self) -> list[EmbeddedServer]:
        return [self.primary, self.replica]

    def current_primary(self) -> EmbeddedServer:
        """The server that every sentinel names, and that agrees. Raises: LookupError while there is none."""
        for server in self.servers:
            named = {*map(_named_by, self.sentinel_ports)} == {server.port}
            if named and _role_of(server) == b"master":
                return server
        raise LookupError("expected all sentinels to name one primary")

    def is_whole(self) -> bool:
        """Whether one server is the primary, the other copies it, and every sentinel knows both."""
        try:
            primary = self.current_primary()
        except LookupError:
            return False
        [other] = [server for server in self.servers if server is not primary]
        info = _replication_of(other)
        return (
            f"master_port:{primary.port}\r" in info
            and "master_link_status:up" in info
            and all(_flags_of_replicas(port) == [b"slave"] for port in self.sentinel_ports)
        )

    def fail_over(self) -> None:
        """Kill the primary, and wait until every sentinel names the other server."""
        self.primary.kill()
        wait_until(lambda: {*map(_named_by, self.sentinel_ports)} == {self.replica.port}, "the sentinels' agreement")
        wait_until(lambda: asked(self.replica.port, "ROLE")[0] == b"master", "the promotion")


@contextmanager
def watched(directory: Path, *, server: ServerName = "valkey") -> Iterator[Watched]:
    """Start them all, and stop them all."""
    with ExitStack() as stack:
        at_once = ("--repl-diskless-sync-delay", "0")
        primary = stack.enter_context(Server(server, extra_arguments=at_once))
        copies = ("--replicaof", "127.0.0.1", str(primary.port))
        replica = stack.enter_context(Server(server, extra_arguments=(*at_once, *copies)))
        wait_until(lambda: b"master_link_status:up" in asked(replica.port, "INFO", "replication"), "replication")
        ports = [
            stack.enter_context(sentinel(directory / f"sentinel-{n}", primary.port, server=server)) for n in range(3)
        ]
        wait_until(lambda: {*map(_counts_of, ports)} == {(1, 2)}, "sentinels that know the replica and each other")
        yield Watched(primary, replica, ports)


@contextmanager
def sentinel(
    directory: Path,
    primary_port: int,
    *,
    down_after_ms: int = 300,
    password: str = "",
    server: ServerName = "valkey",
) -> Iterator[int]:
    """A sentinel that watches over a primary, on a port of its own."""
    directory.mkdir()
    configuration = directory / "sentinel.conf"
    port = secrets.choice(BUS_PORTS)
    configuration.write_text(
        f"port {port}\nbind 127.0.0.1\nprotected-mode no\ndir {directory}\n"
        f"sentinel monitor {SERVICE} 127.0.0.1 {primary_port} 2\n"
        f"sentinel down-after-milliseconds {SERVICE} {down_after_ms}\n"
        f"sentinel failover-timeout {SERVICE} 2000\n" + (f"requirepass {password}\n" if password else "")
    )
    command = dying_with_us([str(binary_of(server)), str(configuration), "--sentinel"])
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: asked(port, "PING", password=password), "a sentinel")
        yield port
    finally:
        process.kill()
        process.wait()


def _named_by(sentinel_port: int) -> int:
    return int(asked(sentinel_port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])


def _flags_of_replicas(sentinel_port: int) -> list[bytes]:
    replicas = asked(sentinel_port, "SENTINEL", "REPLICAS", SERVICE)
    return [dict(zip(each[0::2], each[1::2], strict=True))[b"flags"] for each in replicas]


def _role_of(server: EmbeddedServer) -> bytes:
    role: bytes = asked(server.port, "ROLE", timeout_seconds=FROZEN_SECONDS)[0]
    return role


def _replication_of(server: EmbeddedServer) -> str:
    info: bytes = asked(server.port, "INFO", "replication", timeout_seconds=FROZEN_SECONDS)
    return info.decode()


def _counts_of(sentinel_port: int) -> tuple[int, int]:
    reply = asked(sentinel_port, "SENTINEL", "MASTER", SERVICE)
    fields = dict(zip(reply[0::2], reply[1::2], strict=True)) if isinstance(reply, list) else reply
    return int(fields[b"num-slaves"]), int(fields[b"num-other-sentinels"])


@dataclass
class ClusterOfThree:
    """Three primaries, each with a third of the slots."""

    nodes: list[EmbeddedServer]

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(f'127.0.0.1:{node.port}' for node in self.nodes)}"

    def node_of(self, namespace: str) -> EmbeddedServer:
        """The server that has the namespace's slot, as it sees it itself."""
        slot = key_slot(names_of(namespace).channel.encode())
        for node in self.nodes:
            for first, last, (_, port, node_id, *_), *_ in asked(node.port, "CLUSTER", "SLOTS"):
                if first <= slot <= last and port == node.port and node_id == asked(node.port, "CLUSTER", "MYID"):
                    return node
        raise AssertionError(f"expected a server to have slot {slot}, got none")

    def namespaces(self) -> list[str]:
        """One namespace on each server, in the servers' order."""
        names = (f"namespace-{number}" for number in itertools.count())
        found: dict[int, str] = {}
        while len(found) < len(self.nodes):
            name = next(names)
            found.setdefault(self.nodes.index(self.node_of(name)), name)
        return [found[place] for place in sorted(found)]

    @contextmanager
    def migrating(self, namespace: str, target: EmbeddedServer) -> Iterator[None]:
        """Begin to move the namespace's slot, key by key as Redis does it, and finish when the block ends."""
        source = self.node_of(namespace)
        slot = key_slot(names_of(namespace).channel.encode())
        source_id, target_id = (asked(node.port, "CLUSTER", "MYID") for node in (source, target))
        asked(target.port, "CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
        asked(source.port, "CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
        yield
        while keys := asked(source.port, "CLUSTER", "GETKEYSINSLOT", slot, 100):
            asked(source.port, "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for node in (target, source):
            asked(node.port, "CLUSTER", "SETSLOT", slot, "NODE", target_id)


@contextmanager
def cluster_of_three() -> Iterator[ClusterOfThree]:
    """Start them, make them a cluster, and stop them."""
    with ExitStack() as stack:
        nodes, bus_ports = [], secrets.SystemRandom().sample(BUS_PORTS, 3)
        for place, bus_port in enumerate(bus_ports):
            options = ("--cluster-enabled", "yes", "--cluster-port", str(bus_port), "--cluster-node-timeout", "1000")
            nodes.append(
                stack.enter_context(EmbeddedServer(extra_arguments=(*options, "--cluster-require-full-coverage", "no")))
            )
            asked(nodes[place].port, "CLUSTER", "SET-CONFIG-EPOCH", place + 1)
            bounds = place * SLOTS // 3, (place + 1) * SLOTS // 3 - 1
            asked(nodes[place].port, "CLUSTER", "ADDSLOTSRANGE", *bounds)
        for node, bus_port in zip(nodes[1:], bus_ports[1:], strict=True):
            asked(nodes[0].port, "CLUSTER", "MEET", "127.0.0.1", node.port, bus_port)
        wait_until(lambda: all(map(_is_whole, nodes)), "a cluster that is whole")
        yield ClusterOfThree(nodes)


@dataclass
class ClusterOfSix:
    """Three primaries, each with a third of the slots and with a replica that takes its place."""

    nodes: list[EmbeddedServer]

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(f'127.0.0.1:{node.port}' for node in self.nodes)}"

    def primary_of(self, namespace: str) -> EmbeddedServer:
        """The primary of the namespace's slot, as it sees it itself. Raises: LookupError while there is none."""
        slot = slot_of(namespace)
        for node in self.nodes:
            # A frozen server does not act as a primary, and one that was killed refuses.
            with contextlib.suppress(RedisError):
                if _role_of(node) == b"master" and _has_slot(node, slot):
                    return node
        raise LookupError(f"expected a server to have slot {slot}, got none")

    def primaries(self) -> list[EmbeddedServer]:
        """The servers that are primaries, as they see it themselves."""
        return [node for node in self.nodes if _role_of(node) == b"master"]

    def is_whole(self) -> bool:
        """Whether every server sees three primaries with all slots, and each primary has its replica in sync."""
        infos = [_replication_of(node) for node in self.nodes]
        return (
            sum("role:master" in info for info in infos) == 3
            and all("master_link_status:up" in info for info in infos if "role:slave" in info)
            and all(info.count("state=online") == 1 for info in infos if "role:master" in info)
            and all(b"cluster_state:ok" in asked(node.port, "CLUSTER", "INFO") for node in self.nodes)
            and all(_sees_whole(node) for node in self.nodes)
        )

    def migrate(self, namespace: str, target: EmbeddedServer) -> None:
        """Move the namespace's slot to another primary, key by key as every version can."""
        slot, source = slot_of(namespace), self.primary_of(namespace)
        source_id, target_id = (asked(node.port, "CLUSTER", "MYID") for node in (source, target))
        asked(target.port, "CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
        asked(source.port, "CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
        # Keys that the namespace writes meanwhile stay at the source while they are there.
        while keys := asked(source.port, "CLUSTER", "GETKEYSINSLOT", slot, 100):
            asked(source.port, "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        asked(target.port, "CLUSTER", "SETSLOT", slot, "NODE", target_id)
        asked(source.port, "CLUSTER", "SETSLOT", slot, "NODE", target_id)

    def migrate_at_once(self, namespace: str, target: EmbeddedServer) -> None:
        """Move the namespace's slot in one step, as Valkey 9 can. Raises: AtomicMigrationMissing."""
        slot, source = slot_of(namespace), self.primary_of(namespace)
        try:
            asked(
                source.port, "CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot,
                "NODE", asked(target.port, "CLUSTER", "MYID"),
            )  # fmt: skip
        except ResponseError as error:
            raise AtomicMigrationMissing(str(error)) from error
        wait_until(lambda: _has_slot(target, slot), "the migration of the slot")


class AtomicMigrationMissing(Exception):
    """The server has no CLUSTER MIGRATESLOTS."""


def slot_of(namespace: str) -> int:
    """The slot of a namespace's keys, and of its channel if it is sharded."""
    slot: int = key_slot(names_of(namespace).channel.encode())
    return slot


@contextmanager
def cluster_of_six(*, server: ServerName = "valkey") -> Iterator[ClusterOfSix]:
    """Start them, make them a cluster, and stop them."""
    with ExitStack() as stack:
        nodes: list[EmbeddedServer] = [_cluster_node(stack, server) for _ in range(6)]
        for place, node in enumerate(nodes):
            asked(node.port, "CLUSTER", "SET-CONFIG-EPOCH", place + 1)
        for place, node in enumerate(nodes[:3]):
            asked(node.port, "CLUSTER", "ADDSLOTS", *range(place * SLOTS // 3, (place + 1) * SLOTS // 3))
        for node in nodes[1:]:
            asked(nodes[0].port, "CLUSTER", "MEET", "127.0.0.1", node.port)
        wait_until(
            lambda: all(b"cluster_known_nodes:6" in asked(node.port, "CLUSTER", "INFO") for node in nodes),
            "a cluster whose servers know each other",
        )
        for primary, replica in zip(nodes[:3], nodes[3:], strict=True):
            primary_id = asked(primary.port, "CLUSTER", "MYID")
            # It is refused for as long as the server has not heard of its primary.
            replicate = partial(asked, replica.port, "CLUSTER", "REPLICATE", primary_id)
            wait_until(replicate, "a replica")
        cluster = ClusterOfSix(nodes)
        wait_until(cluster.is_whole, "a cluster that is whole")
        yield cluster


def _cluster_node(stack: ExitStack, server: ServerName) -> Server:
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-require-full-coverage", "no")
    at_once = ("--repl-diskless-sync-delay", "0", "--cluster-replica-validity-factor", "0")
    for attempts_left in reversed(range(START_ATTEMPTS)):
        node = Server(server, port=secrets.choice(CLUSTER_PORTS), extra_arguments=(*options, *at_once))
        try:
            return stack.enter_context(node)
        except ServerStartFailed:
            # The port, or the bus's beside it, is taken.
            if not attempts_left:
                raise
    raise AssertionError


def _has_slot(node: EmbeddedServer, slot: int) -> bool:
    reply = asked(node.port, "CLUSTER", "SLOTS", timeout_seconds=FROZEN_SECONDS)
    return any(first <= slot <= last and port == node.port for first, last, (_, port, *_), *_ in reply)


def _sees_whole(node: EmbeddedServer) -> bool:
    lines = asked(node.port, "CLUSTER", "NODES").decode().splitlines()
    return len(lines) == 6 and not any("fail" in line.split()[2] for line in lines)


def _is_whole(node: EmbeddedServer) -> bool:
    slots = asked(node.port, "CLUSTER", "SLOTS")
    return len(slots) == 3 and b"cluster_state:ok" in asked(node.port, "CLUSTER", "INFO")


def asked(port: int, *command: str | int | bytes, password: str = "", timeout_seconds: float | None = None) -> Any:
    """What a server answers, as it answers it. With `timeout_seconds` it is asked once, and not again."""
    once: dict[str, Any] = {} if timeout_seconds is None else {"retry": Retry(NoBackoff(), 0)}
    with Redis(port=port, password=password or None, socket_timeout=timeout_seconds or 5, protocol=2, **once) as client:
        client.response_callbacks.clear()
        return client.execute_command(*command)
