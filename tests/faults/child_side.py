"""The child's end of the pipes: commands come in on standard input, reports go out on standard output."""

import asyncio
import sys
from collections.abc import Awaitable, Callable

import msgspec
from tests.faults.messages import Command, Report


async def answer(handle: Callable[[Command], Awaitable[Report]]) -> None:
    """Say that the child is ready, then answer each command, until the parent closes the pipe."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    _say(Report())
    while line := await reader.readline():
        _say(await handle(msgspec.json.decode(line, type=Command)))


def _say(report: Report) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.buffer.flush()
