"""A proxy that blanks which server answers: run id and replication id, in INFO and in the echo script's answer."""

import asyncio
import re
from collections.abc import Callable
from typing import Final

from tests.support.tcp_proxy import TcpProxy

_IDS: Final = re.compile(rb"^(?:run_id|master_replid):([0-9a-f]{40})", re.MULTILINE)


class HidingProxy(TcpProxy):
    """To a server that tells neither run id nor replication id. `replies_changed` proves that it hid them."""

    def __init__(self, target_host: str, target_port: int, *, bytes_per_second: float | None = None) -> None:
        super().__init__(target_host, target_port, bytes_per_second=bytes_per_second)
        self.replies_changed = 0

    async def _new_rewrite(self) -> Callable[[bytes], bytes]:
        # Asked for each connection: a server that was restarted has others.
        blanks = _Blanks(await self._ids())

        def rewrite(chunk: bytes) -> bytes:
            rewritten = blanks.rewrite(chunk)
            self.replies_changed += blanks.changes
            return rewritten

        return rewrite

    async def _ids(self) -> list[bytes]:
        reader, writer = await asyncio.open_connection(*self._target)
        try:
            # Of all sections of a server at rest these are the ones with ids; the last reply is a status.
            writer.write(b"INFO server\r\nINFO replication\r\nPING\r\n")
            return _IDS.findall(await reader.readuntil(b"+PONG\r\n"))
        finally:
            writer.close()


class _Blanks:
    """Replaces ids in a stream of bytes: a reply that is one becomes empty, one within a text becomes spaces."""

    def __init__(self, ids: list[bytes]) -> None:
        self._replies: Final = [b"$%d\r\n%s\r\n" % (len(each), each) for each in ids]
        self._ids: Final = ids
        self._held = b""
        self.changes = 0

    def rewrite(self, chunk: bytes) -> bytes:
        text = self._held + chunk
        self.changes = sum(text.count(each) for each in self._ids)
        for each in self._replies:
            text = text.replace(each, b"$0\r\n\r\n")
        for each in self._ids:
            text = text.replace(each, b" " * len(each))
        held = self._beginning_at_the_end_of(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _beginning_at_the_end_of(self, text: bytes) -> int:
        """Return how many bytes at the end may be the beginning of what is replaced. A reply that is whole has none."""
        longest = max(map(len, self._replies), default=1)
        for count in range(min(longest - 1, len(text)), 0, -1):
            if any(each.startswith(text[-count:]) for each in (*self._replies, *self._ids)):
                return count
        return 0
