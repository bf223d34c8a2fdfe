"""The addresses at which this process listens, by its own descriptors, whatever opened them."""

import contextlib
import ctypes
import errno
import ipaddress
import itertools
import os
import socket
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

__all__ = ["Listener", "inodes_listening_at", "inodes_of", "listeners", "network", "serving"]

_DESCRIPTORS: Final = (Path("/proc/self/fd"), Path("/dev/fd"))
_TCP_TABLES: Final = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTEN: Final = "0A"
_NAME_BYTES_MAX: Final = 256
_FAMILY_AT: Final = slice(1, 2) if sys.platform == "darwin" or "bsd" in sys.platform else slice(0, 2)
_PATH_AT: Final = 2


class Listener(NamedTuple):
    """A stream socket that listens, or is bound and will listen.

    Shape:  `name` is as text what it is bound to: `0.0.0.0:8080`, `[::]:8080`, `unix:/run/app.sock`. `host` is an IP
            address, or the path of a Unix socket, whose `port` is None. `inode` is one number for all processes that
            have inherited the socket. `may_have_twins`: other sockets may be bound to the same name (SO_REUSEPORT).
    """

    name: str
    host: str
    port: int | None
    is_listening: bool
    inode: int
    may_have_twins: bool

    def accepts(self, host: str, port: int | None) -> bool:
        """Whether it accepts the connections to this local address."""
        if self.port is None or port is None:
            return self.port is port and self.host == host
        return self.port == port and _covers(self.host, host)


def listeners(without: Iterable[int] = ()) -> list[Listener]:
    """Return the listeners of this process, but for those descriptors.

    Raises: OSError when the platform does not tell which descriptors a process has.
    """
    skipped = {*without}
    return [found for each in _descriptors() if each not in skipped and (found := _listener(each)) is not None]


def serving(found: Sequence[Listener], server: tuple[str, int | None] | None) -> list[Listener]:
    """Return those that accept connections to the local address `server`: all that listen, if it names none of them."""
    listening = [each for each in found if each.is_listening]
    named = [] if server is None else [each for each in listening if each.accepts(*server)]
    return named or listening


def network() -> str:
    """Return which network this process has: containers have the same addresses, each in a network of its own."""
    try:
        found = Path("/proc/self/ns/net").stat()
    except OSError:
        return ""
    return f"{found.st_dev}:{found.st_ino}"


def inodes_of(pid: int) -> set[int] | None:
    """Return the inodes of what another process of this user has open; None if the platform does not tell."""
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            return {inode for entry in entries if (inode := _inode_at(entry.path)) is not None}
    except OSError:
        return None


def inodes_listening_at(ports: Collection[int | None]) -> set[int]:
    """Return the inodes of the TCP sockets that listen at one of these ports, where the platform lists them."""
    found: set[int] = set()
    for table in _TCP_TABLES if ports else ():
        with contextlib.suppress(OSError), table.open(encoding="ascii") as lines:
            for _, local, _, state, *rest in map(str.split, itertools.islice(lines, 1, None)):
                if state == _LISTEN and int(local.rpartition(":")[2], 16) in ports:
                    found.add(int(rest[5]))
    return found


def _inode_at(path: str) -> int | None:
    try:
        return Path(path).stat().st_ino
    except OSError:
        return None  # it was closed just now


def _descriptors() -> Iterator[int]:
    for folder in _DESCRIPTORS:
        if folder.is_dir():
            yield from [int(each.name) for each in folder.iterdir() if each.name.isdecimal()]
            return
    raise OSError(errno.ENOENT, "the platform does not list the descriptors of a process")


def _listener(descriptor: int) -> Listener | None:
    # Not by a socket object: with a default timeout it would make the descriptor non-blocking for all that share it.
    if _option(descriptor, socket.SO_TYPE) != socket.SOCK_STREAM:
        return None
    is_listening = bool(_option(descriptor, socket.SO_ACCEPTCONN))
    if not is_listening and _name(_libc().getpeername, descriptor) is not None:
        return None  # a connection
    host_and_port = _parsed(_name(_libc().getsockname, descriptor) or b"")
    if host_and_port is None:
        return None
    host, port = host_and_port
    try:
        inode = os.fstat(descriptor).st_ino
    except OSError:
        return None
    name = f"unix:{host}" if port is None else f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    reuse_port = getattr(socket, "SO_REUSEPORT", None)
    may_have_twins = reuse_port is not None and port is not None and bool(_option(descriptor, reuse_port))
    return Listener(name, host, port, is_listening, inode, may_have_twins)


def _option(descriptor: int, option: int) -> int | None:
    value, size = ctypes.c_int(), ctypes.c_uint(ctypes.sizeof(ctypes.c_int))
    status = _libc().getsockopt(descriptor, socket.SOL_SOCKET, option, ctypes.byref(value), ctypes.byref(size))
    return None if status else value.value


def _name(function: Any, descriptor: int) -> bytes | None:
    name, size = ctypes.create_string_buffer(_NAME_BYTES_MAX), ctypes.c_uint(_NAME_BYTES_MAX)
    return None if function(descriptor, name, ctypes.byref(size)) else name.raw[: size.value]


def _parsed(name: bytes) -> tuple[str, int | None] | None:
    """Return host and port of a bound socket address, or the path of a Unix socket and None."""
    family = int.from_bytes(name[_FAMILY_AT], sys.byteorder)
    port = int.from_bytes(name[2:4])
    if family == socket.AF_INET and port:
        return socket.inet_ntop(socket.AF_INET, name[4:8]), port
    if family == socket.AF_INET6 and port:
        return socket.inet_ntop(socket.AF_INET6, name[8:24]), port
    if family == getattr(socket, "AF_UNIX", None) and len(name) > _PATH_AT:
        path = name[_PATH_AT:]
        path = b"@" + path[1:] if path.startswith(b"\0") else path.partition(b"\0")[0]
        return (path.decode("utf-8", "backslashreplace"), None) if path else None
    return None


def _covers(bound: str, host: str) -> bool:
    try:
        one, other = (ipaddress.ip_address(each.partition("%")[0]) for each in (bound, host))
    except ValueError:
        return False
    one, other = (getattr(each, "ipv4_mapped", None) or each for each in (one, other))
    # One bound to [::] may accept IPv4 too.
    return one == other or (one.is_unspecified and (one.version == 6 or other.version == 4))


def _libc() -> Any:
    global _loaded  # noqa: PLW0603
    if _loaded is None:
        _loaded = ctypes.CDLL(None)
    return _loaded


_loaded: Any = None
