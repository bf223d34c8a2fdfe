"""The API's OpenAPI document: what FastAPI cannot see in endpoints that read and write bytes."""

from typing import Any, Final

import msgspec
from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse

from .... import __version__  # pyright: ignore[reportMissingImports]  (above this folder only once it is installed)
from ...publishing.preview import Preview
from . import problems
from .broadcast import BroadcastResult
from .models import (
    Accepted,
    History,
    LoggedInvalidation,
    PreviewRequest,
    PublishRequest,
    Replicas,
    UnreadableEntry,
)
from .problems import Kind, ProblemDocument

__all__ = ["EVENTS", "HISTORY", "LIVE", "METRICS", "PREVIEW", "PUBLISH", "READY", "REPLICAS", "describe"]

_REF: Final = "#/components/schemas/{name}"
_SECURITY_SCHEME: Final = "bearer"

_TAGS: Final = [
    {"name": "invalidations", "description": "Say which entries every replica has to drop, and what was said before."},
    {"name": "replicas", "description": "Who is there, and how stale each can be."},
    {"name": "metrics", "description": "For Prometheus. A token that may only read is enough."},
    {
        "name": "fan-out",
        "description": "Send one request to every replica of a service, and hear what each of them says.",
    },
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
                "outcome": "applied",
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
_CONFIRMED_REPLICA_EXAMPLE: Final = {
    "replica": "web-1",
    "outcome": "confirmed",
    "is_expected": True,
    "latency_ms": 0.71,
    "dropped": 1,
    "how": "message",
}
_UNCONFIRMED_EXAMPLE: Final = {
    **_ACCEPTED_EXAMPLE,
    "confirmation": {
        "is_complete": False,
        "expected": ["web-1", "web-2"],
        "confirmed": ["web-1"],
        "missing": ["web-2"],
        "doubt": None,
        "replicas": [
            _CONFIRMED_REPLICA_EXAMPLE,
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
_DOUBTED_EXAMPLE: Final = {
    **_ACCEPTED_EXAMPLE,
    "confirmation": {
        "is_complete": False,
        "expected": ["web-1"],
        "confirmed": ["web-1"],
        "missing": [],
        "doubt": "the registry of 'products' has existed for only 1.2 s: it is new or was lost, and a replica that it "
        "does not list may serve old values for up to 3.8 s more; confirm again after that time",
        "replicas": [_CONFIRMED_REPLICA_EXAMPLE],
    },
}
_UNCONFIRMED_EXAMPLES: Final = {
    "missing": {"summary": "A replica has not confirmed", "value": _UNCONFIRMED_EXAMPLE},
    "doubted": {"summary": "There may be replicas that are not registered", "value": _DOUBTED_EXAMPLE},
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
    "doubt": None,
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
    "examined": 2,
}
_EVENTS_EXAMPLE: Final = (
    "id: 01JY0000000000000000000000:41\nevent: linked\ndata: {}\n\n"
    "id: 01JY0000000000000000000000:42\nevent: invalidation\n"
    'data: {"sequence":42,"epoch":"01JY0000000000000000000000","id":"01JZ0000000000000000000000","keys":["product:42"],'
    '"tags":[],"prefixes":[],"everything":false,"reason":"price change","source":"publisher-1",'
    '"sent_at":"2025-06-30T12:00:00.000Z"}\n\n'
)
_LAST_EVENT_ID: Final = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "description": "Go on after the event of this id. Browsers send it by themselves when they come back.",
    "schema": {"type": "string", "maxLength": 100},
    "example": "01JY0000000000000000000000:42",
}
_METRICS_EXAMPLE: Final = """# HELP broadcache_publishes_total Publishes by outcome.
# TYPE broadcache_publishes_total counter
broadcache_publishes_total{namespace="products",outcome="accepted"} 42.0
"""
_IDEMPOTENCY_KEY: Final = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Makes a retry safe: the same key with the same targets is published once, and answered as the "
    "first time. It belongs to the token that it comes with: other tokens may use the same key. 1 to 255 printable "
    "ASCII characters, e.g. a UUID.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
    "example": "5f0e7c3a-8a47-4d5c-9a62-0b6f4a3f7c11",
}
_RETRY_AFTER: Final = {
    "Retry-After": {"description": "Seconds to wait before trying again.", "schema": {"type": "integer", "minimum": 0}}
}
_HEADERS_BY_STATUS: Final = {
    401: {"WWW-Authenticate": {"description": "Which kind of token is wanted.", "schema": {"type": "string"}}},
    405: {"Allow": {"description": "The methods of this path.", "schema": {"type": "string"}}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}


def _answered(description: str, schema: dict[str, Any], example: object) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema, "example": example}}}


def _accepted(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _schema_of(Accepted)}}}


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
    "has taken it by HTTP, which only a publisher with a second path answers. With `confirm` 200 also means that every "
    "replica that is there has applied it. 207 (or what BROADCACHE_UNCONFIRMED_STATUS says) means that it is "
    "delivered, and that replicas have not confirmed it in time (`missing`), or that there may be replicas which the "
    "registry does not list (`doubt`). 503 means that it is not known to be delivered: send it again.",
    "responses": {
        200: _accepted("The log has accepted it, or every replica has taken it by HTTP.") | _REPLAYED,
        207: _accepted("It is delivered, and it is not known that every replica has applied it.") | _REPLAYED,
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
    "older versions. `doubt` says why there may be replicas that were not asked.",
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
    "are gone from it. A page looks at 10,000 entries at most: with filters it may hold few, and yet not be the last.",
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
EVENTS: Final[dict[str, Any]] = {
    "operation_id": "events",
    "tags": ["invalidations"],
    "summary": "What is published, as it is",
    "description": "Server-Sent Events, without an end. `invalidation` and `unreadable` carry what GET /invalidations "
    "shows; their `id` is their place in the log, and there is none for what was published past it. `linked` means "
    "that events arrive from now on, `lost` that they do not until the next `linked`: then what was logged meanwhile "
    "comes first. `gap` means that something was missed that the log cannot tell.",
    "response_class": Response,
    "responses": {
        200: {
            "description": "The events.",
            "content": {"text/event-stream": {"schema": {"type": "string"}, "example": _EVENTS_EXAMPLE}},
        },
        **_problems(
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
    "summary": "What Prometheus wants to know",
    "description": "Counters and histograms since the process began, in the text form that Accept asks for. What each "
    "of them means: docs/metrics.md.",
    "response_class": PlainTextResponse,
    "responses": {
        200: {
            "description": "The metrics.",
            "content": {"text/plain": {"schema": {"type": "string"}, "example": _METRICS_EXAMPLE}},
        },
        **_problems(problems.TOKEN_INVALID, problems.INTERNAL_ERROR),
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

_FANOUT_METHODS: Final = ("get", "post", "put", "patch", "delete", "head", "options", "trace")
"""Those that OpenAPI has a word for; every other one is broadcast as well."""
_FANOUT_METHODS_WITH_BODY: Final = frozenset({"post", "put", "patch", "options"})
_BROADCAST_EXAMPLE: Final = {
    "responses": [
        {
            "statusCode": 200,
            "address": "http://10.42.0.224:8889/cache-invalidation?x=1",
            "error": None,
            "latencyMs": 1.25,
            "attempts": 1,
        },
        {
            "statusCode": None,
            "address": "http://10.42.0.225:8889/cache-invalidation?x=1",
            "error": "connection refused",
            "latencyMs": 162.5,
            "attempts": 3,
        },
    ],
    "total": 2,
    "succeeded": 1,
    "failed": 1,
    "complete": True,
    "discovery": "dns",
    "elapsedMs": 166.75,
    "bodyDropped": False,
    "notes": [],
}
_FANOUT_SUMMARY: Final = {
    "X-Broadcache-Fanout": {
        "description": "The counts of the answer, e.g. `total=2, succeeded=1, failed=1, complete=true`.",
        "schema": {"type": "string"},
    }
}
_SERVICE: Final = {
    "name": "service",
    "in": "path",
    "required": True,
    "description": "The name in DNS of a service that may be broadcast to; best that of a headless one.",
    "schema": {
        "type": "string",
        "maxLength": 253,
        "pattern": "^[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?([.][A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?)*$",
    },
    "example": "cache-replicas",
}
_PORT_NUMBERS: Final = (
    "[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"  # 1 to 65535
)
_PORT: Final = {
    "name": "port",
    "in": "path",
    "required": True,
    "description": "A port number, or the name of a port: SRV records tell its number.",
    "schema": {"type": "string", "pattern": f"^({_PORT_NUMBERS}|[A-Za-z](-?[A-Za-z0-9]){{0,14}})$", "maxLength": 15},
    "example": "8889",
}
_REST: Final = {
    "name": "rest",
    "in": "path",
    "required": True,
    "description": "The rest of the path, with slashes, goes on to the replicas byte for byte, as does the query.",
    "schema": {"type": "string"},
    "example": "cache-invalidation",
}
_FANOUT_PROBLEMS: Final = (
    problems.TOKEN_INVALID,
    problems.RIGHT_MISSING,
    problems.FANOUT_REFUSED,
    problems.SERVICE_NOT_FOUND,
    problems.BODY_TOO_LARGE,
    problems.SERVICE_INVALID,
    problems.BROADCASTS_TOO_MANY,
    problems.INTERNAL_ERROR,
    problems.RESOLVER_FAILED,
    problems.RESOLVER_TIMED_OUT,
    problems.BROADCAST_LOOP,
)


def describe(app: FastAPI, *, needs_token: bool, failure_status: int) -> None:
    """Make `app` answer GET /openapi.json with the whole document.

    Shape:  `failure_status` is what a broadcast answers that not every address took.
    """
    app.title = "broadcache publisher"
    app.description = "Say which cache entries changed; every replica forgets them."
    app.version = __version__

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document_of(app, needs_token=needs_token, failure_status=failure_status)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document_of(app: FastAPI, *, needs_token: bool, failure_status: int) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=_TAGS
    )
    # The framework leaves out whatever is null, also where an example says so.
    if "/invalidations" in document["paths"]:
        answers = document["paths"]["/invalidations"]["post"]["responses"]
        answers["200"]["content"]["application/json"]["examples"] = _ACCEPTED_EXAMPLES
        answers["207"]["content"]["application/json"]["examples"] = _UNCONFIRMED_EXAMPLES
        answers = document["paths"]["/invalidations/preview"]["post"]["responses"]
        answers["200"]["content"]["application/json"]["example"] = _PREVIEW_EXAMPLE
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(_schemas())
    components["securitySchemes"] = {_SECURITY_SCHEME: {"type": "http", "scheme": "bearer"}}
    document["paths"] |= _fanout_paths(failure_status)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            is_open = path.startswith("/health/")
            operation["security"] = [] if is_open else [{_SECURITY_SCHEME: []}, *([] if needs_token else [{}])]
    return document


def _fanout_paths(failure_status: int) -> dict[str, Any]:
    """Describe the fan-out, which stands in front of the routes and is none."""
    return {
        path: {
            method: _fanout_operation(f"broadcast_{method}{suffix}", method, parameters, failure_status)
            for method in _FANOUT_METHODS
        }
        for path, suffix, parameters in (
            ("/{service}/{port}", "", [_SERVICE, _PORT]),
            ("/{service}/{port}/{rest}", "_below", [_SERVICE, _PORT, _REST]),
        )
    }


def _fanout_operation(name: str, method: str, parameters: list[Any], failure_status: int) -> dict[str, Any]:
    body = {
        "required": False,
        "description": "Goes on to the replicas as it is.",
        "content": {"*/*": {"schema": {}, "example": {"everything": True}}},
    }
    return {
        "operationId": name,
        "tags": ["fan-out"],
        "summary": f"{method.upper()} at every replica",
        "description": "Looks the service up, sends the request to all of its addresses at once, and answers what each "
        "of them did with it. Other methods, such as PURGE or BAN, are taken as well.",
        "parameters": parameters,
        **({"requestBody": body} if method in _FANOUT_METHODS_WITH_BODY else {}),
        "responses": _fanout_responses(failure_status, has_body=method != "head"),
    }


def _fanout_responses(failure_status: int, *, has_body: bool) -> dict[str, Any]:
    responses = {str(status): response for status, response in _problems(*_FANOUT_PROBLEMS).items()}
    for status, description in (
        (200, "Every address answered 200 to 299."),
        (failure_status, "At least one address did not answer 200 to 299."),
    ):
        answered = _answered(description, _schema_of(BroadcastResult), _BROADCAST_EXAMPLE)
        response = responses.setdefault(str(status), {"description": description, "content": {}})
        response["content"] |= answered["content"]
        response["headers"] = {**response.get("headers", {}), **_FANOUT_SUMMARY}
    if not has_body:
        for response in responses.values():
            del response["content"]
    return dict(sorted(responses.items()))


def _schemas() -> dict[str, Any]:
    kinds = [
        PublishRequest,
        Accepted,
        History,
        Replicas,
        LoggedInvalidation,
        UnreadableEntry,
        ProblemDocument,
        BroadcastResult,
        PreviewRequest,
        Preview,
    ]
    _, schemas = msgspec.json.schema_components(kinds, ref_template=_REF)
    schemas["History"]["properties"]["invalidations"]["items"] = {
        "anyOf": [_schema_of(LoggedInvalidation), _schema_of(UnreadableEntry)]
    }
    for name in ("LoggedInvalidation", "UnreadableEntry"):
        schemas[name]["additionalProperties"] = False
    return schemas
