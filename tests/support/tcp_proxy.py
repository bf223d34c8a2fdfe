"""A TCP proxy that breaks a link on demand: between a client and a real server, in the test's own event loop."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Literal, Self

CHUNK_BYTES_MAX: Final = 65_536

Directions = Literal["both", "to_server", "to_client"]


class TcpProxy:
    """`async with TcpProxy("127.0.0.1", server.port) as proxy:` then connect to `proxy.url`.

    One port for its whole life: the port stays reserved while the proxy refuses. Each fault lasts until `heal()`
    (`refuse()`: until `accept()`).

    Units: each connection carries at most `bytes_per_second` to its client, for the proxy's whole life; None: no limit.
    """

    def __init__(self, target_host: str, target_port: int, *, bytes_per_second: float | None = None) -> None:
        self._target = (target_host, target_port)
        self._bytes_per_second = bytes_per_second
        self._discarded = asyncio.Event()
        self._flows = {"to_server": _Flow(self._discarded), "to_client": _Flow(self._discarded)}
        self._links: dict[asyncio.Task[None], _Link] = {}
        self._reservation: socket.socket | None = None
        self._listener: asyncio.Server | None = None
        self.connections_accepted = 0

    @property
    def port(self) -> int:
        assert self._reservation is not None, "enter the proxy first"
        port: int = self._reservation.getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def cut(self) -> None:
        """Drop every connection and keep listening; at once, also what a black hole or a stall holds."""
        for task in list(self._links):
            task.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    async def refuse(self) -> None:
        """Refuse new connections; those that exist go on."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            # The sockets close in the event loop's next round.
            await asyncio.sleep(0)

    async def accept(self) -> None:
        """Take new connections again."""
        if self._listener is None:
            self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port, reuse_port=True)

    async def has_discarded(self, bytes_min: int) -> None:
        """Wait until black holes have swallowed this much in all: the proof that a fault took place."""
        while sum(flow.bytes_discarded for flow in self._flows.values()) < bytes_min:
            self._discarded.clear()
            await self._discarded.wait()

    def black_hole(self, directions: Directions = "both") -> None:
        """Discard what is sent in these directions, and do not pass on that an end closed: neither end detects it.

        Connections stay open and new ones are taken. `heal()` aborts those that lost bytes.
        """
        for flow in self._chosen(directions):
            flow.discard()

    def stall(self, directions: Directions = "both") -> None:
        """Hold back what is sent in these directions. `heal()` delivers it late, as TCP does after a partition."""
        for flow in self._chosen(directions):
            flow.hold()

    def heal(self) -> None:
        """End every black hole and stall."""
        for link in self._links.values():
            if link.has_lost_bytes:
                link.abort()
        for flow in self._flows.values():
            flow.open()

    async def __aenter__(self) -> Self:
        # Bound and never listening: while the listener is closed, connects are refused and the port stays reserved.
        self._reservation = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._reservation.bind(("127.0.0.1", 0))
        await self.accept()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.refuse()
        await self.cut()
        if self._reservation is not None:
            self._reservation.close()

    def _chosen(self, directions: Directions) -> "list[_Flow]":
        return list(self._flows.values()) if directions == "both" else [self._flows[directions]]

    async def _new_rewrite(self) -> Callable[[bytes], bytes]:
        """Return what changes the bytes that one connection's client receives, chunk by chunk. Here: nothing."""
        return bytes

    async def _serve(self, client_reader: asyncio.StreamReader, client_writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        link = self._links[task] = _Link([client_writer])
        self.connections_accepted += 1
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._target)
            link.writers.append(server_writer)
            rewrite = await self._new_rewrite()
            await asyncio.gather(
                self._flows["to_server"].pump(link, client_reader, server_writer),
                self._flows["to_client"].pump(link, server_reader, client_writer, rewrite, self._bytes_per_second),
            )
        except (OSError, asyncio.CancelledError):
            pass  # The server is away, an end broke off, or the proxy closes: each ends this link and nothing else.
        finally:
            link.abort()
            del self._links[task]


@dataclass
class _Link:
    """The two sockets of one client's connection."""

    writers: list[asyncio.StreamWriter]
    has_lost_bytes: bool = False

    def abort(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


@dataclass
class _Flow:
    """What happens to bytes in one direction."""

    discarded: asyncio.Event
    bytes_discarded: int = 0
    _is_discarding: bool = False
    _passes: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        self._is_discarding = False
        self._passes.set()

    def hold(self) -> None:
        self._is_discarding = False
        self._passes.clear()

    def discard(self) -> None:
        self._is_discarding = True
        self._passes.clear()

    async def pump(
        self,
        link: _Link,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        rewrite: Callable[[bytes], bytes] = bytes,
        bytes_per_second: float | None = None,
    ) -> None:
        while chunk := await reader.read(_chunk_bytes(bytes_per_second)):
            if self._is_discarding:
                link.has_lost_bytes = True
                self.bytes_discarded += len(chunk)
                self.discarded.set()
                continue
            await self._passes.wait()
            writer.write(rewrite(chunk))
            await writer.drain()
            if bytes_per_second is not None:
                await asyncio.sleep(len(chunk) / bytes_per_second)
        await self._passes.wait()
        with contextlib.suppress(OSError):
            writer.write_eof()


def _chunk_bytes(bytes_per_second: float | None) -> int:
    """A slow link carries small chunks, a hundred a second, so that small messages wait in turn and no longer."""
    return CHUNK_BYTES_MAX if bytes_per_second is None else max(1, min(CHUNK_BYTES_MAX, int(bytes_per_second / 100)))
