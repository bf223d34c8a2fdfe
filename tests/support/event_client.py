"""A client of Server-Sent Events that is nothing but a socket: what it reads is what was sent."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

PATIENCE_SECONDS = 20.0


class Told(NamedTuple):
    """One event as a browser would have it."""

    kind: str
    id: str | None
    data: dict[str, Any]

    @property
    def keys(self) -> str:
        """The keys of an invalidation, joined."""
        return ",".join(self.data["keys"])


class EventClient:
    """An open stream. `comments` counts the signs of life."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.comments = 0
        self._reader = reader
        self._writer = writer
        self._text = b""

    async def read_head(self) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        lines = head.split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}

    async def next(self) -> Told | None:
        """The next event; None at the end of the stream. Signs of life are no reason to wait for ever."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self._next()

    async def _next(self) -> Told | None:
        while True:
            block = await self.next_block()
            if block is None:
                return None
            lines = block.decode().split("\n")
            self.comments += sum(line.startswith(":") for line in lines)
            fields = dict(line.split(": ", 1) for line in lines if not line.startswith(":"))
            if "event" in fields:
                assert len(fields) == len(lines), f"expected each field once, got {lines}"
                return Told(fields["event"], fields.get("id"), json.loads(fields["data"]))

    async def next_some(self, count: int) -> list[Told]:
        found = [await self.next() for _ in range(count)]
        return [each for each in found if each is not None]

    async def next_block(self) -> bytes | None:
        """What stands before the next empty line, as it was sent."""
        while b"\n\n" not in self._text:
            chunk = await self._chunk()
            if chunk is None:
                return None
            self._text += chunk
        block, _, self._text = self._text.partition(b"\n\n")
        return block

    async def body(self) -> bytes:
        """The body of an answer that is no stream."""
        return await self._reader.readexactly(int(self.headers["content-length"]))

    async def _chunk(self) -> bytes | None:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                size = int(await self._reader.readuntil(b"\r\n"), 16)
                chunk = await self._reader.readexactly(size + 2)
        except asyncio.IncompleteReadError:
            return None
        return chunk[:-2] if size else None


@asynccontextmanager
async def following(url: str, path: str = "/events", **headers: str) -> AsyncIterator[EventClient]:
    """GET `path` of the server at `url`, which answers with a stream or with a problem."""
    host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: {host}",
        *(f"{name.replace('_', '-')}: {headers[name]}" for name in headers),
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    client = EventClient(reader, writer)
    try:
        await client.read_head()
        yield client
    finally:
        writer.transport.abort()
