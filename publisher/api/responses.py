"""HTTP responses of the API: JSON, and problem documents."""

import msgspec
from starlette.responses import Response

from ...shared.process.problems import PROBLEM_MEDIA_TYPE
from .documents.problems import Problem

__all__ = ["json_response", "problem_response"]


def json_response(document: object, status: int = 200, *, headers: dict[str, str] | None = None) -> Response:
    """Return `document` as a response of this status."""
    return Response(msgspec.json.encode(document), status, headers=headers, media_type="application/json")


def problem_response(problem: Problem) -> Response:
    """Return `problem` as a response with its status and headers."""
    body = msgspec.json.encode(problem.document)
    return Response(body, problem.kind.status, headers=problem.headers, media_type=PROBLEM_MEDIA_TYPE)
