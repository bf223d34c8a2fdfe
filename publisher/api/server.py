"""Serves the API until it is told to end."""

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Final

import uvicorn
from fastapi import FastAPI
from starlette.datastructures import State

from ...shared.errors import BroadcacheError
from ...shared.process.logs import LogFormat, set_up_logging
from .app import create_app, create_fanout_app, takes_any_method
from .settings import ApiSettings, FanoutSettings

__all__ = ["AddressUnavailable", "listen", "new_server", "run", "serve", "url_of"]

_HTTP_IMPLEMENTATION: Final = "auto"
"""httptools where it is installed, else h11: uvicorn's names."""
_HTTP_IMPLEMENTATION_ANY_METHOD: Final = "h11"
"""httptools answers 400 to methods that it does not know, such as BAN: a fan-out takes them all."""
_SHUTDOWN_SECONDS: Final = 5
_KEEP_ALIVE_SECONDS: Final = 75
"""Longer than the 60 s that load balancers keep a connection: whoever sends must be the one who closes."""

logger = logging.getLogger("broadcache.publisher")


class AddressUnavailable(BroadcacheError, OSError):
    """The address to listen on is taken, or is none of this machine's."""


def serve(settings: FanoutSettings, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve the API until SIGINT or SIGTERM; requests that are being answered then have five seconds to end.

    Settings that are no ApiSettings mean the fan-out alone.

    Shape:  `on_ready` is called with the URL as soon as requests are taken. With `listen_port=0` it tells the port.
    Raises: InvalidSettings, AddressUnavailable.
    """
    with listen(settings.listen_host, settings.listen_port) as listener:
        url = url_of(settings.listen_host, listener)
        app = create_app(settings) if isinstance(settings, ApiSettings) else create_fanout_app(settings)
        run(
            app,
            listener,
            on_ready=lambda: _tell_ready(settings, url, on_ready),
            log_format=settings.log_format,
        )
    logger.info("closed %s", url)


def run(app: FastAPI, listener: socket.socket, *, on_ready: Callable[[], None], log_format: LogFormat = "text") -> None:
    """Serve any application on `listener` as `serve` does: `on_ready` is called when requests are taken."""
    set_up_logging(log_format)
    with _sigterm_as_interrupt(), contextlib.suppress(KeyboardInterrupt):
        new_server(app, on_ready=on_ready).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to `host` and `port` (0: a free one). Raises: AddressUnavailable."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        raise AddressUnavailable(
            f"expected {host} port {port} to be free to listen on, got: {error.strerror or error}; "
            "stop what listens there, or choose another port (0 takes a free one)"
        ) from error


def url_of(host: str, listener: socket.socket) -> str:
    """Return the URL under which `listener` is reached."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def new_server(app: FastAPI, *, on_ready: Callable[[], None]) -> uvicorn.Server:
    """Return the server, to be run with a listener; `on_ready` is called when it takes requests."""
    return _Server(
        uvicorn.Config(
            app,
            http=_HTTP_IMPLEMENTATION_ANY_METHOD if takes_any_method(app) else _HTTP_IMPLEMENTATION,
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            log_level="warning",
            # Our services look neither at the client's address nor at the scheme: nobody has to be believed.
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        ),
        on_ready,
        app.state,
    )


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None], state: State) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._state = state

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Streams never end by themselves, and uvicorn waits for them before it tells the lifespan.
        end_streams = getattr(self._state, "end_streams", None)
        if end_streams is not None:
            await end_streams()
        await super().shutdown(sockets)


def _tell_ready(settings: FanoutSettings, url: str, on_ready: Callable[[str], None] | None) -> None:
    access = f"{len(settings.tokens)} tokens" if settings.tokens else "no token: whoever reaches it may publish"
    namespaces = ", ".join(settings.namespaces) or "any" if isinstance(settings, ApiSettings) else "none, fan-out only"
    fanout = ", ".join(settings.fanout_allow) or "off"
    logger.info("listening on %s (%s; namespaces: %s; fan-out: %s)", url, access, namespaces, fanout)
    if on_ready is not None:
        on_ready(url)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the server as Ctrl-C does: in order, with what surrounds `serve` cleaned up, and exit code 0.

    uvicorn raises the signal again when it has closed, and by default that kills the process on the spot.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
