"""A child process of the stage: told what to do, frozen, woken, and ended for certain."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from tests.faults.messages import Command, Report
from tests.support.paths import ROOT

from broadcache.shared.transport.redis.embedded import dying_with_us


class Child:
    """Made by `running`. One command at a time; a frozen child answers when it has been woken."""

    def __init__(self, process: asyncio.subprocess.Process, log_path: Path) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._input = process.stdin
        self._output = process.stdout
        self._log_path = log_path
        self._turn = asyncio.Lock()

    async def ask(self, command: Command) -> Report:
        """Send a command and return the answer. Raises: RuntimeError when the child has ended."""
        async with self._turn:
            self._input.write(msgspec.json.encode(command) + b"\n")
            return await self.answer()

    async def answer(self) -> Report:
        line = await self._output.readline()
        if not line:
            raise RuntimeError(f"a child has ended; its last words: {self._log_path.read_text()[-2_000:]}")
        return msgspec.json.decode(line, type=Report)

    def freeze(self) -> None:
        """Let it stand still (SIGSTOP), and return when it does."""
        self._process.send_signal(signal.SIGSTOP)
        if sys.platform == "linux":
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def wake(self) -> None:
        """Let it go on (SIGCONT); harmless when it does already."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def running(module: str, settings: msgspec.Struct, log_path: Path) -> AsyncIterator[Child]:
    """`python -m MODULE SETTINGS`, from when it is ready until the block ends."""
    command = (sys.executable, "-m", module, msgspec.json.encode(settings).decode())
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *dying_with_us(command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            cwd=ROOT,
            # Ctrl-C in the terminal is the stage's business.
            start_new_session=True,
        )
    child = Child(process, log_path)
    try:
        await child.answer()
        yield child
    finally:
        if process.returncode is None:
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        await process.communicate()
