"""The inside of a connection of the client library: packing, reading in slices, and closing without an event loop.

Between two slices other tasks of the event loop run.

With hiredis installed, responses are parsed straight from the stream, several times as fast as through the client
library. Without it, or if the client library no longer exposes its stream, the library reads each response.
"""

import asyncio
import contextlib
import math
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

__all__ = [
    "Packer",
    "Refused",
    "Responses",
    "close_socket",
    "close_without_waiting",
    "descriptor_of",
    "packer_of",
    "responses_of",
]

_SLICE_RESPONSES: Final = 128
"""How many responses are returned before other tasks run, so that a flood never starves the event loop."""
_READ_BYTES: Final = 65_536
_NOT_ENOUGH: Final = object()


class Refused(Exception):
    """Redis answered a command with an error. `code` is the error's first word, e.g. `NOSCRIPT`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code: str = text.partition(" ")[0]


Packer: TypeAlias = Callable[[Sequence[tuple[Any, ...]]], list[bytes]]


class Responses(NamedTuple):
    """How to read the responses of a connection.

    Shape:  `next_slice` returns at least one response. A push is of type `push_type`, a refusal is a `Refused`, and
            anything else is a reply. `received_bytes` counts the bytes received so far, also of an incomplete response.
    Raises: OSError, or an error of the client library, when the connection is lost.
    """

    next_slice: Callable[[], Awaitable[Sequence[Any]]]
    push_type: type[Any]
    received_bytes: Callable[[], int]


def responses_of(connection: "AbstractConnection") -> Responses:
    """Return the fastest way to read from a connection that has completed HELLO and is idle."""
    stream = getattr(connection, "_reader", None)
    if isinstance(stream, asyncio.StreamReader):
        try:
            import hiredis
        except ImportError:
            pass
        else:
            reader = hiredis.Reader(notEnoughData=_NOT_ENOUGH, replyError=Refused)
            direct = _FromStream(stream, reader)
            return Responses(direct.next_slice, hiredis.PushNotification, lambda: direct.received_bytes)
    library = _FromLibrary(connection)
    return Responses(library.next_slice, tuple, lambda: library.received_bytes)


def packer_of(connection: "AbstractConnection") -> Packer:
    """Return the fastest way to encode commands: the library's own takes several times as long as hiredis'."""
    try:
        from hiredis import pack_command
    except ImportError:
        packed: Packer = connection.pack_commands
        return packed
    return lambda commands: list(map(pack_command, commands))


def descriptor_of(connection: "AbstractConnection") -> int | None:
    """Return the file descriptor of a connection; None when it is closing, or does not reveal it."""
    transport = getattr(getattr(connection, "_writer", None), "transport", None)
    if transport is None or transport.is_closing():
        return None  # the number may already belong to another file
    shown = transport.get_extra_info("socket")
    return None if shown is None or shown.fileno() < 0 else int(shown.fileno())


def close_without_waiting(connection: "AbstractConnection") -> None:
    """Close a connection on its event loop, from a task that is being cancelled or from a callback."""
    writer = _taken_writer(connection)
    if writer is not None:
        writer.close()


def close_socket(connection: "AbstractConnection") -> None:
    """Close the socket of a connection whose event loop has ended. Nothing is sent."""
    writer = _taken_writer(connection)
    if writer is not None and (shown := writer.get_extra_info("socket")) is not None:
        inner = getattr(shown, "_sock", None)  # asyncio shows a wrapper that cannot be closed
        if isinstance(inner, socket.socket):
            with contextlib.suppress(OSError):
                inner.close()


def _taken_writer(connection: Any) -> asyncio.StreamWriter | None:
    """Take the writer from a connection, which then is closed for the client library as well."""
    writer: asyncio.StreamWriter | None = getattr(connection, "_writer", None)
    if writer is not None:
        connection._writer = connection._reader = None
    return writer


class _FromStream:
    def __init__(self, stream: asyncio.StreamReader, reader: Any) -> None:
        self.received_bytes = 0
        self._stream = stream
        self._reader = reader

    async def next_slice(self) -> list[Any]:
        gets = self._reader.gets
        responses: list[Any] = []
        while len(responses) < _SLICE_RESPONSES:
            response = gets(False)
            if response is not _NOT_ENOUGH:
                responses.append(response)
            elif responses:
                return responses
            else:
                received = await self._stream.read(_READ_BYTES)
                if not received:
                    raise ConnectionError("the server closed the connection")
                self.received_bytes += len(received)
                self._reader.feed(received)
        await asyncio.sleep(0)
        return responses


class _FromLibrary:
    def __init__(self, connection: "AbstractConnection") -> None:
        self.received_bytes = 0
        self._connection = connection
        self._handed_over = 0
        stream = getattr(connection, "_reader", None)
        if isinstance(stream, asyncio.StreamReader):
            # The library returns only complete responses: only the stream sees partial ones arrive.
            feed_data = stream.feed_data

            def count_and_feed(data: Any) -> None:
                self.received_bytes += len(data)
                feed_data(data)

            stream.feed_data = count_and_feed  # type: ignore[method-assign]
        parser: Any = connection._get_parser()
        parser.set_pubsub_push_handler(_as_tuple)

    async def next_slice(self) -> list[Any]:
        from redis.exceptions import ResponseError

        self._handed_over += 1
        if self._handed_over % _SLICE_RESPONSES == 0:
            await asyncio.sleep(0)
        try:
            return [
                await self._connection.read_response(
                    disable_decoding=True, timeout=math.inf, disconnect_on_error=False, push_request=True
                )
            ]
        except ResponseError as error:
            # The library removes the first word of errors that it knows.
            return [Refused(f"{error.status_code} {error}" if error.status_code else str(error))]


async def _as_tuple(push: Sequence[Any]) -> tuple[Any, ...]:
    """Mark a push by its type: the library's parsers return lists for pushes and replies, never tuples."""
    return tuple(push)
