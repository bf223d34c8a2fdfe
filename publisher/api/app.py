"""The publisher's HTTP API as an ASGI application, and the fan-out without the API."""

import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any, Final, TypeAlias
from urllib.parse import unquote

from fastapi import FastAPI, Query, Request, Response
from starlette.routing import Route

from ...shared.errors import InvalidNamespace, InvalidSettings, InvalidTarget
from ...shared.invalidation import DEFAULT_NAMESPACE, Position, check_namespace
from ...shared.process.tokens import Tokens
from ...shared.telemetry.exposition import can_expose, check_can_expose, exposed
from ..audit.audits import Audits
from ..audit.stats import AuditStats
from ..fanout.broadcaster import Broadcaster
from ..history.since import since_ms_of
from ..publishing.publisher import Publisher
from ..telemetry.observer import UNOBSERVED
from ..telemetry.prometheus import PublisherMetrics
from .documents import openapi, operations
from .documents.invalidation_request import PreviewRequest, PublishRequest
from .documents.models import Accepted, History, ListedNamespaces, Replicas
from .documents.problems import (
    INVALIDATION_INVALID,
    LOG_MISSING,
    NAMESPACE_UNKNOWN,
    PARAMETER_INVALID,
    REPLICA_REGISTERED,
    REPLICA_UNKNOWN,
    Flaw,
    Problem,
)
from .documents.queries import EventsQuery, HistoryQuery, NamespacesQuery, ReplicaId, ReplicasQuery
from .events.event import position_of
from .events.hub import Hub
from .events.stream import EventStream
from .fanout_gate import FanoutGate
from .gate import TokenGate
from .handlers import add_problem_handlers
from .idempotency import KeyLifetimes, Scopes, id_of
from .page.page import PAGE_PATHS, page_routes
from .paths import EncodedPath, first_segment
from .request_counter import RequestCounter
from .requests import check_is_json, idempotency_key_of, read_body
from .responses import json_response
from .settings import ApiSettings, FanoutSettings

__all__ = ["create_app", "create_fanout_app", "own_segments", "takes_any_method"]

Lifespan: TypeAlias = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_OPEN_PATHS: Final = frozenset({"/health/live", "/health/ready", *PAGE_PATHS})
"""The paths that need no token."""
_COUNT_SECONDS: Final = 0.5
"""How long a scrape waits for Redis to count the replicas."""


def create_app(settings: ApiSettings, *, publisher: Publisher | None = None) -> FastAPI:
    """Return the API as an ASGI application; its lifespan opens and closes the publisher.

    Shape:  `publisher` is used in place of one of the settings, and its Redis for events and audits too.
    Raises: InvalidSettings.
    """
    fanout = _Fanout(settings)
    tokens = Tokens(settings.tokens)
    second_path = settings.second_path()
    publisher = publisher or Publisher(
        settings.redis_url,
        delivery=settings.delivery,
        fanout=second_path,
        timeout_seconds=settings.publish_timeout_seconds,
        log_length=settings.log_length,
    )
    if settings.audit_namespaces:
        check_can_expose("an audit (BROADCACHE_AUDIT_NAMESPACES)")
    # That of a given publisher: it may have a prefix, or credentials, that the settings do not.
    address = publisher.address or settings.redis_url
    audits = Audits(
        address,
        settings.audit_namespaces,
        sample=settings.audit_sample,
        source_url=settings.audit_source_url,
        timeout_seconds=settings.publish_timeout_seconds,
    )
    api = _Api(settings, tokens, fanout, publisher, audits)
    app = _new_app(api.lifespan)
    app.state.end_streams = api.hub.close  # the server calls it before it waits for requests to end
    app.add_api_route("/invalidations", api.publish, methods=["POST"], **operations.PUBLISH)
    app.add_api_route("/invalidations/preview", api.preview, methods=["POST"], **operations.PREVIEW)
    app.add_api_route("/invalidations", api.history, methods=["GET"], **operations.HISTORY)
    app.add_api_route("/events", api.events, methods=["GET"], **operations.EVENTS)
    app.add_api_route("/replicas", api.replicas, methods=["GET"], **operations.REPLICAS)
    app.add_api_route("/replicas/{replica:path}", api.forget, methods=["DELETE"], **operations.FORGET)
    app.add_api_route("/namespaces", api.namespaces, methods=["GET"], **operations.NAMESPACES)
    _add_health(app, "/health/live", _live, operations.LIVE)
    _add_health(app, "/health/ready", api.ready, operations.READY)
    app.router.routes += page_routes(settings.namespaces, tokens)
    broadcasters = (fanout.broadcaster, None if second_path is None else second_path.broadcaster)
    metrics = _add_metrics(app, publisher, *broadcasters, audits=audits.stats, namespaces=settings.namespaces)
    return _completed(app, settings, tokens, fanout, metrics)


def create_fanout_app(settings: FanoutSettings) -> FastAPI:
    """Return the fan-out alone, as an ASGI application that needs no Redis.

    Raises: InvalidSettings.
    """
    fanout = _Fanout(settings)
    app = _new_app(fanout.lifespan)
    _add_health(app, "/health/live", _live, operations.LIVE)
    return _completed(app, settings, Tokens(settings.tokens), fanout, _add_metrics(app, None, fanout.broadcaster))


def _add_health(app: FastAPI, path: str, endpoint: Callable[..., Any], operation: dict[str, Any]) -> None:
    """Add a health route for GET and, since some probes use it, for HEAD."""
    app.add_api_route(path, endpoint, methods=["GET"], **operation)
    app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)


def _new_app(lifespan: Lifespan) -> FastAPI:
    return FastAPI(
        # These pages would load scripts from third-party hosts.
        docs_url=None,
        redoc_url=None,
        # A path is either right or an error: a redirected client may send its body twice, or not at all.
        redirect_slashes=False,
        lifespan=lifespan,
    )


def _add_metrics(
    app: FastAPI,
    publisher: Publisher | None,
    *broadcasters: Broadcaster | None,
    audits: Callable[[], Iterable[AuditStats]] = tuple,
    namespaces: Sequence[str] = (),
) -> PublisherMetrics | None:
    """Add metrics and GET /metrics to `app`, if the Prometheus client library is installed."""
    if not can_expose("the publisher"):
        return None
    metrics = PublisherMetrics(publisher=publisher, audits=audits)
    for broadcaster in filter(None, broadcasters):
        broadcaster.observer = metrics
    if publisher is not None and publisher.observer is UNOBSERVED:
        publisher.observer = metrics

    async def scrape(request: Request) -> Response:
        if publisher is not None and publisher.has_log:
            metrics.replicas = await publisher.replica_counts(namespaces, timeout_seconds=_COUNT_SECONDS)
        text, media_type = exposed(metrics.registry, request.headers.get("accept"))
        return Response(text, media_type=media_type)

    app.add_api_route("/metrics", scrape, methods=["GET"], **operations.METRICS)
    return metrics


def _completed(
    app: FastAPI, settings: FanoutSettings, tokens: Tokens, fanout: "_Fanout", metrics: PublisherMetrics | None
) -> FastAPI:
    """Add the fan-out, the problem handlers and, if tokens are set, the authentication middleware to `app`."""
    own = frozenset({first_segment(route.path) for route in app.routes if isinstance(route, Route)})
    # Behind the routes, so that a request to the API does not pass through the fan-out.
    app.router.default = FanoutGate(
        app.router.default,
        broadcaster=fanout.broadcaster,
        policy=fanout.policy,
        reserved=own,
        failure_status=settings.fanout_failure_status,
        request_bytes_max=settings.request_bytes_max,
        with_credentials=settings.fanout_forward_authorization,
    )
    add_problem_handlers(app)
    if tokens:
        # A broadcast never counts as reading, whatever its method: replicas act on it.
        app.add_middleware(
            TokenGate, tokens=tokens, open_paths=_OPEN_PATHS, is_reading=lambda path: first_segment(path) in own
        )
    if metrics is not None:
        app.add_middleware(RequestCounter, observer=metrics)
    app.add_middleware(EncodedPath)  # the middleware that is added last runs first
    openapi.describe(app, needs_token=bool(tokens), failure_status=settings.fanout_failure_status)
    app.state.takes_any_method = not fanout.policy.is_off
    app.state.own_segments = own
    return app


def takes_any_method(app: FastAPI) -> bool:
    """Whether the web server in front of `app` must accept unknown HTTP methods."""
    return bool(getattr(app.state, "takes_any_method", False))


def own_segments(app: FastAPI) -> frozenset[str]:
    """Return the first segments of the paths of `app`, whose requests are never broadcast."""
    own: frozenset[str] = getattr(app.state, "own_segments", frozenset())
    return own


class _Fanout:
    """The policy and the broadcaster of these settings, open while an application runs."""

    def __init__(self, settings: FanoutSettings) -> None:
        self.policy: Final = settings.fanout_policy()
        self.broadcaster: Final = settings.fanout_broadcaster(self.policy)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        async with self.broadcaster:
            yield


async def _live() -> Response:
    return json_response({"status": "live"})


class _Api:
    """The endpoints of the API."""

    def __init__(
        self, settings: ApiSettings, tokens: Tokens, fanout: _Fanout, publisher: Publisher, audits: Audits
    ) -> None:
        self._settings = settings
        self._fanout = fanout
        self._publisher = publisher
        self._audits = audits
        self._namespaces = frozenset(settings.namespaces)
        self._scopes = Scopes(tokens, source=publisher.source)
        self._key_lifetimes = KeyLifetimes(settings.idempotency_seconds)
        self.hub: Final = Hub(
            publisher.address or settings.redis_url,
            clients_max=settings.event_clients_max,
            heartbeat_seconds=settings.event_heartbeat_seconds,
        )

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        async with self._fanout.broadcaster, self._publisher, self._audits:
            try:
                yield
            finally:
                await self.hub.close()

    async def publish(self, request: Request) -> Response:
        check_is_json(request)
        body = PublishRequest.read(await read_body(request, self._settings.request_bytes_max))
        self._check_is_known(body.namespace)
        idempotency_key = idempotency_key_of(request)
        id = scope = receipt_seconds = None
        if idempotency_key is not None:
            scope = await self._scopes.scope_of(request)
            id = id_of(scope, body.namespace, idempotency_key)
            receipt_seconds = self._key_lifetimes.seconds_for(scope)
        try:
            confirm = body.confirmation()
        except InvalidSettings as error:
            raise _invalid_request(body, error) from None
        try:
            receipt = await self._publisher.publish(
                *body.targets(),
                namespace=body.namespace,
                reason=body.reason,
                id=id,
                scope=scope,
                receipt_seconds=receipt_seconds,
                confirm=confirm,
            )
        except (InvalidTarget, InvalidNamespace) as error:
            raise _invalid_request(body, error) from None
        is_replayed = idempotency_key is not None and receipt.is_repeat
        headers = {"Idempotency-Replayed": "true"} if is_replayed else None
        is_confirmed = receipt.confirmation is None or receipt.confirmation.is_complete
        status = 200 if is_confirmed else self._settings.unconfirmed_status
        return json_response(Accepted.of(receipt), status, headers=headers)

    async def preview(self, request: Request) -> Response:
        check_is_json(request)
        body = PreviewRequest.read(await read_body(request, self._settings.request_bytes_max))
        self._check_is_known(body.namespace)
        self._check_has_log()
        if flaws := body.flaws():
            raise Problem(INVALIDATION_INVALID, errors=flaws)
        return json_response(await self._publisher.preview(*body.targets(), namespace=body.namespace))

    async def history(self, query: Annotated[HistoryQuery, Query()]) -> Response:
        self._check_is_known(query.namespace)
        self._check_has_log()
        _check_is_namespace(query.namespace)
        page = await self._publisher.history_page(
            query.namespace,
            count=query.limit,
            before=query.before,
            key=query.key,
            since_ms=None if query.since is None else _since_ms_of(query.since),
        )
        return json_response(History.of(query.namespace, page))

    async def events(self, request: Request, query: Annotated[EventsQuery, Query()]) -> Response:
        self._check_is_known(query.namespace)
        _check_is_namespace(query.namespace)
        header = request.headers.get("last-event-id")
        return EventStream(
            self.hub,
            query.namespace,
            after=_position_of(header, "header Last-Event-ID")
            or _position_of(query.last_event_id, "query parameter last_event_id"),
        )

    async def replicas(self, query: Annotated[ReplicasQuery, Query()]) -> Response:
        self._check_is_known(query.namespace)
        _check_is_namespace(query.namespace)
        replicas = await self._publisher.replicas(query.namespace)
        return json_response(Replicas.of(query.namespace, replicas))

    async def namespaces(self, query: Annotated[NamespacesQuery, Query()]) -> Response:
        self._check_has_log()
        if query.after:
            _check_is_namespace(query.after, "after")
        page = await self._publisher.namespaces(after=query.after, count=query.limit, among=self._settings.namespaces)
        return json_response(ListedNamespaces.of(page))

    async def forget(self, replica: ReplicaId, query: Annotated[ReplicasQuery, Query()]) -> Response:
        self._check_is_known(query.namespace)
        self._check_has_log()
        _check_is_namespace(query.namespace)
        replica = unquote(replica)  # routes see the path as it was sent
        try:
            result = await self._publisher.forget_replica(replica, query.namespace)
        except InvalidTarget as error:
            raise _invalid("replica", f"{error} at the end of the path") from None
        if result == "unknown":
            raise Problem(
                REPLICA_UNKNOWN,
                f"expected the id of a replica that fell silent, got {replica!r:.100}; GET /replicas lists them",
            )
        if result == "registered":
            raise Problem(
                REPLICA_REGISTERED,
                f"expected a replica that fell silent, got {replica!r:.100}, whose next echo would list it again; stop "
                "it: it then leaves",
            )
        return Response(status_code=204)

    async def ready(self) -> Response:
        if self._publisher.delivery != "redis":
            # Not ready would take the publisher out of service, and with it the second path, which works without Redis.
            return json_response({"status": "degraded" if self._publisher.retry_queue_length else "ready"})
        # The Redis user may have rights to these namespaces only.
        namespace = self._settings.namespaces[0] if self._namespaces else DEFAULT_NAMESPACE
        await self._publisher.head(namespace)
        return json_response({"status": "ready"})

    def _check_has_log(self) -> None:
        if not self._publisher.has_log:
            raise Problem(LOG_MISSING)

    def _check_is_known(self, namespace: str) -> None:
        if self._namespaces and namespace not in self._namespaces:
            raise Problem(
                NAMESPACE_UNKNOWN,
                f"expected one of the namespaces {', '.join(sorted(self._namespaces))}, got {namespace!r:.100}; "
                "correct it, or add it to BROADCACHE_NAMESPACES",
            )


def _check_is_namespace(text: str, parameter: str = "namespace") -> None:
    try:
        check_namespace(text)
    except InvalidNamespace as error:
        raise _invalid(parameter, f"{error} at query parameter {parameter}") from None


def _since_ms_of(text: str) -> int:
    try:
        return since_ms_of(text, now_ms=time.time_ns() // 1_000_000)
    except InvalidSettings as error:
        raise _invalid("since", f"{error} at query parameter since") from None


def _position_of(id: str | None, where: str) -> Position | None:
    """Return the position in an event's id; None without an id. Raises: Problem."""
    if not id:
        return None
    position = position_of(id)
    if position is None:
        raise _invalid("last_event_id", f"expected the id of an event, EPOCH:SEQUENCE, got {id!r:.100} at {where}")
    return position


def _invalid_request(body: PublishRequest, error: Exception) -> Problem:
    """Return the problem of a request that the publisher has rejected with this error."""
    flaws = body.flaws()
    return Problem(INVALIDATION_INVALID, "" if flaws else str(error), errors=flaws)


def _invalid(parameter: str, detail: str) -> Problem:
    return Problem(PARAMETER_INVALID, errors=(Flaw(parameter=parameter, detail=detail),))
