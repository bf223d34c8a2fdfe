"""Servers that pretend: a sentinel that names a server of its own, and a data server that only listens."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

__all__ = ["Impostor", "impostor", "names_primary", "names_slots", "says_nothing"]

Answers = Callable[[bytes], bytes]


@dataclass
class Impostor:
    """Where it listens, and what was sent to it: in clear, whatever the transport."""

    port: int = 0
    heard: bytearray = field(default_factory=bytearray)
    connections: int = 0


@asynccontextmanager
async def impostor(answers: Answers, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Impostor]:
    """Listen on 127.0.0.1, with TLS or without, and answer what is heard."""
    it = Impostor()
    links: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        links.add(task)
        it.connections += 1
        try:
            while heard := await reader.read(65_536):
                it.heard += heard
                writer.write(answers(heard))
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort()
            links.discard(task)

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    it.port = listener.sockets[0].getsockname()[1]
    try:
        yield it
    finally:
        listener.close()
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)


def says_nothing(heard: bytes) -> bytes:
    """Answer nothing: what is heard is enough."""
    return b""


def names_primary(host: str, port: int) -> Answers:
    """Answer as a sentinel that names this server as the primary, whatever it is called."""
    return lambda heard: _answered(heard, b"GET-MASTER-ADDR", b"*2\r\n" + _bulk(host) + _bulk(str(port)))


def names_slots(host: str, port: int) -> Answers:
    """Answer as a server of a cluster that names this one as the primary of all slots."""
    node = b"*2\r\n" + _bulk(host) + b":%d\r\n" % port
    return lambda heard: _answered(heard, b"SLOTS", b"*1\r\n*3\r\n:0\r\n:16383\r\n" + node)


def _answered(heard: bytes, command: bytes, reply: bytes) -> bytes:
    commands = heard.upper()
    if command in commands:
        return reply
    if b"HELLO" in commands:
        return b"%1\r\n$5\r\nproto\r\n:3\r\n" + b"+OK\r\n" * (commands.count(b"\r\nCLIENT\r\n"))
    return b"+OK\r\n" * commands.count(b"\r\nCLIENT\r\n")


def _bulk(text: str) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(text), text.encode())
