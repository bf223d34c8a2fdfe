"""Finds the primary by querying sentinels, or the servers of a cluster, each time a link is opened."""

import asyncio
import binascii
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from ...errors import LinkLost
from ...invalidation import DEFAULT_NAMESPACE
from .names import names_of

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

__all__ = ["Cluster", "Node", "Nodes", "Sentinels", "query"]

T = TypeVar("T")

_ANSWER_SECONDS: Final = 0.5
"""How long to wait for one server: the others must be queried within the same connect timeout."""
_SLOTS: Final = 16_384


class Node(NamedTuple):
    """The host and port of one server."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Nodes:
    """Servers any one of which can answer. One that does not is queried last the next time.

    Shape: `advice` is appended to the error when none of them answers.
    """

    def __init__(
        self, nodes: Sequence[Node], new_connection: Callable[[Node], "AbstractConnection"], *, advice: str = ""
    ) -> None:
        self._nodes = list(nodes)
        self._new_connection = new_connection
        self._advice = advice

    async def query(
        self, *command: str | int, wanted: str, answer_of: Callable[[Any, Node], T | None], first: Node | None = None
    ) -> T:
        """Query `first`, then the others; return the first result of `answer_of` that is not None.

        Raises: LinkLost, with the problem of each server.
        """
        problems = []
        for node in dict.fromkeys([first, *self._nodes] if first else self._nodes):
            connection = self._new_connection(node)
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await connection.connect()  # type: ignore[no-untyped-call]
                    answer = answer_of(await query(connection, *command), node)
            except Exception as error:  # noqa: BLE001  (the client library's errors have no base of their own)
                problem = str(error) or f"no answer in {_ANSWER_SECONDS:g} s"
            else:
                if answer is not None:
                    return answer
                problem = "knows no primary"
            finally:
                await connection.disconnect(nowait=True)
            problems.append(f"{node} ({problem})")
            if node in self._nodes:
                self._nodes.remove(node)
                self._nodes.append(node)
        raise LinkLost(f"expected {wanted}, got: {'; '.join(problems)}{self._advice}")


class Sentinels:
    """The sentinels that monitor a primary, and the name they have for it."""

    def __init__(self, nodes: Nodes, service: str) -> None:
        self._nodes = nodes
        self._service = service

    async def find_primary(self) -> Node:
        """Return the primary that a sentinel names. The answer may be outdated. Raises: LinkLost."""
        return await self._nodes.query(
            "SENTINEL",
            "GET-MASTER-ADDR-BY-NAME",
            self._service,
            wanted=f"a sentinel to name the primary of {self._service!r}",
            answer_of=lambda reply, _: None if reply is None else Node(reply[0].decode(), int(reply[1])),
        )


class Cluster:
    """The servers of a cluster, and the slot of one namespace."""

    def __init__(self, nodes: Nodes, namespace: str = DEFAULT_NAMESPACE) -> None:
        self.namespace: Final = namespace
        self._nodes = nodes
        self._slot = binascii.crc_hqx(names_of(namespace).channel.encode(), 0) % _SLOTS
        self._last: Node | None = None

    def of(self, namespace: str) -> "Cluster":
        """Return the same cluster, for another namespace."""
        return Cluster(self._nodes, namespace)

    async def find_primary(self) -> Node:
        """Return the primary of the namespace's slot. Raises: LinkLost."""
        self._last = await self._nodes.query(
            "CLUSTER",
            "SLOTS",
            wanted=f"a server of the cluster to name the primary of namespace {self.namespace!r} (slot {self._slot})",
            answer_of=self._primary_in,
            # The last owner of the slot knows first where it moved to.
            first=self._last,
        )
        return self._last

    def _primary_in(self, reply: Sequence[Any], asked: Node) -> Node | None:
        for first, last, (host, port, *_), *_ in reply:
            if first <= self._slot <= last and host != b"?":
                # An empty host means the host that was queried.
                return Node(host.decode() if host else asked.host, port)
        return None


async def query(connection: "AbstractConnection", *command: str | int) -> Any:
    """Send one command over an idle connection and return its reply.

    Raises: OSError, or an error of the client library.
    """
    await connection.send_command(*command)
    return await connection.read_response()
