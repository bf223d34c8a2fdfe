"""The HTTP side of a replica: the only module of this package that needs FastAPI, imported when a router is wanted."""

from dataclasses import asdict
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.requests import ClientDisconnect

from ...shared.process.bodies import read_at_most
from ...shared.process.problems import PROBLEM_MEDIA_TYPE, BasicProblem, problem_type
from ...shared.process.tokens import Tokens
from ...shared.telemetry.exposition import can_expose, exposed
from ...shared.wire import FRAME_BYTES_MAX
from ..subscriber import Subscriber
from .replica_token import replica_tokens

__all__ = ["router_of"]

_POST_DESCRIPTION: Final = (
    "The body is one message of the wire format. An empty body, one that cannot be read, and one of more than "
    f"{FRAME_BYTES_MAX} bytes mean everything. What also comes over Redis is applied again."
)
_POST_BODY: Final = {
    "requestBody": {
        "required": False,
        "content": {"application/json": {"schema": {}, "example": {"namespace": "products", "keys": ["product:42"]}}},
    }
}


def router_of(subscriber: Subscriber, tokens: Tokens | None = None) -> APIRouter:
    """Return routes that tell the truth about `subscriber`. What they mean to a load balancer: docs/subscriber.md.

    Shape:  `tokens` is who may POST, without rights; those of BROADCACHE_REPLICA_TOKEN when it is left out.
    Raises: InvalidSettings.
    """
    router = APIRouter(tags=["broadcache"])
    accepted = replica_tokens() if tokens is None else tokens

    @router.get("/health/live", summary="Does the process answer?")
    async def live() -> dict[str, str]:
        return {"status": "live", "replica": subscriber.replica_id}

    @router.get(
        "/health/ready",
        summary="Is the local cache coherent?",
        responses={503: {"description": "The link to Redis is not proven; the cache is bypassed, or served stale."}},
    )
    async def ready() -> Response:
        state = subscriber.state
        return JSONResponse(
            {"status": "ready" if state == "coherent" else "not ready", "state": state},
            status_code=200 if state == "coherent" else 503,
        )

    @router.get("/cache-invalidation", summary="What has this replica applied, and how stale can it be?")
    async def status() -> dict[str, Any]:
        return describe(subscriber)

    @router.post(
        "/cache-invalidation",
        summary="Forget what the body names",
        description=_POST_DESCRIPTION,
        responses={
            200: {"description": "It is forgotten: what became of it, and how many entries were dropped."},
            401: {"description": "A token is needed, and there was none that is valid."},
            403: {"description": "A web page of another site may not make a replica forget."},
        },
        openapi_extra=_POST_BODY,
    )
    async def forget(request: Request) -> Response:
        problem = _objection_to(request, accepted)
        if problem is not None:
            return problem
        try:
            body = await _read_body(request)
        except ClientDisconnect:
            # Half a body is no order: nobody has said what it would have named.
            return Response(status_code=400)  # which nobody is there to read
        return JSONResponse(subscriber.apply(body).as_dict())

    if can_expose(f"replica {subscriber.replica_id}"):
        _add_metrics(router, subscriber)
    return router


def _add_metrics(router: APIRouter, subscriber: Subscriber) -> None:
    from prometheus_client import CollectorRegistry

    from ..metrics import register

    registry = CollectorRegistry()
    register(subscriber, registry)

    @router.get(
        "/metrics",
        summary="What does Prometheus want to know?",
        response_class=PlainTextResponse,
        responses={200: {"description": "The metrics of this replica, in the form that Accept asks for."}},
    )
    async def metrics(request: Request) -> Response:
        text, media_type = exposed(registry, request.headers.get("accept"))
        return Response(text, media_type=media_type)


def describe(subscriber: Subscriber) -> dict[str, Any]:
    """Return the replica's status as JSON types.

    Units: `staleness_seconds` is how long ago everything accepted was proven to be applied here; null when never.
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
    """Read the body, and no more of it than tells that it is too long. Raises: ClientDisconnect."""
    return await read_at_most(request.stream(), FRAME_BYTES_MAX)


def _objection_to(request: Request, tokens: Tokens) -> Response | None:
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
            "expected a request that no web page of another site has sent, got one by Sec-Fetch-Site or Origin; "
            "send it from a program",
        )
    return None


def _has_token(request: Request, tokens: Tokens) -> bool:
    return tokens.authorize(request.scope["headers"]).right is not None


def _is_cross_site(request: Request) -> bool:
    """Whether a browser sent it for a web page that is not this service's own.

    Browsers say so in Sec-Fetch-Site, but not to addresses of plain HTTP; there Origin tells.
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
