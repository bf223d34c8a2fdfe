"""`broadcache demo`: the story as a user sees it, and that nothing is left of it."""

import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

import aiohttp
import pytest
from tests.support.command_line import BROADCACHE, descendants, environment, is_alive, run
from tests.support.waiting import wait_until

from broadcache.cli.demo.catalogue import CatalogueSource
from broadcache.cli.demo.child import Child, ChildFailed
from broadcache.cli.demo.fleet import Fleet, Invalidated, MeasuredDrop, Read, Replica
from broadcache.cli.demo.story import Row, Story

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def test_told_once_it_shows_times_and_stale_reads_and_exits_with_0() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        # Neither a port that is taken nor settings meant for another publisher keep it from starting.
        port = min(taken.getsockname()[1], 65_000)
        finished = run("demo", "--once", "--port", str(port), BROADCACHE_TOKENS="a-token-of-another-publisher")
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = finished.stdout.splitlines()
    assert lines[-1] == "stopped: nothing is left running"
    assert "\x1b" not in finished.stdout
    last = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert set(last) == {"replica-1", "replica-2", "replica-3", "naive"}
    for name in ("replica-1", "replica-2", "replica-3"):
        assert re.search(r"22\.50 fresh load +coherent +#1 +dropped in +\d+\.\d ms +stale reads 0$", last[name])
    assert re.search(r"24\.90 STALE hit .* stale reads 26$", last["naive"])
    # While the server was down, the replica that may serve did so, and dropped the entry when it was told by HTTP.
    assert any(re.match(r"  replica-3 +19\.90 STALE hit ", line) for line in lines)
    assert any("by HTTP to 3" in line and "3 of 3 replicas dropped it" in line for line in lines)


@needs_proc
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_live_demo_that_is_ended_leaves_no_process_behind(number: signal.Signals, code: int, tmp_path: Path) -> None:
    with _on_a_terminal("demo", "--port", "0", TMPDIR=str(tmp_path)) as (process, screen):
        _await_text(screen, "Each replica reads product 1")
        started = descendants(process.pid)
        assert len(started) == 6
        process.send_signal(number)
        _read_to_end(screen)
        assert process.wait() == code
    # The kernel ends what a killed demo leaves, a moment later.
    wait_until(lambda: not any(map(is_alive, started)), "the end of every process")
    # A demo that is killed cannot remove its files.
    assert list(tmp_path.iterdir()) == [] or number == signal.SIGKILL


@pytest.mark.anyio
async def test_a_child_that_dies_while_starting_is_quoted(tmp_path: Path) -> None:
    child = Child("replica-9", tmp_path / "replica-9.log")
    try:
        with pytest.raises(ChildFailed, match=r"(?s)replica-9 ended with code 2 while starting; it wrote:.*no/such"):
            await child.start(("replica", "--source", str(tmp_path / "no/such/folder")), 0)
    finally:
        await child.end()
        await child.end()


@pytest.mark.anyio
async def test_a_replica_that_serves_the_old_value_after_its_drop_fails_the_story(tmp_path: Path) -> None:
    async with aiohttp.ClientSession() as session:
        source = CatalogueSource(tmp_path / "catalogue.sqlite")
        story = Story(_BrokenFleet([_DeafReplica(session, source)], source), _Silence())
        await story.run()
    assert "replica-1: expected a load of 19.90, got hit of 24.90" in story.failures
    assert "replica-1 served 24.90 after it had dropped it: expected 19.90" in story.failures


class _DeafReplica(Replica):
    """Says that it drops, and does not."""

    def __init__(self, session: aiohttp.ClientSession, source: CatalogueSource) -> None:
        super().__init__("replica-1", "http://127.0.0.1:1", session, is_subscribed=True)
        self._source = source
        self._cached = Read(source.product(1).price, from_cache=True)

    async def read(self) -> Read:
        return self._cached

    async def set_price(self, price: Decimal) -> None:
        self._source.set_price(1, price)

    async def status(self) -> tuple[str, int]:
        return "coherent", 1

    async def drop_of(self, invalidated: Invalidated) -> MeasuredDrop | None:
        return MeasuredDrop(invalidated.id, invalidated.sent_at_ns + 1)


class _BrokenFleet(Fleet):
    """A fleet without processes."""

    def __init__(self, replicas: list[Replica], source: CatalogueSource) -> None:
        super().__init__(replicas[0], replicas, source)

    async def invalidate(self) -> Invalidated:
        return Invalidated("01J", 1, 1)


class _Silence:
    """A screen that shows nothing."""

    def say(self, text: str) -> None: ...

    def show(self, rows: Iterable[Row], source_price: Decimal) -> None: ...


@contextmanager
def _on_a_terminal(*arguments: str, **variables: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A command whose standard output is a terminal, and the other end of that terminal."""
    screen, terminal = pty.openpty()
    try:
        process = subprocess.Popen(
            [*BROADCACHE, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=terminal,
            env=environment(TERM="xterm", COLUMNS="100", LINES="30", **variables),
        )
        os.close(terminal)
        try:
            yield process, screen
        finally:
            process.kill()
            process.wait()
    finally:
        os.close(screen)


def _await_text(screen: int, text: str) -> None:
    seen = ""
    while text not in seen:
        seen += os.read(screen, 65_536).decode(errors="replace")


def _read_to_end(screen: int) -> None:
    try:
        while os.read(screen, 65_536):
            pass
    except OSError:  # Linux: no process has the terminal open any more
        pass
