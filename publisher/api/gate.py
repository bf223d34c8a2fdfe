"""Authentication and authorization in front of the API, by bearer tokens."""

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from ...shared.process.tokens import Tokens
from .documents.problems import RIGHT_MISSING, TOKEN_INVALID, Problem
from .paths import path_of
from .responses import problem_response

__all__ = ["TokenGate"]

_READING_METHODS: Final = frozenset({"GET", "HEAD"})


class TokenGate:
    """ASGI middleware that lets through requests with a valid bearer token, and those to `open_paths`.

    Shape:  paths have the same form as for the router (`EncodedPath`). `is_reading` returns whether GET and
            HEAD only read at a path: there a read-only token is enough.

    The gate covers every path, also paths without a route: a route that is added later is closed by default, and a
    client without a token does not learn which paths exist.
    """

    def __init__(
        self, app: ASGIApp, *, tokens: Tokens, open_paths: AbstractSet[str], is_reading: Callable[[str], bool]
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._open_paths = open_paths
        self._is_reading = is_reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond with a problem, or pass the request on."""
        if scope["type"] != "lifespan" and path_of(scope) not in self._open_paths:
            problem = self._objection_to(scope)
            if problem is not None:
                await problem_response(problem)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _objection_to(self, scope: Scope) -> Problem | None:
        right, headers = self._tokens.authorize(scope["headers"])
        if right is None:
            return _unauthorized(headers)
        reads = scope.get("method") in _READING_METHODS and self._is_reading(path_of(scope))
        if right == "ro" and not reads:
            return Problem(
                RIGHT_MISSING,
                f"this token may only read, and {scope.get('method')} needs the right to write; use a read-write token",
                headers={"WWW-Authenticate": 'Bearer realm="broadcache", error="insufficient_scope"'},
            )
        return None


def _unauthorized(headers: int) -> Problem:
    got, error = (
        ("an invalid one", ', error="invalid_token"') if headers == 1 else (f"{headers or 'no'} such headers", "")
    )
    return Problem(
        TOKEN_INVALID,
        f"expected one header 'Authorization: Bearer TOKEN' with a valid token, got {got}; ask the operator for one",
        headers={"WWW-Authenticate": f'Bearer realm="broadcache"{error}'},
    )
