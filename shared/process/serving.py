"""Serving an ASGI application until SIGINT or SIGTERM. uvicorn is imported when a server is made."""

import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from ..errors import BroadcacheError
from ..texts import host_and_port
from .bodies import UnfinishedBodies
from .extras import check_installed

if TYPE_CHECKING:
    from uvicorn import Server

__all__ = ["AddressUnavailable", "is_loopback", "listen", "new_server", "run", "url_of"]

_HTTP_IMPLEMENTATION: Final = "auto"
"""httptools where it is installed, else h11: uvicorn's names."""
_SHUTDOWN_SECONDS: Final = 5
_KEEP_ALIVE_SECONDS: Final = 75
"""Longer than the 60 s for which load balancers keep a connection: the client has to be the side that closes."""


class AddressUnavailable(BroadcacheError, OSError):
    """The address to listen on is in use, or is not an address of this machine."""


def run(server: "Server", listener: socket.socket) -> None:
    """Run `server` on `listener` until SIGINT or SIGTERM."""
    with _sigterm_as_interrupt(), contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket for a server, bound to `host` and `port` (0: a free one).

    Raises: AddressUnavailable; InvalidSettings when uvicorn, which runs the server, is not installed.
    """
    check_installed("the HTTP server", "uvicorn")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        raise AddressUnavailable(
            f"cannot listen on {host} port {port}: {error.strerror or error}; stop the process that uses the port, or "
            "choose another port (0 takes a free one)"
        ) from error


def url_of(host: str, listener: socket.socket) -> str:
    """Return the URL of `listener`."""
    return f"http://{host_and_port(host, listener.getsockname()[1])}"


def is_loopback(host: str) -> bool:
    """Whether a server on `host` can be reached only from this machine. No name but `localhost` is recognized."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def new_server(
    app: Any,
    *,
    on_ready: Callable[[], None],
    http: Any = None,
    end_streams: Callable[[], Awaitable[None]] | None = None,
) -> "Server":
    """Return a server for the ASGI application `app`. On shutdown, requests have five seconds to end; those
    whose body is not complete are answered 503 at once.

    Shape:  `on_ready` is called when the server accepts requests. `end_streams` is awaited when the shutdown begins:
            responses without an end have to end then. `http` is the class of another HTTP protocol, for uvicorn.
    """
    import uvicorn

    bodies = UnfinishedBodies(app)

    class ReportingServer(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                on_ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # uvicorn waits for requests and open streams before it ends the lifespan.
            bodies.end()
            if end_streams is not None:
                await end_streams()
            await super().shutdown(sockets)

    return ReportingServer(
        uvicorn.Config(
            bodies,
            http=http or _HTTP_IMPLEMENTATION,
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            log_level="warning",
            # Our services use neither the client's address nor the scheme, so no proxy has to be trusted.
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        )
    )


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Make SIGTERM end the server as Ctrl-C does: with an orderly shutdown of the caller, and exit code 0.

    uvicorn raises the signal again after its shutdown, and by default that kills the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
