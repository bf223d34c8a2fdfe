"""Exception handlers: each exception that a request raises becomes a problem document."""

import logging
from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from ...shared.errors import IdempotencyConflict, LinkLost, LogRefused, NotConnected, NotDelivered
from .documents.problems import (
    IDEMPOTENCY_CONFLICT,
    INTERNAL_ERROR,
    LOG_REFUSED,
    LOG_UNREACHABLE,
    METHOD_NOT_ALLOWED,
    NOT_DELIVERED,
    NOT_FOUND,
    PARAMETER_INVALID,
    Flaw,
    Problem,
    Reason,
)
from .responses import problem_response

__all__ = ["add_problem_handlers"]

_RETRY_AFTER: Final = {"Retry-After": "1"}

logger: logging.Logger = logging.getLogger("broadcache.publisher")


def add_problem_handlers(app: FastAPI) -> None:
    """Make `app` respond with a problem document to every exception, including unexpected ones."""

    async def own(request: Request, error: Problem) -> Response:
        return problem_response(error)

    async def conflict(request: Request, error: IdempotencyConflict) -> Response:
        return problem_response(Problem(IDEMPOTENCY_CONFLICT))

    async def unreachable(request: Request, error: LinkLost) -> Response:
        result = (
            f"Redis could not be reached for {_line_of(request)}: nothing was accepted"
            if isinstance(error, NotConnected)
            else f"Redis did not answer in time for {_line_of(request)}: it is not known whether anything was accepted"
        )
        problem = Problem(
            LOG_UNREACHABLE,
            f"{result}; send the request again, a POST with the same Idempotency-Key if it has one",
            reasons=(Reason(path="redis", detail=str(error.__cause__ or error)),),
            headers=_RETRY_AFTER,
        )
        return problem_response(problem)

    async def refused(request: Request, error: LogRefused) -> Response:
        problem = Problem(
            LOG_REFUSED,
            f"Redis refused {_line_of(request)}, and nothing was accepted unless `reasons` says so; send the request "
            "again, with the same Idempotency-Key if it has one, after the operator has fixed the cause in `reasons`",
            reasons=(Reason(path="redis", detail=str(error)),),
            headers=_RETRY_AFTER,
        )
        return problem_response(problem)

    async def undelivered(request: Request, error: NotDelivered) -> Response:
        outlook = "it waits to be logged until Redis is back" if error.is_pending else "it is not retried"
        problem = Problem(
            NOT_DELIVERED,
            f"the invalidation was neither acknowledged by Redis nor applied by every replica, {outlook}; send the "
            "request again, with the same Idempotency-Key if it has one",
            reasons=tuple(Reason(path=path, detail=detail) for path, detail in error.reasons),
            headers=_RETRY_AFTER,
        )
        return problem_response(problem)

    async def invalid_parameter(request: Request, error: RequestValidationError) -> Response:
        return problem_response(Problem(PARAMETER_INVALID, errors=tuple(map(_parameter_flaw_of, error.errors()))))

    async def of_framework(request: Request, error: HTTPException) -> Response:
        path = f"{request.url.path!r:.100}"
        if error.status_code == 405:
            allowed = ", ".join(_methods_at(app, request.url.path))
            detail = f"expected {allowed}, got {request.method} at {path}"
            return problem_response(Problem(METHOD_NOT_ALLOWED, detail, headers={"Allow": allowed}))
        return problem_response(Problem(NOT_FOUND, f"expected a path of this API (see /openapi.json), got {path}"))

    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # the client is gone: the response is only counted

    async def failed(request: Request, error: Exception) -> Response:
        # The server re-raises the error, and its traceback is logged there.
        logger.error("%s failed: %s", _line_of(request), type(error).__name__)
        return problem_response(Problem(INTERNAL_ERROR))

    app.exception_handlers |= {
        Problem: own,
        IdempotencyConflict: conflict,
        LinkLost: unreachable,
        LogRefused: refused,
        NotDelivered: undelivered,
        RequestValidationError: invalid_parameter,
        HTTPException: of_framework,
        ClientDisconnect: gone,
        Exception: failed,
    }


def _line_of(request: Request) -> str:
    return f"{request.method} {request.url.path}"


def _methods_at(app: FastAPI, path: str) -> list[str]:
    """Return all methods of a path. The framework reports only those of the first matching route."""
    routes = [route for route in app.routes if isinstance(route, Route) and route.path_regex.match(path)]
    return sorted({method for route in routes for method in route.methods or ()})


def _parameter_flaw_of(error: Mapping[str, Any]) -> Flaw:
    name = str(error["loc"][-1])
    if error["type"] == "extra_forbidden":
        return Flaw(parameter=name, detail=f"expected no query parameter {name!r:.100}; leave it out")
    expected = str(error["msg"]).replace("Input should be", "expected", 1)
    return Flaw(parameter=name, detail=f"{expected}, got {error['input']!r:.100} at query parameter {name}")
