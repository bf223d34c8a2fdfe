"""The API's OpenAPI document."""

from typing import Any, Final

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from .... import __version__  # pyright: ignore[reportMissingImports]  (above this folder only once it is installed)
from ...publishing.preview import Preview
from . import examples, problems
from .broadcast import BroadcastResult
from .invalidation_request import PreviewRequest, PublishRequest
from .models import Accepted, History, ListedNamespaces, LoggedInvalidation, Replicas, UnreadableEntry
from .operations import REF, answered, problem_responses, schema_of
from .problems import ProblemDocument

__all__ = ["describe"]

_SECURITY_SCHEME: Final = "bearer"
_TAGS: Final = [
    {"name": "invalidations", "description": "Publish invalidations, preview them, and read the log."},
    {"name": "replicas", "description": "The registered replicas, and how stale each can be."},
    {"name": "namespaces", "description": "The namespaces, with their logs and replicas."},
    {"name": "metrics", "description": "For Prometheus. A read-only token is enough."},
    {
        "name": "fan-out",
        "description": "Send one request to every replica of a service, and collect their responses.",
    },
    {"name": "health", "description": "For load balancers and orchestrators. Needs no token."},
]
_FANOUT_METHODS: Final = ("get", "post", "put", "patch", "delete", "head", "options", "trace")
"""The methods that OpenAPI can describe; other methods are broadcast as well."""
_FANOUT_METHODS_WITH_BODY: Final = frozenset({"post", "put", "patch", "options"})
_FANOUT_SUMMARY: Final = {
    "X-Broadcache-Fanout": {
        "description": "The counts of the result, e.g. `total=2, succeeded=1, failed=1, complete=true`.",
        "schema": {"type": "string"},
    }
}
_SERVICE: Final = {
    "name": "service",
    "in": "path",
    "required": True,
    "description": "The DNS name of a service in BROADCACHE_FANOUT_ALLOW; preferably of a headless service.",
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
    "description": "A port number, or a port name, which is looked up in SRV records.",
    "schema": {"type": "string", "pattern": f"^({_PORT_NUMBERS}|[A-Za-z](-?[A-Za-z0-9]){{0,14}})$", "maxLength": 15},
    "example": "8889",
}
_REST: Final = {
    "name": "rest",
    "in": "path",
    "required": True,
    "description": "The rest of the path, with slashes; it is sent to the replicas byte for byte, as is the query.",
    "schema": {"type": "string"},
    "example": "cache-invalidation",
}
_FANOUT_PROBLEMS: Final = (
    problems.TOKEN_INVALID,
    problems.RIGHT_MISSING,
    problems.FANOUT_REFUSED,
    problems.CROSS_SITE,
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
    """Make `app` respond to GET /openapi.json with the whole document.

    Shape:  `failure_status` is the status of a broadcast when an address did not answer 200 to 299.
    """
    app.title = "broadcache publisher"
    app.description = "Publish which cache entries changed; every replica drops them."
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
    # The framework drops nulls, also from examples: put those with nulls back.
    if "/invalidations" in document["paths"]:
        responses = document["paths"]["/invalidations"]["post"]["responses"]
        responses["200"]["content"]["application/json"]["examples"] = examples.ACCEPTED
        responses["207"]["content"]["application/json"]["examples"] = examples.UNCONFIRMED
        responses = document["paths"]["/invalidations/preview"]["post"]["responses"]
        responses["200"]["content"]["application/json"]["example"] = examples.PREVIEW
        responses = document["paths"]["/namespaces"]["get"]["responses"]
        responses["200"]["content"]["application/json"]["example"] = examples.NAMESPACES
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
    """Describe the fan-out, which is not a route."""
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
        "description": "Sent to the replicas unchanged.",
        "content": {"*/*": {"schema": {}, "example": {"everything": True}}},
    }
    return {
        "operationId": name,
        "tags": ["fan-out"],
        "summary": f"Send {method.upper()} to every replica",
        "description": "Looks the service up, sends the request to all of its addresses at once, and returns the "
        "response of each. Other methods, such as PURGE or BAN, are accepted as well.",
        "parameters": parameters,
        **({"requestBody": body} if method in _FANOUT_METHODS_WITH_BODY else {}),
        "responses": _fanout_responses(failure_status, has_body=method != "head"),
    }


def _fanout_responses(failure_status: int, *, has_body: bool) -> dict[str, Any]:
    responses = {str(status): response for status, response in problem_responses(*_FANOUT_PROBLEMS).items()}
    for status, description in (
        (200, "Every address answered 200 to 299."),
        (failure_status, "At least one address did not answer 200 to 299."),
    ):
        content = answered(description, schema_of(BroadcastResult), examples.BROADCAST)["content"]
        response = responses.setdefault(str(status), {"description": description, "content": {}})
        response["content"] |= content
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
        ListedNamespaces,
        LoggedInvalidation,
        UnreadableEntry,
        ProblemDocument,
        BroadcastResult,
        PreviewRequest,
        Preview,
    ]
    _, schemas = msgspec.json.schema_components(kinds, ref_template=REF)
    schemas["History"]["properties"]["invalidations"]["items"] = {
        "anyOf": [schema_of(LoggedInvalidation), schema_of(UnreadableEntry)]
    }
    for name in ("LoggedInvalidation", "UnreadableEntry"):
        schemas[name]["additionalProperties"] = False
    return schemas
