"""The operators' page: its static files, read once, and GET /page.json, the access of its user."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ....shared.invalidation import DEFAULT_NAMESPACE
from ....shared.process.tokens import Right, Tokens

__all__ = ["PAGE_PATHS", "PageAccess", "page_routes"]

_FOLDER: Final = Path(__file__).with_name("assets")
_MEDIA_TYPES: Final = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_ACCESS_PATH: Final = "/page.json"
_POLICY: Final = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Names that clients chose are inserted as text. With this, a browser refuses HTML from scripts.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def _files() -> dict[str, Path]:
    """The file at each path. Paths have one segment, so that they do not reserve names of services."""
    files = {f"/{file.name}": file for file in sorted(_FOLDER.iterdir()) if file.suffix in _MEDIA_TYPES}
    return {"/": files.pop("/page.html"), **files}


PAGE_PATHS: Final = frozenset({*_files(), _ACCESS_PATH})
"""The paths that need no token: their content is not secret, and nothing in it is from the log."""


class PageAccess(msgspec.Struct, frozen=True, kw_only=True):
    """The access of the page's user. Without a valid token, `right` is null and no namespace is listed.

    `namespaces` are the allowed ones; empty when any is allowed.
    """

    right: Right | None
    namespaces: tuple[str, ...]
    default_namespace: str


def page_routes(namespaces: Sequence[str], tokens: Tokens) -> list[Route]:
    """Return the routes of the page. Its files are read here."""

    async def access(request: Request) -> Response:
        right = tokens.authorize(request.scope["headers"]).right if tokens else "rw"
        answer = PageAccess(
            right=right,
            namespaces=tuple(namespaces) if right else (),
            default_namespace=namespaces[0] if namespaces and right else DEFAULT_NAMESPACE,
        )
        headers = {**_HEADERS, "Cache-Control": "no-store"}
        return Response(msgspec.json.encode(answer), headers=headers, media_type="application/json")

    routes = [_route(path, _File(file)) for path, file in _files().items()]
    return [*routes, Route(_ACCESS_PATH, access, methods=["GET"], include_in_schema=False)]


def _route(path: str, file: "_File") -> Route:
    async def answer(request: Request) -> Response:
        return file.answer_to(request)

    return Route(path, answer, methods=["GET"], include_in_schema=False)


class _File:
    """One file of the page; a browser that has the current version gets 304."""

    def __init__(self, file: Path) -> None:
        self._content = file.read_bytes()
        self._media_type = _MEDIA_TYPES[file.suffix]
        self._headers = {
            **_HEADERS,
            "Cache-Control": "no-cache",  # cached, but revalidated on each request: a new version takes effect at once
            "ETag": f'"{hashlib.sha256(self._content).hexdigest()[:32]}"',
        }

    def answer_to(self, request: Request) -> Response:
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if self._headers["ETag"] in known:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers, media_type=self._media_type)
