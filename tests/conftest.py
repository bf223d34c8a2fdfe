"""What every test may ask for: a real server, and the certainty that nothing is left running."""

import asyncio
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from broadcache.shared.transport.redis.embedded import EmbeddedServer

CLEANUP_SECONDS = 10.0
"""How long a test that was given up may take to stop what it started."""


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[EmbeddedServer]:
    """One server for all tests of a pytest-xdist worker. Tests that break or configure a server take `own_server`."""
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def redis_url(valkey_server: EmbeddedServer) -> str:
    """The URL of the shared server, emptied for this test."""
    with socket.create_connection(("127.0.0.1", valkey_server.port), timeout=10) as connection:
        connection.sendall(b"FLUSHALL\r\n")
        assert connection.recv(64) == b"+OK\r\n"
    return valkey_server.url


@pytest.fixture
def own_server() -> Iterator[EmbeddedServer]:
    """A server for this test alone: to kill, pause, restart and configure."""
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
async def anyio_loop(anyio_backend: str) -> AsyncIterator[asyncio.AbstractEventLoop]:
    yield asyncio.get_running_loop()  # noqa: PT022 - a fixture that returns would let the loop be closed at once


@pytest.fixture(autouse=True)
def leaves_no_task_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails an async test that ends while a task of its own, or of its fixtures, still runs."""
    if request.node.get_closest_marker("anyio") is None:
        yield
        return
    loop: asyncio.AbstractEventLoop = request.getfixturevalue("anyio_loop")
    before = asyncio.all_tasks(loop)
    yield
    # One round of the loop, in which a task that was cancelled last may end.
    loop.run_until_complete(asyncio.sleep(0))
    left_behind = asyncio.all_tasks(loop) - before
    for task in left_behind:
        task.cancel()
    if any(map(_is_call_of_runner, left_behind)):
        # The test was given up from outside, as when its time was over, and goes on in anyio's runner. What stops the
        # fixtures would wait there behind it, for ever, and the worker with it.
        for task in before:
            task.cancel()
        loop.run_until_complete(asyncio.wait({*before, *left_behind}, timeout=CLEANUP_SECONDS))
    if left_behind:
        pytest.fail(f"the test left {len(left_behind)} tasks running: {sorted(map(repr, left_behind))}")


def _is_call_of_runner(task: "asyncio.Task[object]") -> bool:
    """Whether this is anyio's wait for the end of a test: it is over with the test, unless that was given up."""
    return getattr(task.get_coro(), "__name__", "") == "_call_in_runner_task"


@pytest.fixture(scope="session", autouse=True)
def runtime_directory() -> Iterator[None]:
    """A directory for sockets of this pytest-xdist worker's processes: those of others serve the same addresses."""
    with tempfile.TemporaryDirectory(prefix="bc-") as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", directory)
        yield


@pytest.fixture(scope="session", autouse=True)
def leaves_no_process_behind() -> Iterator[None]:
    """Fails the run when a process started by a test still runs at its end."""
    before = _child_processes()
    yield
    left_behind = _child_processes() - before
    if left_behind:
        pytest.fail(f"tests left {len(left_behind)} processes running: {sorted(left_behind)}")


def _child_processes() -> set[str]:
    """`pid command line` of each living child of this process; empty where the platform does not tell."""
    if sys.platform != "linux":
        return set()
    pids = [pid for children in Path("/proc/self/task").glob("*/children") for pid in children.read_text().split()]
    described = {f"{pid} {_command_line(pid)}" for pid in pids}
    # multiprocessing keeps its helper for the life of the process.
    return {line for line in described if line.split()[1:] and "multiprocessing" not in line}


def _command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
