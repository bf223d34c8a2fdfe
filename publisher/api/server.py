"""Serves the API, or the fan-out alone, until SIGINT or SIGTERM."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi import FastAPI

from ...shared.process import serving
from ...shared.process.logs import set_up_logging
from ...shared.process.serving import listen, run, url_of
from .app import create_app, create_fanout_app, takes_any_method
from .settings import ApiSettings, FanoutSettings

if TYPE_CHECKING:
    from uvicorn import Server

__all__ = ["new_server", "serve"]

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
    return serving.new_server(app, on_ready=on_ready, takes_any_method=takes_any_method(app), end_streams=end_streams)


def _summary_of(settings: FanoutSettings) -> str:
    access = f"{len(settings.tokens)} tokens" if settings.tokens else "no token: any client may publish"
    namespaces = ", ".join(settings.namespaces) or "any" if isinstance(settings, ApiSettings) else "none, fan-out only"
    return f"{access}; namespaces: {namespaces}; fan-out: {', '.join(settings.fanout_allow) or 'off'}"
