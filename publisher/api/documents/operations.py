"""The OpenAPI description of each route. FastAPI cannot derive it, because the endpoints read and write bytes."""

from typing import Any, Final

import msgspec
from fastapi import Response
from fastapi.responses import PlainTextResponse

from ...publishing.preview import Preview
from . import examples, problems
from .invalidation_request import PreviewRequest, PublishRequest
from .models import Accepted, History, ListedNamespaces, Replicas
from .problems import Kind, ProblemDocument

__all__ = [
    "EVENTS",
    "FORGET",
    "HISTORY",
    "LIVE",
    "METRICS",
    "NAMESPACES",
    "PREVIEW",
    "PUBLISH",
    "READY",
    "REF",
    "REPLICAS",
    "answered",
    "problem_responses",
    "schema_of",
]

REF: Final = "#/components/schemas/{name}"
_IDEMPOTENCY_KEY: Final = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Makes a retry safe: the same key with the same targets is published once, and a retry gets the "
    "first response again. Keys are scoped to the token of the request: other tokens may use the same key. 1 to 255 "
    "printable ASCII characters, e.g. a UUID.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
    "example": "5f0e7c3a-8a47-4d5c-9a62-0b6f4a3f7c11",
}
_LAST_EVENT_ID: Final = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "description": "Continue after the event with this id. Browsers send it when they reconnect.",
    "schema": {"type": "string", "maxLength": 100},
    "example": "01JY0000000000000000000000:42",
}
_REPLAYED: Final = {
    "headers": {
        "Idempotency-Replayed": {
            "description": "`true` when this Idempotency-Key was published before, and nothing was published now.",
            "schema": {"type": "string", "enum": ["true"]},
        }
    }
}
_RETRY_AFTER: Final = {
    "Retry-After": {"description": "Seconds to wait before trying again.", "schema": {"type": "integer", "minimum": 0}}
}
_HEADERS_BY_STATUS: Final = {
    401: {"WWW-Authenticate": {"description": "The required authentication scheme.", "schema": {"type": "string"}}},
    405: {"Allow": {"description": "The methods of this path.", "schema": {"type": "string"}}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}


def answered(description: str, schema: dict[str, Any], example: object) -> dict[str, Any]:
    """Describe a JSON response."""
    return {"description": description, "content": {"application/json": {"schema": schema, "example": example}}}


def _accepted(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema_of(Accepted)}}}


def problem_responses(*kinds: Kind) -> dict[int | str, dict[str, Any]]:
    """Describe the problem responses of an operation, one for each status."""
    described: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        document = ProblemDocument(type=kind.type, title=kind.title, status=kind.status, detail=kind.example)
        response = described.setdefault(
            kind.status,
            {
                "description": kind.title,
                "headers": _HEADERS_BY_STATUS.get(kind.status, {}),
                "content": {"application/problem+json": {"schema": schema_of(ProblemDocument), "examples": {}}},
            },
        )
        examples = response["content"]["application/problem+json"]["examples"]
        examples[kind.name] = {"summary": kind.title, "value": msgspec.to_builtins(document)}
    return described


def schema_of(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Return a reference to the schema of `kind`."""
    return {"$ref": REF.format(name=kind.__name__)}


_STATUS_SCHEMA: Final = {
    "type": "object",
    "properties": {"status": {"type": "string"}},
    "required": ["status"],
}
PUBLISH: Final[dict[str, Any]] = {
    "operation_id": "publish",
    "tags": ["invalidations"],
    "summary": "Publish an invalidation",
    "description": "Logs one invalidation and publishes it, in one atomic step. 200 with `logged: true`: the log has "
    "it, and a disconnected replica applies it when it reconnects. 200 with `logged: false`: every replica has applied "
    "it by HTTP; only a publisher with a second path responds so. With `confirm`, 200 also means that every registered "
    "replica has applied it. 207 (or BROADCACHE_UNCONFIRMED_STATUS): it is delivered, but replicas have not confirmed "
    "it in time (`missing`), or there may be replicas that the registry does not list (`doubt`). 503: it is not known "
    "to be delivered; send it again.",
    "responses": {
        200: _accepted("The log has accepted it, or every replica has applied it by HTTP.") | _REPLAYED,
        207: _accepted("It is delivered, but not every replica is known to have applied it.") | _REPLAYED,
        **problem_responses(
            problems.BODY_UNREADABLE,
            problems.IDEMPOTENCY_KEY_INVALID,
            problems.TOKEN_INVALID,
            problems.RIGHT_MISSING,
            problems.NAMESPACE_UNKNOWN,
            problems.BODY_TOO_LARGE,
            problems.MEDIA_TYPE_UNSUPPORTED,
            problems.INVALIDATION_INVALID,
            problems.IDEMPOTENCY_CONFLICT,
            problems.INTERNAL_ERROR,
            problems.LOG_UNREACHABLE,
            problems.LOG_REFUSED,
            problems.NOT_DELIVERED,
        ),
    },
    "openapi_extra": {
        "parameters": [_IDEMPOTENCY_KEY],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema_of(PublishRequest), "examples": examples.REQUESTS}},
        },
    },
}
PREVIEW: Final[dict[str, Any]] = {
    "operation_id": "preview",
    "tags": ["invalidations"],
    "summary": "Preview an invalidation",
    "description": "Queries the registered replicas for the number of their entries that match the targets. Nothing is "
    "dropped, and nothing is logged. Takes up to a second when a replica does not answer: it is then listed in "
    "`missing`, as are replicas of older versions. `doubt` says why there may be replicas that were not queried.",
    "responses": {
        200: answered(
            "The number of replicas, and the number of entries, which may be an estimate.",
            schema_of(Preview),
            examples.PREVIEW,
        ),
        **problem_responses(
            problems.BODY_UNREADABLE,
            problems.TOKEN_INVALID,
            problems.RIGHT_MISSING,
            problems.NAMESPACE_UNKNOWN,
            problems.LOG_MISSING,
            problems.BODY_TOO_LARGE,
            problems.MEDIA_TYPE_UNSUPPORTED,
            problems.INVALIDATION_INVALID,
            problems.INTERNAL_ERROR,
            problems.LOG_UNREACHABLE,
            problems.LOG_REFUSED,
        ),
    },
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": schema_of(PreviewRequest),
                    "examples": {name: examples.REQUESTS[name] for name in examples.REQUESTS if name != "confirmed"},
                }
            },
        },
    },
}
HISTORY: Final[dict[str, Any]] = {
    "operation_id": "history",
    "tags": ["invalidations"],
    "summary": "Read the log",
    "description": "Reads a namespace's log, the newest first, a page at a time. The log is bounded: old invalidations "
    "are removed from it. A page examines at most 10,000 entries: with filters, a page with few results need not be "
    "the last.",
    "responses": {
        200: answered("One page of the log.", schema_of(History), examples.HISTORY),
        **problem_responses(
            problems.TOKEN_INVALID,
            problems.NAMESPACE_UNKNOWN,
            problems.LOG_MISSING,
            problems.PARAMETER_INVALID,
            problems.INTERNAL_ERROR,
            problems.LOG_UNREACHABLE,
            problems.LOG_REFUSED,
        ),
    },
}
REPLICAS: Final[dict[str, Any]] = {
    "operation_id": "replicas",
    "tags": ["replicas"],
    "summary": "List the replicas",
    "description": "Lists the registered replicas of a namespace, each as of its last echo, about a second ago, and "
    "the silent ones: those that were killed, frozen or cut off within a day, and were not forgotten. A replica that "
    "closes removes itself.",
    "responses": {
        200: answered("The registered replicas.", schema_of(Replicas), examples.REPLICAS),
        **problem_responses(
            problems.TOKEN_INVALID,
            problems.NAMESPACE_UNKNOWN,
            problems.PARAMETER_INVALID,
            problems.INTERNAL_ERROR,
            problems.LOG_UNREACHABLE,
            problems.LOG_REFUSED,
        ),
    },
}
FORGET: Final[dict[str, Any]] = {
    "operation_id": "forget_replica",
    "tags": ["replicas"],
    "summary": "Forget a silent replica",
    "description": "Removes a silent replica from the list: it has ended for good. Confirmations no longer expect it. "
    "If it still runs, its next echo lists it again.",
    "response_class": Response,
    "status_code": 204,
    "responses": {
        204: {"description": "It is forgotten."},
        **problem_responses(
            problems.TOKEN_INVALID,
            problems.RIGHT_MISSING,
            problems.NAMESPACE_UNKNOWN,
            problems.REPLICA_UNKNOWN,
            problems.LOG_MISSING,
            problems.REPLICA_REGISTERED,
            problems.PARAMETER_INVALID,
            problems.INTERNAL_ERROR,
            problems.LOG_UNREACHABLE,
            problems.LOG_REFUSED,
        ),
    },
}
NAMESPACES: Final[dict[str, Any]] = {
    "operation_id": "namespaces",
    "tags": ["namespaces"],
    "summary": "List the namespaces",
    "description": "Lists the namespaces that have keys in Redis, by name, with their logs and replicas; of those in "
    "BROADCACHE_NAMESPACES, if it is set. Without it, each page scans the keys of the database, in slices. A namespace "
    "stays until `broadcache namespaces --forget` removes it.",
    "responses": {
        200: answered("The namespaces.", schema_of(ListedNamespaces), examples.NAMESPACES),
        **problem_responses(
            problems.TOKEN_INVALID,
            problems.LOG_MISSING,
            problems.PARAMETER_INVALID,
            problems.INTERNAL_ERROR,
            problems.LOG_UNREACHABLE,
            problems.LOG_REFUSED,
        ),
    },
}
EVENTS: Final[dict[str, Any]] = {
    "operation_id": "events",
    "tags": ["invalidations"],
    "summary": "Follow the invalidations",
    "description": "An endless stream of Server-Sent Events. `invalidation` and `unreadable` carry the entries of "
    "GET /invalidations; their `id` is the position in the log, and invalidations published past the log have none. "
    "`linked`: events arrive from now on. `lost`: no events arrive until the next `linked`, which is followed by the "
    "invalidations logged in between. `gap`: something was missed that is no longer in the log.",
    "response_class": Response,
    "responses": {
        200: {
            "description": "The events.",
            "content": {"text/event-stream": {"schema": {"type": "string"}, "example": examples.EVENTS}},
        },
        **problem_responses(
            problems.TOKEN_INVALID,
            problems.NAMESPACE_UNKNOWN,
            problems.PARAMETER_INVALID,
            problems.INTERNAL_ERROR,
            problems.STREAMS_EXHAUSTED,
        ),
    },
    "openapi_extra": {"parameters": [_LAST_EVENT_ID]},
}
METRICS: Final[dict[str, Any]] = {
    "operation_id": "metrics",
    "tags": ["metrics"],
    "summary": "Metrics for Prometheus",
    "description": "Counters and histograms since the process started, in the text format that Accept asks for. "
    "Described in docs/metrics.md.",
    "response_class": PlainTextResponse,
    "responses": {
        200: {
            "description": "The metrics.",
            "content": {"text/plain": {"schema": {"type": "string"}, "example": examples.METRICS}},
        },
        **problem_responses(problems.TOKEN_INVALID, problems.INTERNAL_ERROR),
    },
}
LIVE: Final[dict[str, Any]] = {
    "operation_id": "live",
    "tags": ["health"],
    "summary": "Does the process answer?",
    "description": "Always 200: a restart would not bring Redis back.",
    "responses": {200: answered("The process answers.", _STATUS_SCHEMA, {"status": "live"})},
}
READY: Final[dict[str, Any]] = {
    "operation_id": "ready",
    "tags": ["health"],
    "summary": "Does Redis answer?",
    "description": "Reads from the log. Takes up to BROADCACHE_PUBLISH_TIMEOUT_SECONDS while Redis is unreachable. "
    "With a second path, which delivers without Redis, always 200: `degraded` while invalidations wait to be logged.",
    "responses": {
        200: answered(
            "Redis answers, or there is a second path: an invalidation can be delivered.",
            _STATUS_SCHEMA,
            {"status": "ready"},
        ),
        **problem_responses(problems.LOG_UNREACHABLE, problems.LOG_REFUSED),
    },
}
