"""One form of a request's path for all that decide by it: the gate, the routes, and the fan-out."""

import re
from typing import Final
from urllib.parse import quote

from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["EncodedPath", "first_segment", "path_of", "sent_path_of"]

_UNRESERVED: Final = re.compile("%(2[DE]|3[0-9]|[46][1-9A-F]|[57][0-9A]|5F|7E)", re.ASCII | re.IGNORECASE)
_SENT: Final = "broadcache.sent_path"

_SAFE: Final = "/:@!$&'()*+,;=-._~"


class EncodedPath:
    """ASGI middleware that replaces the decoded path by its normal form: only unreserved characters are decoded.

    `/%68ealth/live` is then `/health/live` for the gate and for the router. Slashes, control characters and all others
    stay encoded, and make another path. The fan-out forwards the path as it was sent: `sent_path_of`.

    Source: RFC 3986 §6.2.2.2.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] in ("http", "websocket"):
            raw: bytes = scope.get("raw_path") or b""
            # Some servers leave it out, and some include the query.
            path = raw.partition(b"?")[0].decode("latin-1") or quote(scope["path"], safe=_SAFE)
            normal = _UNRESERVED.sub(lambda found: chr(int(found[1], 16)), path)
            scope = {**scope, "path": normal, _SENT: path}
        await self._app(scope, receive, send)


def path_of(scope: Scope) -> str:
    """Return the path below the one where the application is mounted, as the router sees it."""
    return _below_root(scope, scope["path"])


def sent_path_of(scope: Scope) -> str:
    """Return the same path as it was sent, with every escape that it had."""
    return _below_root(scope, scope[_SENT])


def _below_root(scope: Scope, path: str) -> str:
    root: str = scope.get("root_path", "")
    below = path.removeprefix(root)
    return below if root and below.startswith("/") else path


def first_segment(path: str) -> str:
    """Return the first segment of a path: the service of a broadcast, if the path is no route."""
    return path.removeprefix("/").partition("/")[0]
