"""The HTTP side of a replica. The only module of the subscriber that needs FastAPI, so it is imported on first use."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.requests import ClientDisconnect

from ...shared.invalidation import Position
from ...shared.process.bodies import read_at_most
from ...shared.process.problems import PROBLEM_MEDIA_TYPE, BasicProblem, problem_type
from ...shared.process.tokens import Tokens
from ...shared.telemetry.exposition import can_expose, exposed
from ...shared.wire import FRAME_BYTES_MAX
from ..cache.local_cache import LocalCache
from ..following.applied import Applied
from ..metrics import Measurable, register
from .replica_token import replica_tokens

__all__ = ["Served", "router_of"]

_POST_DESCRIPTION: Final = (
    f"The body is one message of the wire format. An empty body, a malformed one, and one of more than "
    f"{FRAME_BYTES_MAX} bytes drop everything. A message that also arrives over Redis is applied again."
)
_POST_BODY: Final = {
    "requestBody": {
        "required": False,
        "content": {"application/json": {"schema": {}, "example": {"namespace": "products", "keys": ["product:42"]}}},
    }
}


class Served(Measurable, Protocol):
    """A subscriber, as far as its routes need it."""

    @property
    def caches_by_namespace(self) -> Mapping[str, LocalCache]:
        """The followed caches by namespace."""
        ...

    def position(self, namespace: str) -> Position | None:
        """The position of the last invalidation of `namespace` that was applied here."""
        ...

    def apply(self, body: bytes) -> Applied:
        """Apply the invalidation in the body of an HTTP request."""
        ...

    def restart_if_forked(self) -> None:
        """Start again, if this process was forked from one that runs the subscriber in a thread."""
        ...


def router_of(subscriber: Served, tokens: Tokens | None = None) -> APIRouter:
    """Return the routes of `subscriber`. How a load balancer uses them: docs/subscriber.md.

    Shape:  `tokens` are the tokens that POST accepts, by default those of BROADCACHE_REPLICA_TOKEN.
    Raises: InvalidSettings.
    """
    router = APIRouter(tags=["broadcache"])
    accepted = replica_tokens() if tokens is None else tokens

    @router.get("/health/live", summary="Does the process respond?")
    async def live() -> dict[str, str]:
        return {"status": "live", "replica": subscriber.replica_id}

    @router.get(
        "/health/ready",
        summary="Is the local cache coherent?",
        responses={503: {"description": "The cache is not coherent: it is bypassed, or may serve stale values."}},
    )
    async def ready() -> Response:
        subscriber.restart_if_forked()  # a load balancer may send no read before this process is ready
        state = subscriber.state
        return JSONResponse(
            {"status": "ready" if state == "coherent" else "not ready", "state": state},
            status_code=200 if state == "coherent" else 503,
        )

    @router.get("/cache-invalidation", summary="State, position, staleness and counters of this replica")
    async def status() -> dict[str, Any]:
        return describe(subscriber)

    @router.post(
        "/cache-invalidation",
        summary="Drop the entries that the body names",
        description=_POST_DESCRIPTION,
        responses={
            200: {"description": "Applied: the outcome, and how many entries were dropped."},
            401: {"description": "The request has no valid token."},
            403: {"description": "The request was sent by a web page of another site."},
        },
        openapi_extra=_POST_BODY,
    )
    async def forget(request: Request) -> Response:
        problem = _refusal_of(request, accepted)
        if problem is not None:
            return problem
        try:
            body = await _read_body(request)
        except ClientDisconnect:
            # Half a body is no invalidation: its targets are unknown.
            return Response(status_code=400)  # the client is gone and will not read it
        return JSONResponse(subscriber.apply(body).as_dict())

    if can_expose(f"replica {subscriber.replica_id}"):
        _add_metrics(router, subscriber)
    return router


def _add_metrics(router: APIRouter, subscriber: Served) -> None:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    register(subscriber, registry)

    @router.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=PlainTextResponse,
        responses={200: {"description": "The metrics of this replica, in the format of the Accept header."}},
    )
    async def metrics(request: Request) -> Response:
        text, media_type = exposed(registry, request.headers.get("accept"))
        return Response(text, media_type=media_type)


def describe(subscriber: Served) -> dict[str, Any]:
    """Return the replica's status as JSON types.

    Units: `staleness_seconds` is how long ago every accepted invalidation was proven to be applied here; null if never.
    """
    return {
        "replica": subscriber.replica_id,
        "state": subscriber.state,
        "received": subscriber.stats().received,
        "subscriptions": subscriber.stats().subscriptions,
        "lost": subscriber.stats().lost,
        "namespaces": {
            namespace: {
                "position": position and position._asdict(),
                "is_coherent": cache.is_coherent,
                "staleness_seconds": cache.staleness_seconds,
                "max_staleness_seconds": cache.max_staleness_seconds,
                "when_incoherent": cache.when_incoherent,
                "cache": asdict(cache.stats()),
            }
            for namespace, cache in subscriber.caches_by_namespace.items()
            for position in [subscriber.position(namespace)]
        },
    }


async def _read_body(request: Request) -> bytes:
    """Read the body, at most one byte more than a frame may have. Raises: ClientDisconnect."""
    return await read_at_most(request.stream(), FRAME_BYTES_MAX)


def _refusal_of(request: Request, tokens: Tokens) -> Response | None:
    if tokens and not _has_token(request, tokens):
        return _problem(
            401,
            "token-invalid",
            "A valid token is needed",
            "expected one header 'Authorization: Bearer TOKEN' with a valid token, got none; ask the operator for one",
            headers={"WWW-Authenticate": 'Bearer realm="broadcache"'},
        )
    if _is_cross_site(request):
        return _problem(
            403,
            "cross-site",
            "A web page of another site may not do this",
            "expected a request that was not sent by a web page of another site, got one by Sec-Fetch-Site or Origin; "
            "send it from a program",
        )
    return None


def _has_token(request: Request, tokens: Tokens) -> bool:
    return tokens.authorize(request.scope["headers"]).right is not None


def _is_cross_site(request: Request) -> bool:
    """Whether a browser sent the request for a web page of another site.

    Browsers send Sec-Fetch-Site, but not to plain HTTP addresses; there, Origin is compared with Host.
    """
    if sites := request.headers.getlist("sec-fetch-site"):
        return not set(sites) <= {"same-origin", "none"}
    host = request.headers.get("host", "").lower()
    return any(_host_of(origin) != host for origin in request.headers.getlist("origin"))


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _problem(status: int, kind: str, title: str, detail: str, *, headers: dict[str, str] | None = None) -> Response:
    document = BasicProblem(type=problem_type(kind), title=title, status=status, detail=detail)
    return Response(msgspec.json.encode(document), status, headers=headers, media_type=PROBLEM_MEDIA_TYPE)
