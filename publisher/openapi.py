"""The API's OpenAPI document: what FastAPI cannot see in endpoints that read and write bytes."""

from typing import Any, Final

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from .. import __version__  # pyright: ignore[reportMissingImports]  (above this folder only once it is installed)
from . import problems
from .models import (
    Accepted,
    History,
    LoggedInvalidation,
    PreviewRequest,
    PublishRequest,
    Replicas,
    UnreadableEntry,
)
from .preview import Preview
from .problems import Kind, ProblemDocument

__all__ = ["HISTORY", "LIVE", "PREVIEW", "PUBLISH", "READY", "REPLICAS", "describe"]

_REF: Final = "#/components/schemas/{name}"
_SECURITY_SCHEME: Final = "bearer"

_TAGS: Final = [
    {"name": "invalidations", "description": "Say which entries every replica has to drop, and what was said before."},
    {"name": "replicas", "description": "Who is there, and how stale each can be."},
    {"name": "health", "description": "For load balancers and orchestrators. Needs no token."},
]

_REQUEST_EXAMPLES: Final = {
    "keys": {
        "summary": "One key",
        "value": {"namespace": "products", "keys": ["product:42"], "reason": "price change"},
    },
    "tags and prefixes": {
        "summary": "Whatever carries a tag, and whatever begins with a prefix",
        "value": {"namespace": "products", "tags": ["catalogue"], "prefixes": ["product:42:"]},
    },
    "everything": {
        "summary": "All entries of the namespace",
        "value": {"namespace": "products", "everything": True, "reason": "import finished"},
    },
    "confirmed": {
        "summary": "One key, and wait up to a second for every replica",
        "value": {"namespace": "products", "keys": ["product:42"], "confirm": {"timeout_seconds": 1}},
    },
}
_ACCEPTED_EXAMPLE: Final = {
    "id": "01JZ0000000000000000000000",
    "namespace": "products",
    "epoch": "01JY0000000000000000000000",
    "sequence": 42,
    "receivers": 3,
    "logged": True,
    "pending": False,
    "fanout": None,
}
_FANNED_OUT_EXAMPLE: Final = {
    "id": "01JZ0000000000000000000000",
    "namespace": "products",
    "epoch": None,
    "sequence": None,
    "receivers": 0,
    "logged": False,
    "pending": True,
    "fanout": {
        "service": "cache-replicas:8080",
        "total": 1,
        "succeeded": 1,
        "failed": 0,
        "complete": True,
        "discovery": "dns",
        "elapsed_ms": 3.1,
        "outcomes": [
            {
                "address": "http://10.42.0.7:8080/cache-invalidation",
                "status_code": 200,
                "error": None,
                "latency_ms": 2.4,
                "attempts": 1,
                "replica": "cache-replicas-0",
                "dropped": 1,
            }
        ],
        "problem": None,
    },
}
_ACCEPTED_EXAMPLES: Final = {
    "logged": {"summary": "The log has it", "value": _ACCEPTED_EXAMPLE},
    "fanned out": {
        "summary": "Redis was away: every replica has taken it, and it waits to be logged",
        "value": _FANNED_OUT_EXAMPLE,
    },
}
_UNCONFIRMED_EXAMPLE: Final = {
    **_ACCEPTED_EXAMPLE,
    "confirmation": {
        "is_complete": False,
        "expected": ["web-1", "web-2"],
        "confirmed": ["web-1"],
        "missing": ["web-2"],
        "replicas": [
            {
                "replica": "web-1",
                "outcome": "confirmed",
                "is_expected": True,
                "latency_ms": 0.71,
                "dropped": 1,
                "how": "message",
            },
            {
                "replica": "web-2",
                "outcome": "missing",
                "is_expected": True,
                "latency_ms": None,
                "dropped": None,
                "how": None,
            },
        ],
    },
}
_REPLICAS_EXAMPLE: Final = {
    "namespace": "products",
    "replicas": [
        {
            "replica": "web-1",
            "namespaces": ["products"],
            "host": "web-1.example",
            "pid": 17,
            "version": "1.0.0",
            "started_at": "2025-06-30T12:00:00.000Z",
            "seen_ms_ago": 412,
            "state": "coherent",
            "is_coherent": True,
            "position": {"epoch": "01JY0000000000000000000000", "sequence": 42},
            "behind": 0,
            "staleness_seconds": 1.43,
            "max_staleness_seconds": 5.0,
            "when_incoherent": "bypass",
            "entries": 1200,
            "hits": 9000,
            "misses": 1000,
            "bypassed": 0,
            "hit_ratio": 0.9,
            "clears": {"subscribed": 1},
            "clears_total": 1,
            "replays": 0,
            "gaps": 0,
            "lag_ms": 0.4,
        }
    ],
}
_PREVIEW_EXAMPLE: Final = {
    "namespace": "products",
    "replicas": 3,
    "entries": 12,
    "is_estimate": True,
    "by_replica": [
        {"replica": "web-1", "entries": 7, "is_estimate": False},
        {"replica": "web-2", "entries": 5, "is_estimate": False},
    ],
    "missing": ["web-3"],
}
_HISTORY_EXAMPLE: Final = {
    "namespace": "products",
    "invalidations": [
        {
            "sequence": 42,
            "epoch": "01JY0000000000000000000000",
            "id": "01JZ0000000000000000000000",
            "keys": ["product:42"],
            "tags": [],
            "prefixes": [],
            "everything": False,
            "reason": "price change",
            "source": "publisher-1",
            "sent_at": "2025-06-30T12:00:00.000Z",
        },
        {"sequence": 41, "unreadable": True},
    ],
    "next_before": 41,
}
_IDEMPOTENCY_KEY: Final = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Makes a retry safe: the same key with the same targets is published once, and answered as the "
    "first time. 1 to 255 printable ASCII characters, e.g. a UUID.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
    "example": "5f0e7c3a-8a47-4d5c-9a62-0b6f4a3f7c11",
}
_RETRY_AFTER: Final = {
    "Retry-After": {"description": "Seconds to wait before trying again.", "schema": {"type": "integer", "minimum": 0}}
}
_HEADERS_BY_STATUS: Final = {
    401: {"WWW-Authenticate": {"description": "Which kind of token is wanted.", "schema": {"type": "string"}}},
    405: {"Allow": {"description": "The methods of this path.", "schema": {"type": "string"}}},
    503: _RETRY_AFTER,
}


def _answered(description: str, schema: dict[str, Any], example: object) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema, "example": example}}}


def _accepted() -> dict[str, Any]:
    return {
        "description": "The log has accepted it, or every replica has taken it by HTTP.",
        "content": {"application/json": {"schema": _schema_of(Accepted)}},
    }


def _problems(*kinds: Kind) -> dict[int | str, dict[str, Any]]:
    """Describe the problems that an operation may answer, those of one status side by side."""
    described: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        document = ProblemDocument(type=kind.type, title=kind.title, status=kind.status, detail=kind.example)
        response = described.setdefault(
            kind.status,
            {
                "description": kind.title,
                "headers": _HEADERS_BY_STATUS.get(kind.status, {}),
                "content": {"application/problem+json": {"schema": _schema_of(ProblemDocument), "examples": {}}},
            },
        )
        examples = response["content"]["application/problem+json"]["examples"]
        examples[kind.name] = {"summary": kind.title, "value": msgspec.to_builtins(document)}
    return described


def _schema_of(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {"$ref": _REF.format(name=kind.__name__)}


_STATUS_SCHEMA: Final = {
    "type": "object",
    "properties": {"status": {"type": "string"}},
    "required": ["status"],
}

_REPLAYED: Final = {
    "headers": {
        "Idempotency-Replayed": {
            "description": "`true` when this Idempotency-Key had been published before, and nothing was now.",
            "schema": {"type": "string", "enum": ["true"]},
        }
    }
}

PUBLISH: Final[dict[str, Any]] = {
    "operation_id": "publish",
    "tags": ["invalidations"],
    "summary": "Make every replica forget",
    "description": "Logs one invalidation and publishes it, in one atomic step. 200 with `logged: true` means that the "
    "log has it: a replica that is away hears it when it is back. 200 with `logged: false` means that every replica "
    "has taken it by HTTP, which only a publisher with a second path answers. With `confirm` 200 means besides that "
    "every replica that is there has applied it; 207 (or what BROADCACHE_UNCONFIRMED_STATUS says) that it is "
    "delivered, and names those that have not said so in time. 503 means that it is not known to be delivered: send it "
    "again.",
    "responses": {
        200: _accepted() | _REPLAYED,
        207: _answered(
            "The log has accepted it, and not every replica has confirmed it.",
            _schema_of(Accepted),
            _UNCONFIRMED_EXAMPLE,
        )
        | _REPLAYED,
        **_problems(
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
            "content": {"application/json": {"schema": _schema_of(PublishRequest), "examples": _REQUEST_EXAMPLES}},
        },
    },
}
PREVIEW: Final[dict[str, Any]] = {
    "operation_id": "preview",
    "tags": ["invalidations"],
    "summary": "What would be forgotten",
    "description": "Asks the replicas that are there how many of their entries the targets name. Nothing is dropped, "
    "and nothing is logged. Takes up to a second when some do not answer: those are `missing`, as are replicas of "
    "older versions.",
    "responses": {
        200: _answered("How many replicas, and about how many entries.", _schema_of(Preview), _PREVIEW_EXAMPLE),
        **_problems(
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
                    "schema": _schema_of(PreviewRequest),
                    "examples": {name: _REQUEST_EXAMPLES[name] for name in _REQUEST_EXAMPLES if name != "confirmed"},
                }
            },
        },
    },
}
HISTORY: Final[dict[str, Any]] = {
    "operation_id": "history",
    "tags": ["invalidations"],
    "summary": "What was published",
    "description": "Reads a namespace's log, the newest first, a page at a time. The log is bounded: old invalidations "
    "are gone from it.",
    "responses": {
        200: _answered("One page of the log.", _schema_of(History), _HISTORY_EXAMPLE),
        **_problems(
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
    "summary": "Who is there",
    "description": "Lists the replicas of a namespace, as each was at its last echo, about a second ago. A replica "
    "that is gone disappears by itself, as soon as it can no longer serve what it proved before.",
    "responses": {
        200: _answered("The replicas that there are.", _schema_of(Replicas), _REPLICAS_EXAMPLE),
        **_problems(
            problems.TOKEN_INVALID,
            problems.NAMESPACE_UNKNOWN,
            problems.PARAMETER_INVALID,
            problems.INTERNAL_ERROR,
            problems.LOG_UNREACHABLE,
            problems.LOG_REFUSED,
        ),
    },
}
LIVE: Final[dict[str, Any]] = {
    "operation_id": "live",
    "tags": ["health"],
    "summary": "Does the process answer?",
    "description": "Always 200: a restart would not bring Redis back.",
    "responses": {200: _answered("It does.", _STATUS_SCHEMA, {"status": "live"})},
}
READY: Final[dict[str, Any]] = {
    "operation_id": "ready",
    "tags": ["health"],
    "summary": "Does Redis answer?",
    "description": "Reads from the log. Takes up to BROADCACHE_PUBLISH_TIMEOUT_SECONDS while Redis is away. With a "
    "second path, which delivers without Redis, it is always 200: `degraded` while something waits to be logged.",
    "responses": {
        200: _answered(
            "It does, or there is a second path: a publish can be delivered.", _STATUS_SCHEMA, {"status": "ready"}
        ),
        **_problems(problems.LOG_UNREACHABLE, problems.LOG_REFUSED),
    },
}


def describe(app: FastAPI, *, needs_token: bool) -> None:
    """Make `app` answer GET /openapi.json with the whole document."""
    app.title = "broadcache publisher"
    app.description = "Say which cache entries changed; every replica forgets them."
    app.version = __version__

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document_of(app, needs_token=needs_token)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document_of(app: FastAPI, *, needs_token: bool) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=_TAGS
    )
    # The framework leaves out whatever is null, also where an example says so.
    accepted = document["paths"]["/invalidations"]["post"]["responses"]["200"]
    accepted["content"]["application/json"]["examples"] = _ACCEPTED_EXAMPLES
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(_schemas())
    components["securitySchemes"] = {_SECURITY_SCHEME: {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            is_open = path.startswith("/health/")
            operation["security"] = [] if is_open else [{_SECURITY_SCHEME: []}, *([] if needs_token else [{}])]
    return document


def _schemas() -> dict[str, Any]:
    kinds = [PublishRequest, Accepted, History, Replicas, LoggedInvalidation, UnreadableEntry, ProblemDocument]
    kinds += [PreviewRequest, Preview]
    _, schemas = msgspec.json.schema_components(kinds, ref_template=_REF)
    schemas["History"]["properties"]["invalidations"]["items"] = {
        "anyOf": [_schema_of(LoggedInvalidation), _schema_of(UnreadableEntry)]
    }
    for name in ("LoggedInvalidation", "UnreadableEntry"):
        schemas[name]["additionalProperties"] = False
    return schemas
