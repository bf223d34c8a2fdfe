"""The gate in front of the API: who has no token, or one without the right, does not get in."""

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from ...shared.process.tokens import Tokens
from .documents.problems import RIGHT_MISSING, TOKEN_INVALID, Problem

__all__ = ["TokenGate"]

_READING_METHODS: Final = frozenset({"GET", "HEAD"})


class TokenGate:
    """ASGI middleware that lets through requests with a valid bearer token, and those to `open_paths`.

    Shape:  `is_reading` tells of a request's path whether GET and HEAD only read there: then a token that may only
            read is enough for them.

    It stands in front of every path, whether there is something behind it or not: a route that is added later is
    closed until somebody opens it, and a stranger does not learn which paths exist.
    """

    def __init__(
        self, app: ASGIApp, *, tokens: Tokens, open_paths: AbstractSet[str], is_reading: Callable[[str], bool]
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._open_paths = open_paths
        self._is_reading = is_reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with a problem, or hand on."""
        if scope["type"] != "lifespan" and scope["path"] not in self._open_paths:
            problem = self._objection_to(scope)
            if problem is not None:
                await problem.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _objection_to(self, scope: Scope) -> Problem | None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return _unauthorized(f"{len(given) or 'no'} such headers", error="")
        right = self._tokens.right_of_header(given[0])
        if right is None:
            return _unauthorized("another", error=', error="invalid_token"')
        reads = scope.get("method") in _READING_METHODS and self._is_reading(scope["path"])
        if right == "ro" and not reads:
            return Problem(
                RIGHT_MISSING,
                f"expected a token that may write for {scope.get('method')}, got one that may only read; "
                "use a read-write token",
                headers={"WWW-Authenticate": 'Bearer realm="broadcache", error="insufficient_scope"'},
            )
        return None


def _unauthorized(got: str, *, error: str) -> Problem:
    return Problem(
        TOKEN_INVALID,
        f"expected one header 'Authorization: Bearer TOKEN' with a valid token, got {got}; ask the operator for one",
        headers={"WWW-Authenticate": f'Bearer realm="broadcache"{error}'},
    )
