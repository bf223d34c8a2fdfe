"""Several servers that belong together: a primary with its replica and sentinels, and a cluster."""

import contextlib
import itertools
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError

from broadcache.shared.embedded import EmbeddedServer, dying_with_us, find_server_binary
from broadcache.shared.names import names_of

PATIENCE_SECONDS = 30.0
SERVICE = "orders"
SLOTS = 16_384
# Away from the ports that embedded servers choose from, and from those lent to outgoing connections.
BUS_PORTS = range(10_000, 20_000)


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

    def fail_over(self) -> None:
        """Kill the primary, and wait until every sentinel names the other server."""
        self.primary.kill()
        wait_until(lambda: {*map(_named_by, self.sentinel_ports)} == {self.replica.port}, "the sentinels' agreement")
        wait_until(lambda: asked(self.replica.port, "ROLE")[0] == b"master", "the promotion")


@contextmanager
def watched(directory: Path) -> Iterator[Watched]:
    """Start them all, and stop them all."""
    with ExitStack() as stack:
        primary = stack.enter_context(EmbeddedServer(extra_arguments=("--repl-diskless-sync-delay", "0")))
        replica = stack.enter_context(EmbeddedServer(extra_arguments=("--replicaof", f"127.0.0.1 {primary.port}")))
        wait_until(lambda: b"master_link_status:up" in asked(replica.port, "INFO", "replication"), "replication")
        ports = [stack.enter_context(sentinel(directory / f"sentinel-{n}", primary.port)) for n in range(3)]
        wait_until(lambda: {*map(_counts_of, ports)} == {(1, 2)}, "sentinels that know the replica and each other")
        yield Watched(primary, replica, ports)


@contextmanager
def sentinel(directory: Path, primary_port: int, *, down_after_ms: int = 300, password: str = "") -> Iterator[int]:
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
    command = dying_with_us([str(find_server_binary()), str(configuration), "--sentinel"])
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: asked(port, "PING", password=password), "a sentinel")
        yield port
    finally:
        process.kill()
        process.wait()


def _named_by(sentinel_port: int) -> int:
    return int(asked(sentinel_port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])


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


def _is_whole(node: EmbeddedServer) -> bool:
    slots = asked(node.port, "CLUSTER", "SLOTS")
    return len(slots) == 3 and b"cluster_state:ok" in asked(node.port, "CLUSTER", "INFO")


def asked(port: int, *command: str | int | bytes, password: str = "") -> Any:
    """What a server answers, as it answers it."""
    with Redis(port=port, password=password or None, socket_timeout=5, protocol=2) as client:
        client.response_callbacks.clear()
        return client.execute_command(*command)


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(RedisError):
            if condition():
                return
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come in {PATIENCE_SECONDS:g} s")
