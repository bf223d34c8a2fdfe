"""The command line as a user has it: real processes, their output and their ends."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROADCACHE = (sys.executable, "-m", "broadcache")


def environment(**variables: str) -> dict[str, str]:
    """The caller's environment without settings of ours, and with a terminal that is none."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BROADCACHE_")}
    return {**kept, "TERM": "dumb", "COLUMNS": "200", **variables}


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*BROADCACHE, *arguments], capture_output=True, text=True, check=False, env=environment(**variables)
    )


class Running:
    """A command that runs on; its standard output and error are read a line at a time."""

    def __init__(self, arguments: Sequence[str], variables: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [*BROADCACHE, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**variables),
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.stdout = self._process.stdout
        self.stderr = self._process.stderr
        self.pid = self._process.pid

    def url(self) -> str:
        """The URL it prints once it answers."""
        while line := self.stdout.readline():
            if found := re.search(r"http://\S+", line):
                return found[0]
        raise AssertionError(f"it ended with {self._process.wait()}: {self.stderr.read()}")

    def complain(self, text: str) -> str:
        """The next line of standard error that has `text` in it."""
        for line in self.stderr:
            if text in line:
                return line
        raise AssertionError(f"it ended with {self._process.wait()} and never wrote {text!r}")

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal; return the exit code and the rest of standard error."""
        self._process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and the rest of standard error."""
        rest = self.stderr.read()
        return self._process.wait(), rest

    def kill(self) -> None:
        """End it at once, whatever its state; what it has written can still be read."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it, whatever its state."""
        self.kill()
        self.stdout.close()
        self.stderr.close()


@contextmanager
def running(*arguments: str, **variables: str) -> Iterator[Running]:
    """A command that runs on, until the block ends at the latest."""
    command = Running(arguments, variables)
    try:
        yield command
    finally:
        command.close()


def ask(method: str, url: str, body: object = None, **headers: str) -> tuple[int, Any]:
    """Send one request; return the status and the JSON that came."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def descendants(pid: int) -> set[int]:
    """The process ids of all children of `pid`, and of theirs. Linux only."""
    found: set[int] = set()
    ahead = [pid]
    while ahead:
        for children in Path(f"/proc/{ahead.pop()}/task").glob("*/children"):
            new = {int(child) for child in children.read_text().split()} - found
            found |= new
            ahead.extend(new)
    return found


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie that only waits to be counted. Linux only."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
