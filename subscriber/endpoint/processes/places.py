"""Where the processes of one user have their sockets: a directory that only this user can enter, or abstract names."""

import contextlib
import errno
import os
import re
import secrets
import socket
import stat
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

__all__ = [
    "Bound",
    "CannotBind",
    "Found",
    "Hidden",
    "Peer",
    "bind",
    "found",
    "hidden",
    "is_there",
    "peer_of",
    "remove_stale",
]

_PATH_BYTES_MAX: Final = 100
"""Less than what each platform permits: 104 with the final zero on macOS and the BSDs, 108 on Linux."""
_BACKLOG: Final = 256
_NAME: Final = re.compile(r"(\d+)-[0-9a-f]{16}")
_LISTENS: Final = r"\S+ \S+ \S+ 00010000 0001 \S+ +(\d+) "
"""The beginning of a line of /proc/net/unix, of a stream socket that listens: with its inode."""
_ABSTRACT: Final = re.compile(rf"{_LISTENS}(@broadcache-(\d+)-\d+-[0-9a-f]{{16}})")
_IN_FOLDER: Final = re.compile(rf"{_LISTENS}/.*/broadcache-(\d+)/\.((\d+)-[0-9a-f]{{16}})")
"""Under the name with which it was bound, whatever its file is called now, and also if it has none any more."""
_NOT_OURS: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM})
_NAMES: Final = Path("/proc/net/unix")
_UNFINISHED_SECONDS: Final = 3_600.0
"""After this time, a socket that was never given its name has no process any more."""
_LOCAL_LEVEL: Final = 0
_LOCAL_PEERCRED: Final = 1
_LOCAL_PEERPID: Final = 2


class CannotBind(Exception):
    """This process cannot have a socket for its siblings. The text says why."""


class Bound(NamedTuple):
    """The socket of this process, which listens. `path` is None for an abstract name."""

    socket: socket.socket
    address: str
    path: Path | None


class Found(NamedTuple):
    """The socket of a process of this user. `path` is None for an abstract name."""

    address: str
    path: Path | None


class Hidden(NamedTuple):
    """A socket of this user that listens, and that cannot be called: its file was removed, or may not be used.

    Shape:  `pid` is as its process knows it, and `inode` that of the socket.
    """

    name: str
    pid: int
    inode: int


class Peer(NamedTuple):
    """The process at the other end of a Unix socket. `pid` is None where it is not known, e.g. in another container."""

    uid: int
    pid: int | None


def bind() -> Bound:
    """Bind the socket of this process, and listen. Raises: CannotBind."""
    if not hasattr(socket, "AF_UNIX") or not hasattr(os, "geteuid"):
        raise CannotBind("this platform has no Unix sockets")
    reasons: list[str] = []
    name = f"{os.getpid()}-{secrets.token_hex(8)}"
    for folder in _folders():
        try:
            return _bind_in(folder, name)
        except (OSError, ValueError) as error:
            reasons.append(f"{folder}: {error}")
    if sys.platform == "linux":
        try:
            _NAMES.stat()  # else no sibling could be found
            return _bound(f"\0broadcache-{os.geteuid()}-{name}", None)
        except OSError as error:
            reasons.append(f"an abstract socket: {error}")
    raise CannotBind(f"no socket could be bound: {'; '.join(reasons)}")


def found() -> list[Found]:
    """Return the sockets of all processes of this user. Those of ended processes may be among them.

    Raises: OSError when they cannot be listed, e.g. because no descriptor is left.
    """
    return [*_found_in_folders(), *_found_abstract()]


def hidden() -> list[Hidden]:
    """Return the sockets that are not `found`, of processes of this user, where the platform shows them.

    Containers with one network see each other's sockets: a pid may be that of another process here. And a socket that
    is being bound is among them for a moment.

    Raises: OSError.
    """
    listening = [
        Hidden(match[3], int(match[4]), int(match[1]))
        for match in _matching(_IN_FOLDER)
        if int(match[2]) == os.geteuid()
    ]
    names = {each.path.name for each in found() if each.path is not None} if listening else set()
    return [each for each in listening if each.name not in names]


def is_there(bound: Bound) -> bool:
    """Whether others can find this socket; true if that cannot be known for now."""
    if bound.path is None:
        return True
    try:
        with _entered(bound.path.parent) as descriptor:
            return stat.S_ISSOCK(os.stat(bound.path.name, dir_fd=descriptor, follow_symlinks=False).st_mode)
    except OSError as error:
        return error.errno not in _NOT_OURS


def remove_stale(stale: Found) -> None:
    """Remove a socket that refused a connection: its process has ended. One that is being bound has no name yet."""
    if stale.path is not None:
        with contextlib.suppress(OSError):
            stale.path.unlink()


def peer_of(connection: socket.socket) -> Peer | None:
    """Return the process at the other end; None where the platform does not tell."""
    try:
        if hasattr(socket, "SO_PEERCRED"):
            pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return Peer(uid & 0xFFFFFFFF, pid or None)
        # struct xucred: the version, the uid, and groups.
        credentials = connection.getsockopt(_LOCAL_LEVEL, _LOCAL_PEERCRED, 76)
        [uid] = struct.unpack_from("I", credentials, 4)
        pid = None
        if sys.platform == "darwin":
            with contextlib.suppress(OSError):
                pid = connection.getsockopt(_LOCAL_LEVEL, _LOCAL_PEERPID) or None
        return Peer(uid, pid)
    except (OSError, struct.error):
        return None


def _folders() -> list[Path]:
    """Return the directories in which the sockets may be, the first choice first."""
    uid = os.geteuid()
    parents = [os.environ.get("XDG_RUNTIME_DIR", ""), f"/run/user/{uid}"]
    with contextlib.suppress(OSError):
        parents.append(tempfile.gettempdir())
    parents += ["/tmp", "/dev/shm"]  # noqa: S108  (what is created in them is checked)
    real = dict.fromkeys(each.resolve() for each in map(Path, parents) if each.is_absolute() and each.is_dir())
    return [each / f"broadcache-{uid}" for each in real]


def _bind_in(folder: Path, name: str) -> Bound:
    path, unfinished = folder / name, folder / f".{name}"
    if len(os.fsencode(unfinished)) > _PATH_BYTES_MAX:
        raise ValueError("its path is too long for a Unix socket")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700)
    with _entered(folder):
        # Under another name first: one that does not listen yet refuses connections, as a stale one does.
        bound = _bound(str(unfinished), path)
        try:
            unfinished.rename(path)
        except OSError:
            bound.socket.close()
            raise
    return bound


def _bound(address: str, path: Path | None) -> Bound:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.settimeout(None)
        listener.bind(address)
        listener.listen(_BACKLOG)
        if peer_of(listener) is None:
            raise OSError(errno.ENOTSUP, "the platform does not tell which user is at the other end of a socket")
    except BaseException:
        listener.close()
        raise
    return Bound(listener, address if path is None else str(path), path)


@contextlib.contextmanager
def _entered(folder: Path) -> Iterator[int]:
    """Open a directory that is this user's alone. Raises: OSError; PermissionError if it may be another user's."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _check(os.fstat(descriptor), folder.parent.stat())
        yield descriptor
    finally:
        os.close(descriptor)


def _check(own: os.stat_result, parent: os.stat_result) -> None:
    uid = os.geteuid()
    if own.st_uid != uid:
        raise PermissionError(errno.EPERM, f"expected a directory of user {uid}, got one of user {own.st_uid}")
    if stat.S_IMODE(own.st_mode) & 0o077:
        raise PermissionError(
            errno.EPERM, f"expected a directory of mode 0700, got {stat.S_IMODE(own.st_mode):04o}; remove it"
        )
    is_shared = parent.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not parent.st_mode & stat.S_ISVTX
    if is_shared or parent.st_uid not in (0, uid):
        raise PermissionError(errno.EPERM, "other users may replace it, since they may write to its parent directory")


def _found_in_folders() -> Iterator[Found]:
    for folder in _folders():
        with _unless_not_ours(), _entered(folder) as descriptor:
            for name in os.listdir(descriptor):  # noqa: PTH208  (of the directory that was checked)
                if _NAME.fullmatch(name):
                    yield Found(str(folder / name), folder / name)
                elif name.startswith("."):
                    with contextlib.suppress(OSError):
                        age_seconds = time.time() - os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mtime
                        if age_seconds > _UNFINISHED_SECONDS:
                            os.unlink(name, dir_fd=descriptor)


def _found_abstract() -> Iterator[Found]:
    for match in _matching(_ABSTRACT):
        if int(match[3]) == os.geteuid():
            yield Found("\0" + match[2][1:], None)


def _matching(pattern: re.Pattern[str]) -> list[re.Match[str]]:
    """Return the matching lines of /proc/net/unix; none where there is no such file."""
    if sys.platform != "linux":
        return []
    found: list[re.Match[str]] = []
    with _unless_not_ours(), _NAMES.open(encoding="utf-8", errors="replace") as lines:
        found += [match for line in lines if (match := pattern.fullmatch(line.rstrip("\n"))) is not None]
    return found


@contextlib.contextmanager
def _unless_not_ours() -> Iterator[None]:
    """Pass over what is missing or another user's. Raises: any other OSError, or siblings would go unnoticed."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise
