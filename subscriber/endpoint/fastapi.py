"""The HTTP side of a replica. The only module of the subscriber that needs FastAPI, so it is imported on first use."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Mount
from starlette.types import Receive, Scope, Send

from ...shared.errors import InvalidSettings
from ...shared.process.bodies import read_at_most
from ...shared.process.problems import PROBLEM_MEDIA_TYPE, BasicProblem, problem_type
from ...shared.telemetry.exposition import can_expose, exposed
from ...shared.wire import FRAME_BYTES_MAX
from ..metrics import register
from .access import Access, Refusal, refusal_of
from .members import Member, Served, apply_to, members_of, one_access_of, run_by, state_of, subscribers_of, with_others
from .posted import passing_on, response_of
from .processes.own_socket import own_socket
from .replica_token import ALLOW_OPEN_VARIABLE, TOKEN_VARIABLE

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["Served", "router_of", "routes_of"]

_log = logging.getLogger("broadcache.subscriber")

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
_OUTER_APP: Final = "broadcache.app"
"""The key in a scope of the application that has mounted the router."""


def router_of(subscriber: Served, access: Access | None = None) -> APIRouter:
    """Return the routes of `subscriber`. How a load balancer uses them: docs/subscriber.md.

    The routes of several subscribers in one application are one: each answers for all of them.

    Shape:  `access` is what POST requires, by default that of BROADCACHE_REPLICA_TOKEN and
            BROADCACHE_REPLICA_ALLOW_OPEN.
    Raises: InvalidSettings. The application does not start if its subscribers expect different tokens.
    """
    routes = _Routes(subscriber, Access.of() if access is None else access)
    own_socket.has_endpoint()
    router = _Router(tags=["broadcache"], lifespan=routes.lifespan)
    router.add_api_route("/health/live", routes.live, summary="Does the process respond?")
    router.add_api_route(
        "/health/ready",
        routes.ready,
        summary="Is the local cache coherent?",
        responses={503: {"description": "A cache is not coherent: it is bypassed, or may serve stale values."}},
    )
    router.add_api_route(
        "/cache-invalidation", routes.status, summary="State, position, staleness and counters of this replica"
    )
    router.add_api_route(
        "/cache-invalidation",
        routes.forget,
        methods=["POST"],
        summary="Drop the entries that the body names",
        description=_POST_DESCRIPTION,
        responses={
            200: {
                "description": "Applied by each process of this address: outcomes, and how many entries were dropped."
            },
            401: {"description": "The request has no valid token."},
            403: {"description": "No token is set and the caller is elsewhere, or it is a web page of another site."},
            500: {"description": "A process of this address has not applied it; `processes` names it."},
        },
        openapi_extra=_POST_BODY,
    )
    endpoints = [routes.live, routes.ready, routes.status]
    paths = ["/health/live", "/health/ready", "/cache-invalidation"]
    if can_expose(f"replica {subscriber.replica_id}"):
        router.add_api_route(
            "/metrics",
            routes.metrics,
            summary="Metrics for Prometheus",
            response_class=PlainTextResponse,
            responses={200: {"description": "The metrics of this replica, in the format of the Accept header."}},
        )
        routes.begin_metrics()
        endpoints.append(routes.metrics)
        paths.append("/metrics")
    for path, endpoint in zip(paths, endpoints, strict=True):
        router.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
    return router


def routes_of(subscriber: Served, access: Access | None = None) -> list[BaseRoute]:
    """Return the same routes for an application of Starlette."""
    return [Mount("/", app=router_of(subscriber, access))]


class _Router(APIRouter):
    """A router that can also be mounted, `Mount("/", catalogue.router)`: FastAPI's own works only within a FastAPI."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._inner: FastAPI | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the routes through an application of their own, which remembers the one around it."""
        inner = self._inner
        if inner is None:
            inner = self._inner = FastAPI(openapi_url=None)
            inner.include_router(self)
        await inner({**scope, _OUTER_APP: scope.get("app")}, receive, send)


class _Routes(Member):
    """The endpoints. Each answers for all subscribers whose routes the application of the request has."""

    def __init__(self, subscriber: Served, access: Access) -> None:
        super().__init__(subscriber, access)
        self._metrics: CollectorRegistry | None = None
        self._has_warned_of_refusal = False

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """Check the access when the application starts. Raises: InvalidSettings."""
        members = members_of(app, self)
        _warn_if_open(members, one_access_of(members))
        with run_by(app, subscribers_of(members)):
            yield

    async def live(self, request: Request) -> dict[str, Any]:
        replicas = [each.replica_id for each in self._subscribers(request)]
        return {"status": "live", "replica": replicas[0], "replicas": replicas}

    async def ready(self, request: Request) -> Response:
        subscribers = self._subscribers(request)
        for each in subscribers:
            each.restart_if_forked()  # a load balancer may send no read before this process is ready
        state = state_of(subscribers)
        return JSONResponse(
            {
                "status": "ready" if state == "coherent" else "not ready",
                "state": state,
                "replicas": [{"replica": each.replica_id, "state": each.state} for each in subscribers],
            },
            status_code=200 if state == "coherent" else 503,
        )

    async def status(self, request: Request) -> dict[str, Any]:
        return describe_all(self._subscribers(request))

    async def forget(self, request: Request) -> Response:
        members = self._members(request)
        try:
            access = one_access_of(members)
        except InvalidSettings as error:
            _log.error("refused POST /cache-invalidation: %s", error)
            return _problem(Refusal(500, "tokens-differ", "This replica's settings contradict each other", str(error)))
        _warn_if_open(members, access)
        refusal = refusal_of(request.scope, access)
        if refusal is not None:
            self._warn_if_unset(refusal)
            return _problem(refusal)
        try:
            body = await read_at_most(request.stream(), FRAME_BYTES_MAX)
        except ClientDisconnect:
            # Half a body is no invalidation: its targets are unknown.
            return Response(status_code=400)  # the client is gone and will not read it
        concerned = with_others(subscribers_of(members), own_socket.running, _app_of(request))
        applied = apply_to(concerned, body)
        server = request.scope.get("server")
        passed_on = await asyncio.wrap_future(passing_on(body, None if server is None else (server[0], server[1])))
        status_code, document = response_of(applied, passed_on)
        return JSONResponse(document, status_code=status_code)

    def begin_metrics(self) -> None:
        """Measure from now on. Raises: InvalidSettings when prometheus_client is not installed."""
        from prometheus_client import CollectorRegistry

        self._metrics = CollectorRegistry()
        register(self.subscriber, self._metrics)

    async def metrics(self, request: Request) -> Response:
        assert self._metrics is not None, "the route is added with the metrics"
        for subscriber in self._subscribers(request):
            register(subscriber, self._metrics)
        text, media_type = exposed(self._metrics, request.headers.get("accept"))
        return Response(text, media_type=media_type)

    def _members(self, request: Request) -> tuple[Member, ...]:
        return members_of(_app_of(request), self)

    def _subscribers(self, request: Request) -> list[Served]:
        return subscribers_of(self._members(request))

    def _warn_if_unset(self, refusal: Refusal) -> None:
        if refusal.kind == "token-not-set" and not self._has_warned_of_refusal:
            self._has_warned_of_refusal = True
            _log.warning("refused POST /cache-invalidation (logged once): %s", refusal.detail)


def _app_of(request: Request) -> object:
    return request.scope.get(_OUTER_APP) or request.scope.get("app")


def _warn_if_open(members: Sequence[Member], access: Access) -> None:
    """Log once for an application that its POST is open."""
    if access.is_open and not members[0].has_warned:
        members[0].has_warned = True
        _log.warning(
            "POST /cache-invalidation is open: each client that reaches the port may empty the caches, since "
            "allow_open or %s is set; to close it, set %s",
            ALLOW_OPEN_VARIABLE,
            TOKEN_VARIABLE,
        )


def describe_all(subscribers: Sequence[Served]) -> dict[str, Any]:
    """Return the status of these subscribers as JSON types.

    Shape:  as `describe`, of all together, and `replicas`, with each of them alone. Of a namespace that several follow,
            the one that is not coherent is shown.
    """
    documents = [describe(each) for each in subscribers]
    received: Counter[str] = Counter()
    namespaces: dict[str, Any] = {}
    for each in documents:
        received.update(each["received"])
        for namespace, described in each["namespaces"].items():
            if namespace not in namespaces or namespaces[namespace]["is_coherent"]:
                namespaces[namespace] = described
    return {
        "replica": documents[0]["replica"],
        "state": state_of(subscribers),
        "received": dict(received),
        "subscriptions": sum(each["subscriptions"] for each in documents),
        "lost": sum(each["lost"] for each in documents),
        "namespaces": namespaces,
        "replicas": documents,
    }


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


def _problem(refusal: Refusal) -> Response:
    document = BasicProblem(
        type=problem_type(refusal.kind), title=refusal.title, status=refusal.status, detail=refusal.detail
    )
    headers = {"WWW-Authenticate": 'Bearer realm="broadcache"'} if refusal.status == 401 else None
    return Response(msgspec.json.encode(document), refusal.status, headers=headers, media_type=PROBLEM_MEDIA_TYPE)
