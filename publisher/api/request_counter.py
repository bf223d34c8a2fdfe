"""ASGI middleware that reports each request to an observer, by its route: clients cannot create metric series."""

from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..telemetry.observer import PublisherObserver

__all__ = ["FANOUT_ROUTE", "RequestCounter"]

FANOUT_ROUTE: Final = "/{service}/{port}/{rest}"
"""The route of broadcast requests."""
_NO_ROUTE: Final = "none"
_METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_CLIENT_GONE: Final = 499
"""The status that other servers log when a client disconnected before the response."""


class RequestCounter:
    """Counts every request, also those that the token gate refuses.

    Shape:  `route` is the template of the route, that of the fan-out for broadcasts, and `none` without a route or
            when the gate refused the request. Rare methods are counted as `other`.
    """

    def __init__(self, app: ASGIApp, *, observer: PublisherObserver) -> None:
        self._app = app
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and count its response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _CLIENT_GONE

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._observer.answered(method, _route_of(scope), status)


def _route_of(scope: Scope) -> str:
    if "broadcache.route" in scope:
        return str(scope["broadcache.route"])
    return str(getattr(scope.get("route"), "path", _NO_ROUTE))
