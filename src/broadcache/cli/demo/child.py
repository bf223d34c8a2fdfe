"""A child process of the demo. It is ready when `start` returns, and ends with the demo."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from ...shared.errors import BroadcacheError
from ...shared.transport.redis.embedded import dying_with_us

__all__ = ["Child", "ChildFailed"]

START_SECONDS_MAX: Final = 30.0
STOP_SECONDS_MAX: Final = 5.0
_TAIL_LINES: Final = 15
_URL: Final = re.compile(rb"http://[^\s/]+:\d+")


class ChildFailed(BroadcacheError):
    """A process ended after it was started, or did not print its URL in time. The text ends with its last output."""


class Child:
    """One `broadcache` command in a child process, which prints its URL on standard output once it answers.

    Shape: `url` is set once `start` has returned; the file at `log_path` receives standard error.
    """

    def __init__(self, name: str, log_path: Path) -> None:
        self.name: Final = name
        self.url: str = ""
        self._log_path = log_path
        self._process: asyncio.subprocess.Process | None = None
        self._draining: asyncio.Task[bytes] | None = None

    async def start(self, arguments: Sequence[str], port: int, settings: Mapping[str, str] | None = None) -> None:
        """Start it on `port`, or on any free port if that fails. Raises: ChildFailed.

        Shape:  `settings` are `BROADCACHE_` environment variables.
        """
        try:
            await self._launch((*arguments, "--port", str(port)), settings or {})
        except ChildFailed:
            if not port:
                raise
            await self._launch((*arguments, "--port", "0"), settings or {})

    async def end(self) -> None:
        """Stop it, by force after STOP_SECONDS_MAX. Harmless when it has ended, or was never started."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(STOP_SECONDS_MAX):
                await process.wait()
        except ProcessLookupError:
            pass
        except TimeoutError:
            process.kill()
        finally:
            await process.wait()
            if self._draining is not None:
                await self._draining

    async def _launch(self, arguments: Sequence[str], settings: Mapping[str, str]) -> None:
        with self._log_path.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *dying_with_us((sys.executable, "-m", "broadcache", *arguments)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**_environment(), **settings},
                start_new_session=True,  # Ctrl-C reaches only the demo, which then stops its processes in order
            )
        output = self._process.stdout
        assert output is not None
        try:
            async with asyncio.timeout(START_SECONDS_MAX):
                while not (url := _URL.search(line := await output.readline())):
                    if not line:
                        code = await self._process.wait()
                        raise ChildFailed(f"{self.name} ended with code {code} while starting{self._tail()}")
        except TimeoutError:
            raise ChildFailed(f"{self.name} did not answer within {START_SECONDS_MAX:g} s{self._tail()}") from None
        self.url = url[0].decode()
        self._draining = asyncio.create_task(output.read(), name=f"drain {self.name}")

    def _tail(self) -> str:
        lines = self._log_path.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return "; it wrote:\n  " + "\n  ".join(lines) if lines else "; it wrote nothing"


def _environment() -> dict[str, str]:
    """Return the environment without broadcache settings: a production token would lock the demo out."""
    return {name: value for name, value in os.environ.items() if not name.startswith("BROADCACHE_")}
