"""Finds the primary by querying sentinels, or the servers of a cluster, each time a link is opened."""

import asyncio
import binascii
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from ...errors import InvalidSettings, LinkLost
from ...invalidation import DEFAULT_NAMESPACE
from .credentials import explained
from .names import Naming
from .url import Node, node_of

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

__all__ = [
    "AddressRemap",
    "Cluster",
    "FixedPrimary",
    "Node",
    "Nodes",
    "Primaries",
    "Remap",
    "Sentinels",
    "query",
    "remap_of",
]

T = TypeVar("T")

AddressRemap: TypeAlias = Mapping[str, str] | Callable[[tuple[str, int]], tuple[str, int]]
"""From announced addresses to those that can be reached: `{"10.0.0.5:6379": "127.0.0.1:7001"}`, or a function from
(host, port) to (host, port), like the client library's `address_remap`."""
Remap: TypeAlias = Callable[[Node], Node]

_STAGGER_SECONDS: Final = 0.1
"""How long to wait for one server before the next one is queried as well."""
_SLOTS: Final = 16_384


class Nodes:
    """Servers any one of which can answer. One that does not is queried last the next time.

    Shape: `new_connection` makes a connection to a server with these arguments. `secrets` are shown in no error.
           `advice` is appended to the error when none of them answers.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        new_connection: Callable[[Node, Mapping[str, Any]], "AbstractConnection"],
        *,
        secrets: Sequence[object] = (),
        advice: str = "",
    ) -> None:
        self._nodes = list(nodes)
        self._new_connection = new_connection
        self._secrets = secrets
        self._advice = advice

    async def query(
        self,
        *command: str | int,
        wanted: str,
        answer_of: Callable[[Any, Node], T | None],
        login: Mapping[str, Any],
        seconds: float,
        first: Node | None = None,
    ) -> T:
        """Query `first`, then the others; return the first result of `answer_of` that is not None.

        The next server is queried as soon as one has not answered for a moment: one that hangs delays the others only
        by that moment.

        Units:  `seconds` is how long all of it may take.
        Raises: LinkLost, with the problem of each server.
        """
        nodes = list(dict.fromkeys([first, *self._nodes] if first else self._nodes))
        stagger_seconds = min(_STAGGER_SECONDS, seconds / (2 * len(nodes)))
        ends_at = asyncio.get_running_loop().time() + seconds
        problems: dict[Node, str] = {}
        asked: dict[asyncio.Task[tuple[T | None, str]], Node] = {}
        ahead: Iterator[Node] = iter(nodes)
        is_more = True

        async def ask(node: Node) -> tuple[T | None, str]:
            connection = self._new_connection(node, login)
            try:
                async with asyncio.timeout_at(ends_at):
                    await connection.connect()  # type: ignore[no-untyped-call]
                    answer = answer_of(await query(connection, *command), node)
            except TimeoutError:
                return None, f"no answer within {seconds:.2g} s"
            except Exception as error:  # noqa: BLE001  (the client library's errors have no base of their own)
                return None, explained(error, [*self._secrets, *login.values()])
            finally:
                await connection.disconnect(nowait=True)
            return answer, "" if answer is not None else "knows no primary"

        try:
            while is_more or asked:
                if (node := next(ahead, None)) is None:
                    is_more = False
                else:
                    asked[asyncio.create_task(ask(node), name=f"broadcache asks {node}")] = node
                if not asked:
                    break
                done, _ = await asyncio.wait(
                    asked, timeout=stagger_seconds if is_more else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    answer, problem = task.result()
                    node = asked.pop(task)
                    if answer is not None:
                        self._ask_last([*problems, *asked.values()])
                        return answer
                    problems[node] = problem
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        self._ask_last([*problems])
        shown = "; ".join(f"{node} ({problems[node]})" for node in nodes)
        raise LinkLost(f"expected {wanted}, got: {shown}{self._advice}")

    def _ask_last(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            if node in self._nodes:
                self._nodes.remove(node)
                self._nodes.append(node)


class Sentinels:
    """The sentinels that monitor a primary, and the name they have for it."""

    def __init__(self, nodes: Nodes, service: str, remap: Remap) -> None:
        self._nodes = nodes
        self._service = service
        self._remap = remap

    async def find_primary(self, login: Mapping[str, Any], seconds: float) -> Node:
        """Return the primary that a sentinel names. The answer may be outdated. Raises: LinkLost.

        Shape: `login` is for data servers, and is not sent to sentinels.
        """
        return self._remap(
            await self._nodes.query(
                "SENTINEL",
                "GET-MASTER-ADDR-BY-NAME",
                self._service,
                wanted=f"a sentinel to name the primary of {self._service!r}",
                answer_of=lambda reply, _: None if reply is None else Node(reply[0].decode(), int(reply[1])),
                login={},
                seconds=seconds,
            )
        )


class Cluster:
    """The servers of a cluster, and the slot of one namespace."""

    def __init__(self, nodes: Nodes, remap: Remap, naming: Naming, namespace: str = DEFAULT_NAMESPACE) -> None:
        self.namespace: Final = namespace
        self._nodes = nodes
        self._remap = remap
        self._naming = naming
        self._slot = _slot_of(naming.channel_of(namespace))
        self._last: Node | None = None

    def of(self, namespace: str) -> "Cluster":
        """Return the same cluster, for another namespace."""
        return Cluster(self._nodes, self._remap, self._naming, namespace)

    async def find_primary(self, login: Mapping[str, Any], seconds: float) -> Node:
        """Return the primary of the namespace's slot. Raises: LinkLost.

        Shape: `login` is the user and password of its servers.
        """
        found = await self._nodes.query(
            "CLUSTER",
            "SLOTS",
            wanted=f"a server of the cluster to name the primary of namespace {self.namespace!r} (slot {self._slot})",
            answer_of=self._primary_in,
            login=login,
            seconds=seconds,
            # The last owner of the slot knows first where it moved to.
            first=self._last,
        )
        self._last = self._remap(found)
        return self._last

    async def primaries(self, login: Mapping[str, Any], seconds: float, first: Node | None) -> "Primaries":
        """Return the primaries of all slots, of which a server of the cluster knows; `first` is queried first.

        Raises: LinkLost.
        """
        return await self._nodes.query(
            "CLUSTER",
            "SLOTS",
            wanted="a server of the cluster to name the primary of each slot",
            answer_of=lambda reply, asked: Primaries(reply, asked, self._remap, self._naming) if reply else None,
            login=login,
            seconds=seconds,
            first=first,
        )

    def _primary_in(self, reply: Sequence[Any], asked: Node) -> Node | None:
        return _primary_of(self._slot, reply, asked)


class Primaries:
    """The primaries of a cluster, as one of its servers knew them. The answer may be outdated."""

    def __init__(self, reply: Sequence[Any], asked: Node, remap: Remap, naming: Naming) -> None:
        self._reply = reply
        self._asked = asked
        self._remap = remap
        self._naming = naming

    @property
    def nodes(self) -> list[Node]:
        """The primaries of all slots, each once."""
        found = (_node_of(host, port, self._asked) for _, _, (host, port, *_), *_ in self._reply if host != b"?")
        return list(dict.fromkeys(map(self._remap, found)))

    def of(self, namespace: str) -> Node:
        """Return the primary of the namespace's slot. Raises: LinkLost."""
        slot = _slot_of(self._naming.channel_of(namespace))
        if (found := _primary_of(slot, self._reply, self._asked)) is None:
            raise LinkLost(
                f"expected {self._asked} to name the primary of namespace {namespace!r} (slot {slot}), got none: check "
                "that the cluster covers all slots"
            )
        return self._remap(found)


class FixedPrimary:
    """A server that was found before."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def find_primary(self, login: Mapping[str, Any], seconds: float) -> Node:
        """Return the server."""
        return self._node


def _slot_of(hash_tag: str) -> int:
    return binascii.crc_hqx(hash_tag.encode(), 0) % _SLOTS


def _primary_of(slot: int, reply: Sequence[Any], asked: Node) -> Node | None:
    for first, last, (host, port, *_), *_ in reply:
        if first <= slot <= last and host != b"?":
            return _node_of(host, port, asked)
    return None


def _node_of(host: bytes | None, port: int, asked: Node) -> Node:
    # No host means: the one at which you have asked.
    return Node(host.decode() if host else asked.host, port)


def remap_of(address_remap: AddressRemap | None) -> Remap:
    """Return the function that maps an announced address to one that can be reached.

    Raises: InvalidSettings. The function raises LinkLost if the given one fails.
    """
    if address_remap is None:
        return lambda node: node
    if isinstance(address_remap, Mapping):
        nodes = {_mapped(key, address_remap): _mapped(value, address_remap) for key, value in address_remap.items()}
        return lambda node: nodes.get(node, node)
    if not callable(address_remap):
        raise InvalidSettings(
            "expected address_remap to be a mapping such as {'10.0.0.5:6379': '127.0.0.1:7001'}, or a function, got "
            f"{type(address_remap).__name__}"
        )
    function = address_remap

    def remap(node: Node) -> Node:
        problem = ""
        try:
            answer: tuple[object, object] = function((node.host, node.port))
            host, port = answer
            if isinstance(host, str) and isinstance(port, int):
                return Node(host, port)
            problem = f"got {type(host).__name__} and {type(port).__name__}"
        except Exception as error:  # noqa: BLE001  (whatever the function raises, the next attempt calls it again)
            problem = f"it raised {type(error).__name__}: {error}"
        raise LinkLost(f"address_remap failed for {node}: expected it to return (host, port), {problem}")

    return remap


def _mapped(text: object, address_remap: Mapping[str, str]) -> Node:
    with contextlib.suppress(ValueError):
        if isinstance(text, str) and text.rpartition(":")[2].isdecimal():
            return node_of(text, 0)
    raise InvalidSettings(
        f"expected address_remap to map host:port to host:port, as in {{'10.0.0.5:6379': '127.0.0.1:7001'}}, got "
        f"{address_remap!r}; write each with its port"
    )


async def query(connection: "AbstractConnection", *command: str | int) -> Any:
    """Send one command over an idle connection and return its reply.

    Raises: OSError, or an error of the client library.
    """
    await connection.send_command(*command)
    return await connection.read_response()
