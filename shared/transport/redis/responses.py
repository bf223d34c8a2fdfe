"""The inside of a connection of the client library: packing, writing, reading in slices, closing without an event loop.

Between two slices other tasks of the event loop run.

With hiredis installed, a link takes the stream over from the client library: it parses bytes as the event loop receives
them and writes commands at once, without a task in between. Without hiredis, or if the client library no longer
exposes its stream, the library reads and writes.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

__all__ = [
    "Exchange",
    "OnLost",
    "OnResponses",
    "Packer",
    "Refused",
    "close_socket",
    "close_without_waiting",
    "descriptor_of",
    "exchange_of",
    "packer_of",
    "usable_hiredis",
]

_SLICE_RESPONSES: Final = 128
"""How many responses are handled before other tasks run, so that a flood never starves the event loop."""
_READ_BYTES: Final = 16_384
"""The most bytes of one read. asyncio's own 256 KiB cost as much for each read as 20 messages do to apply."""
_NOT_ENOUGH: Final = object()


class Refused(Exception):
    """Redis answered a command with an error. `code` is the error's first word, e.g. `NOSCRIPT`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code: str = text.partition(" ")[0]


Packer: TypeAlias = Callable[[tuple[Any, ...]], bytes]
"""Encodes one command. Raises an error of its own for an argument that is no text, bytes or number."""
OnResponses: TypeAlias = Callable[[Sequence[Any]], None]
"""Called with a slice of responses, in order. A push is of type `push_type`, a refusal is a `Refused`, and all others
are replies. If it raises, the connection is lost."""
OnLost: TypeAlias = Callable[[str, BaseException | None], None]
"""Called when the connection is lost, with a description (`was lost`) and the error; may be called again."""


class Exchange(Protocol):
    """Bytes out, responses in, over one connection.

    Shape:  `received_bytes` counts the bytes received so far, also of an incomplete response.
    """

    push_type: type[Any]
    received_bytes: int

    def send(self, packed: bytes, *, at_once: bool) -> None:
        """Write a command: now, if that is possible and `at_once`; else together with others, before the loop waits."""

    def stop(self) -> None:
        """Handle no more responses, and write nothing more."""


def exchange_of(connection: "AbstractConnection", on_responses: OnResponses, on_lost: OnLost) -> Exchange:
    """Return the fastest way to read and write a connection that has completed HELLO and is idle. It begins to read."""
    stream, writer = getattr(connection, "_reader", None), getattr(connection, "_writer", None)
    if isinstance(stream, asyncio.StreamReader) and isinstance(writer, asyncio.StreamWriter):
        hiredis = usable_hiredis()
        if hiredis is not None:
            reader = hiredis.Reader(notEnoughData=_NOT_ENOUGH, replyError=Refused)
            taken_over = _TakenOver(reader, hiredis.PushNotification, on_responses, on_lost)
            taken_over.begin(stream, writer.transport)
            return taken_over
    return _ByLibrary(connection, on_responses, on_lost)


def usable_hiredis() -> Any:
    """Return the module hiredis if it is installed and tells pushes from replies (since 3.2), else None."""
    try:
        import hiredis
    except ImportError:
        return None
    return hiredis if hasattr(hiredis, "PushNotification") else None


def packer_of(connection: "AbstractConnection") -> Packer:
    """Return the fastest way to encode commands: the library's own takes several times as long as hiredis'."""
    try:
        from hiredis import pack_command
    except ImportError:
        pack_commands = connection.pack_commands
        return lambda command: b"".join(pack_commands([command]))
    packed: Packer = pack_command
    return packed


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


class _TakenOver(asyncio.BufferedProtocol):
    """The protocol of a connection's transport, in place of the client library's stream.

    Commands are written in the order of `send`: directly while nothing is queued, and queued while the transport's
    buffer is full.
    """

    def __init__(self, reader: Any, push_type: type[Any], on_responses: OnResponses, on_lost: OnLost) -> None:
        self.push_type: type[Any] = push_type
        self.received_bytes: int = 0
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._replaced: asyncio.BaseProtocol | None = None
        self._reader = reader
        self._on_responses = on_responses
        self._on_lost = on_lost
        self._buffer = bytearray(_READ_BYTES)
        self._view = memoryview(self._buffer)
        # Whether the parser may have more complete responses, for the next slice; meanwhile the transport is paused.
        self._has_more = False
        self._unsent: list[bytes] = []
        self._is_flush_due = False
        self._is_full = False
        self._is_stopped = False

    def begin(self, stream: asyncio.StreamReader, transport: asyncio.WriteTransport) -> None:
        """Take the transport over from the protocol that feeds `stream`."""
        self._transport = transport
        self._replaced = transport.get_protocol()
        transport.set_protocol(self)
        # Received since HELLO, and not read.
        if early := bytes(getattr(stream, "_buffer", b"")):
            self._loop.call_soon(self._receive, early, len(early))
        if stream.at_eof() or transport.is_closing():
            self._loop.call_soon(self.eof_received)

    # --- reading ------------------------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the transport writes the next bytes. A view, because TLS writes into slices of it."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Handle what the transport has written there."""
        self._receive(self._buffer, nbytes)

    def _receive(self, received: bytes | bytearray, size_bytes: int) -> None:
        self.received_bytes += size_bytes
        self._reader.feed(received, 0, size_bytes)
        if not self._has_more:
            self._handle_slice()

    def _handle_slice(self) -> None:
        if self._is_stopped:
            return
        gets = self._reader.gets
        responses: list[Any] = []
        try:
            while (response := gets(False)) is not _NOT_ENOUGH:
                responses.append(response)
                if len(responses) == _SLICE_RESPONSES:
                    if not self._has_more:
                        self._has_more = True
                        self._transport.pause_reading()
                    # Other tasks run before the next slice.
                    self._loop.call_soon(self._handle_slice)
                    break
            else:
                if self._has_more:
                    self._has_more = False
                    self._transport.resume_reading()
            self._on_responses(responses)
        except Exception as error:  # noqa: BLE001  (any error ends the link, and becomes its reason)
            self._on_lost("was lost", error)

    def eof_received(self) -> None:
        """Handle that the server has closed the connection."""
        self._on_lost("was lost", ConnectionError("the server closed the connection"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle that the transport has closed."""
        self._on_lost("was lost", exc or ConnectionError("the connection was closed"))
        if self._replaced is not None:
            self._replaced.connection_lost(exc)

    # --- writing ------------------------------------------------------------------------------------------------------

    def send(self, packed: bytes, *, at_once: bool) -> None:
        if at_once and not self._unsent and not self._is_full:
            self._transport.write(packed)
            return
        self._unsent.append(packed)
        if not self._is_flush_due and not self._is_full:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        if self._unsent and not self._is_full and not self._is_stopped:
            packed, self._unsent = b"".join(self._unsent), []
            self._transport.write(packed)

    def pause_writing(self) -> None:
        """Queue commands: the transport's buffer is full."""
        self._is_full = True

    def resume_writing(self) -> None:
        """Write the queued commands: the transport's buffer is nearly empty."""
        self._is_full = False
        self._flush()

    def stop(self) -> None:
        self._is_stopped = True
        self._unsent.clear()


class _ByLibrary:
    """Reading and writing by the client library, in a task each."""

    def __init__(self, connection: "AbstractConnection", on_responses: OnResponses, on_lost: OnLost) -> None:
        self.push_type: type[Any] = tuple
        self.received_bytes: int = 0
        self._connection = connection
        self._on_responses = on_responses
        self._on_lost = on_lost
        self._unsent: list[bytes] = []
        self._has_unsent = asyncio.Event()
        stream = getattr(connection, "_reader", None)
        if isinstance(stream, asyncio.StreamReader):
            # The library returns only complete responses: only the stream sees partial ones arrive.
            feed_data = stream.feed_data

            def count_and_feed(data: Any) -> None:
                self.received_bytes += len(data)
                feed_data(data)

            stream.feed_data = count_and_feed  # type: ignore[method-assign]
        untyped: Any = connection
        self._parser = parser = untyped._parser
        parser.parse_error = _whole_error
        if hasattr(parser, "set_pubsub_push_handler"):
            parser.set_pubsub_push_handler(_as_tuple)
        else:  # redis-py before 5.1
            parser.set_push_handler(tuple)
        self._tasks = (
            asyncio.create_task(self._read(), name="broadcache link reader"),
            asyncio.create_task(self._write(), name="broadcache link writer"),
        )

    def send(self, packed: bytes, *, at_once: bool) -> None:
        self._unsent.append(packed)
        self._has_unsent.set()

    def stop(self) -> None:
        self._unsent.clear()
        for task in self._tasks:
            task.cancel()

    async def _write(self) -> None:
        try:
            while True:
                await self._has_unsent.wait()
                self._has_unsent.clear()
                packed, self._unsent = self._unsent, []
                await self._connection.send_packed_command(packed, check_health=False)
        except Exception as error:  # noqa: BLE001  (any error ends the link, and becomes its reason)
            self._on_lost("was lost while writing", error)

    async def _read(self) -> None:
        # Not through the connection: whether it returns pushes, and how long it waits, depends on its version.
        read_response = self._parser.read_response
        handled = 0
        try:
            while True:
                response = await read_response(disable_decoding=True, push_request=True)
                self._on_responses([Refused(str(response)) if isinstance(response, Exception) else response])
                handled += 1
                if handled % _SLICE_RESPONSES == 0:
                    await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001  (any error ends the link, and becomes its reason)
            self._on_lost("was lost", error)


def _whole_error(text: str) -> Exception:
    """Return an error of the server with its first word: the library's parsers remove those that they know."""
    from redis.exceptions import ResponseError

    return ResponseError(text)


async def _as_tuple(push: Sequence[Any]) -> tuple[Any, ...]:
    """Mark a push by its type: the library's parsers return lists for pushes and replies, never tuples."""
    return tuple(push)
