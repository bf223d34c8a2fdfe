"""One form of a request's path for all that decide by it: the gate, the routes, and the fan-out."""

from typing import Final
from urllib.parse import quote

from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["EncodedPath", "first_segment", "path_of"]

_SAFE: Final = "/:@!$&'()*+,;=-._~"


class EncodedPath:
    """ASGI middleware that replaces the decoded path by the path as it was sent, still percent-encoded.

    The API's own paths need no encoding, so they are reached by one spelling only: `/%68ealth/live` is no path of the
    API, neither for the gate nor for the router. It is then treated like any other path, as one of the fan-out.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] in ("http", "websocket"):
            raw: bytes = scope.get("raw_path") or b""
            # Some servers leave it out, and some include the query.
            path = raw.partition(b"?")[0].decode("latin-1") or quote(scope["path"], safe=_SAFE)
            scope = {**scope, "path": path}
        await self._app(scope, receive, send)


def path_of(scope: Scope) -> str:
    """Return the path below the one where the application is mounted, as the router sees it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    below = path.removeprefix(root)
    return below if root and below.startswith("/") else path


def first_segment(path: str) -> str:
    """Return the first segment of a path: the service of a broadcast, if the path is no route."""
    return path.removeprefix("/").partition("/")[0]
