"""Serves the API, or the fan-out alone, until SIGINT or SIGTERM."""

import asyncio
import logging
import re
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, Final

from fastapi import FastAPI

from ...shared.process import serving
from ...shared.process.logs import set_up_logging
from ...shared.process.serving import listen, run, url_of
from .app import create_app, create_fanout_app, own_segments, takes_any_method
from .settings import ApiSettings, FanoutSettings

if TYPE_CHECKING:
    from uvicorn import Server

__all__ = ["new_server", "serve"]

_API_METHODS: Final = b"GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS"

logger: logging.Logger = logging.getLogger("broadcache.publisher")


def serve(settings: FanoutSettings, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve the API until SIGINT or SIGTERM; requests in progress then have five seconds to end.

    With plain FanoutSettings, serve the fan-out alone.

    Shape:  `on_ready` is called with the URL when the server accepts requests; with `listen_port=0`, the URL has the
            chosen port.
    Raises: InvalidSettings, AddressUnavailable.
    """
    set_up_logging(settings.log_format)  # first: making the application logs what it lacks
    with listen(settings.listen_host, settings.listen_port) as listener:
        url = url_of(settings.listen_host, listener)

        def ready() -> None:
            logger.info("listening on %s (%s)", url, _summary_of(settings))
            if on_ready is not None:
                on_ready(url)

        app = create_app(settings) if isinstance(settings, ApiSettings) else create_fanout_app(settings)
        run(new_server(app, on_ready=ready), listener)
    logger.info("closed %s", url)


def new_server(app: FastAPI, *, on_ready: Callable[[], None]) -> "Server":
    """Return a server for `app`, the API or the fan-out alone; `on_ready` is called when it accepts requests."""
    end_streams = getattr(app.state, "end_streams", None)
    http = any_method_protocol(own_segments(app)) if takes_any_method(app) else None
    return serving.new_server(app, on_ready=on_ready, http=http, end_streams=end_streams)


def any_method_protocol(own: AbstractSet[str]) -> Any:
    """Return the protocol class of a server that accepts all methods, for uvicorn.

    httptools is several times as fast as h11, but responds 400 to unknown methods, such as BAN. So it parses requests
    to the API's own paths, and h11 those to any other path: from the first of them on, h11 has the connection.

    Shape: `own` are the first segments of the API's paths. Without any, or without httptools, all is for h11.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    if not own:
        return H11Protocol
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return H11Protocol
    segments = b"|".join(re.escape(segment.encode()) for segment in sorted(own))
    begins_own_request = re.compile(b"(?:%s) /(?:%s)[ /?]" % (_API_METHODS, segments)).match

    class OwnPathsFirst(HttpToolsProtocol):
        _is_between_requests = True

        def data_received(self, data: bytes) -> None:
            # A request in parts that are too small to see its path is for h11 as well.
            if self._is_between_requests and self._is_answered and not begins_own_request(data):
                self._hand_over(data)
            else:
                super().data_received(data)

        def on_message_begin(self) -> None:
            self._is_between_requests = False
            super().on_message_begin()

        def on_message_complete(self) -> None:
            self._is_between_requests = True
            super().on_message_complete()

        @property
        def _is_answered(self) -> bool:
            cycle: Any = self.cycle  # None before the first request
            return cycle is None or bool(cycle.response_complete)

        def _hand_over(self, data: bytes) -> None:
            self._unset_keepalive_if_required()
            self.connections.discard(self)
            successor: asyncio.Protocol = H11Protocol(self.config, self.server_state, self.app_state, self.loop)
            successor.connection_made(self.transport)
            self.transport.set_protocol(successor)
            successor.data_received(data)

    return OwnPathsFirst


def _summary_of(settings: FanoutSettings) -> str:
    access = f"{len(settings.tokens)} tokens" if settings.tokens else "no token: any client may publish"
    namespaces = ", ".join(settings.namespaces) or "any" if isinstance(settings, ApiSettings) else "none, fan-out only"
    return f"{access}; namespaces: {namespaces}; fan-out: {', '.join(settings.fanout_allow) or 'off'}"
