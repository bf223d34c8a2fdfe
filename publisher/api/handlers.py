"""Turns what is raised while a request is answered into a problem document."""

import logging
from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from ...shared.errors import IdempotencyConflict, LinkLost, LogRefused, NotDelivered
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

__all__ = ["add_problem_handlers"]

_RETRY_AFTER_SECONDS: Final = 1

logger = logging.getLogger("broadcache.publisher")


def add_problem_handlers(app: FastAPI) -> None:
    """Make `app` answer whatever is raised in it, from a flaw of the request to a bug of ours, with a problem."""

    async def own(request: Request, error: Problem) -> Response:
        return error.response()

    async def conflict(request: Request, error: IdempotencyConflict) -> Response:
        return Problem(
            IDEMPOTENCY_CONFLICT,
            "expected the request that this Idempotency-Key was first used for, got one that names other targets; "
            "use a new key, or repeat the first request unchanged",
        ).response()

    async def unreachable(request: Request, error: LinkLost) -> Response:
        return Problem(
            LOG_UNREACHABLE,
            f"expected an answer from Redis for {_line_of(request)}, got none in time: nothing is known to be "
            "accepted; send the request again, a POST with the same Idempotency-Key if it has one",
            reasons=(Reason(path="redis", detail=str(error.__cause__ or error)),),
            headers={"Retry-After": str(_RETRY_AFTER_SECONDS)},
        ).response()

    async def refused(request: Request, error: LogRefused) -> Response:
        return Problem(
            LOG_REFUSED,
            f"expected Redis to carry out {_line_of(request)}, it refused: nothing was accepted; send it again when "
            "the operator has mended what the reasons say",
            reasons=(Reason(path="redis", detail=str(error)),),
            headers={"Retry-After": str(_RETRY_AFTER_SECONDS)},
        ).response()

    async def undelivered(request: Request, error: NotDelivered) -> Response:
        outlook = "it waits to be logged when Redis takes it" if error.is_pending else "it is not tried again"
        return Problem(
            NOT_DELIVERED,
            f"expected the invalidation to be logged, or taken by every replica, got neither: {outlook}; send the "
            "request again, with the same Idempotency-Key if it has one",
            reasons=tuple(Reason(path=path, detail=detail) for path, detail in error.reasons),
            headers={"Retry-After": str(_RETRY_AFTER_SECONDS)},
        ).response()

    async def invalid_parameter(request: Request, error: RequestValidationError) -> Response:
        return Problem(PARAMETER_INVALID, errors=tuple(map(_parameter_flaw_of, error.errors()))).response()

    async def of_framework(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            allowed = ", ".join(_methods_at(app, request.url.path))
            return Problem(
                METHOD_NOT_ALLOWED,
                f"expected {allowed}, got {request.method} at {request.url.path!r:.100}",
                headers={"Allow": allowed},
            ).response()
        return Problem(
            NOT_FOUND, f"expected a path of this API (see /openapi.json), got {request.url.path!r:.100}"
        ).response()

    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody is there to read it

    async def failed(request: Request, error: Exception) -> Response:
        # The server gets the error as well, and logs its traceback.
        logger.error("%s failed: %s", _line_of(request), type(error).__name__)
        return Problem(INTERNAL_ERROR, INTERNAL_ERROR.example).response()

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
    """Return all methods of a path: the framework names those of the first route alone."""
    routes = [route for route in app.routes if isinstance(route, Route) and route.path_regex.match(path)]
    return sorted({method for route in routes for method in route.methods or ()})


def _parameter_flaw_of(error: Mapping[str, Any]) -> Flaw:
    name = str(error["loc"][-1])
    if error["type"] == "extra_forbidden":
        return Flaw(parameter=name, detail=f"expected no query parameter {name!r:.100}; leave it out")
    expected = str(error["msg"]).replace("Input should be", "expected", 1)
    return Flaw(parameter=name, detail=f"{expected}, got {error['input']!r:.100} at query parameter {name}")
