"""The operators' page: static files, read once, and what the page asks about itself before anything else."""

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
        # Names that others chose are put in as text. With this, a browser refuses any other way.
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
    """The path of each file, as a browser asks for it. One segment each, so that no service's name is taken."""
    files = {f"/{file.name}": file for file in sorted(_FOLDER.iterdir()) if file.suffix in _MEDIA_TYPES}
    return {"/": files.pop("/page.html"), **files}


PAGE_PATHS: Final = frozenset({*_files(), _ACCESS_PATH})
"""What whoever has no token may ask for: it holds nothing of the log and nothing secret."""


class PageAccess(msgspec.Struct, frozen=True, kw_only=True):
    """What the page may do for whoever asks. `right` is null without a valid token; then no namespace is told either.

    `namespaces` are the only ones that may be used; any may, if there are none.
    """

    right: Right | None
    namespaces: tuple[str, ...]
    default_namespace: str


def page_routes(namespaces: Sequence[str], tokens: Tokens) -> list[Route]:
    """Return the routes of the page and its files, each of which is read here."""

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
    """One file of the page, as it is sent: a browser that has it already is told so."""

    def __init__(self, file: Path) -> None:
        self._content = file.read_bytes()
        self._media_type = _MEDIA_TYPES[file.suffix]
        self._headers = {
            **_HEADERS,
            "Cache-Control": "no-cache",  # kept, and asked about each time: a new version is seen at once
            "ETag": f'"{hashlib.sha256(self._content).hexdigest()[:32]}"',
        }

    def answer_to(self, request: Request) -> Response:
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if self._headers["ETag"] in known:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers, media_type=self._media_type)
