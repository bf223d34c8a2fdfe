"""The publisher's HTTP API, and the fan-out beside it or alone."""

import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Final, TypeAlias

import msgspec
from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.routing import Route

from ...shared.errors import InvalidNamespace, InvalidSettings, InvalidTarget
from ...shared.invalidation import DEFAULT_NAMESPACE, KEY_BYTES_MAX, NAMESPACE_PATTERN, Position, check_namespace
from ...shared.process.tokens import Tokens
from ...shared.telemetry.exposition import can_expose, check_can_expose, exposed
from ..audit.audits import Audits
from ..audit.stats import AuditStats
from ..fanout.broadcaster import Broadcaster
from ..history.since import since_ms_of
from ..publishing.publisher import Publisher
from ..telemetry.observer import UNOBSERVED
from ..telemetry.prometheus import PublisherMetrics
from .documents import openapi
from .documents.models import Accepted, History, PreviewRequest, PublishRequest, Replicas
from .documents.problems import INVALIDATION_INVALID, LOG_MISSING, NAMESPACE_UNKNOWN, PARAMETER_INVALID, Flaw, Problem
from .events.event import position_of
from .events.hub import Hub
from .events.stream import EventStream
from .fanout_gate import FanoutGate
from .gate import TokenGate
from .handlers import add_problem_handlers
from .idempotency import Scopes, id_of
from .page.page import PAGE_PATHS, page_routes
from .request_counter import RequestCounter
from .requests import check_is_json, idempotency_key_of, read_body
from .settings import ApiSettings, FanoutSettings

__all__ = ["create_app", "create_fanout_app", "takes_any_method"]

Lifespan: TypeAlias = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_OPEN_PATHS: Final = frozenset({"/health/live", "/health/ready", *PAGE_PATHS})
"""What takes no token."""


def create_app(settings: ApiSettings, *, publisher: Publisher | None = None) -> FastAPI:
    """Return the API as an ASGI application; its lifespan opens and closes the publisher.

    Raises: InvalidSettings.
    """
    fanout = _Fanout(settings)
    second_path = settings.second_path()
    publisher = publisher or Publisher(
        settings.redis_url,
        delivery=settings.delivery,
        fanout=second_path,
        timeout_seconds=settings.publish_timeout_seconds,
        log_length=settings.log_length,
    )
    if settings.audit_namespaces:
        check_can_expose("what an audit counts (BROADCACHE_AUDIT_NAMESPACES)")
    audits = Audits(
        settings.redis_url,
        settings.audit_namespaces,
        sample=settings.audit_sample,
        source_url=settings.audit_source_url,
        timeout_seconds=settings.publish_timeout_seconds,
    )
    api = _Api(settings, fanout, publisher, audits)
    app = _new_app(api.lifespan)
    app.state.end_streams = api.hub.close  # what serves it has to tell before it waits for requests to end
    app.add_api_route("/invalidations", api.publish, methods=["POST"], **openapi.PUBLISH)
    app.add_api_route("/invalidations/preview", api.preview, methods=["POST"], **openapi.PREVIEW)
    app.add_api_route("/invalidations", api.history, methods=["GET"], **openapi.HISTORY)
    app.add_api_route("/events", api.events, methods=["GET"], **openapi.EVENTS)
    app.add_api_route("/replicas", api.replicas, methods=["GET"], **openapi.REPLICAS)
    app.add_api_route("/health/live", _live, methods=["GET"], **openapi.LIVE)
    app.add_api_route("/health/ready", api.ready, methods=["GET"], **openapi.READY)
    app.router.routes += page_routes(settings.namespaces, Tokens(settings.tokens))
    broadcasters = (fanout.broadcaster, None if second_path is None else second_path.broadcaster)
    return _gated(app, settings, fanout, _add_metrics(app, publisher, *broadcasters, audits=audits.stats))


def create_fanout_app(settings: FanoutSettings) -> FastAPI:
    """Return the fan-out alone, as an ASGI application that needs no Redis.

    Raises: InvalidSettings.
    """
    fanout = _Fanout(settings)
    app = _new_app(fanout.lifespan)
    app.add_api_route("/health/live", _live, methods=["GET"], **openapi.LIVE)
    return _gated(app, settings, fanout, _add_metrics(app, None, fanout.broadcaster))


def _new_app(lifespan: Lifespan) -> FastAPI:
    return FastAPI(
        # Their pages load scripts from other people's hosts.
        docs_url=None,
        redoc_url=None,
        # A path is either right or an error: a client that is redirected may send its body twice, or not at all.
        redirect_slashes=False,
        lifespan=lifespan,
    )


def _add_metrics(
    app: FastAPI,
    publisher: Publisher | None,
    *broadcasters: Broadcaster | None,
    audits: Callable[[], Iterable[AuditStats]] = tuple,
) -> PublisherMetrics | None:
    """Have `app` count what it does and tell Prometheus of it, if its client library is installed."""
    if not can_expose("the publisher"):
        return None
    metrics = PublisherMetrics(publisher=publisher, audits=audits)
    for broadcaster in filter(None, broadcasters):
        broadcaster.observer = metrics
    if publisher is not None and publisher.observer is UNOBSERVED:
        publisher.observer = metrics

    async def scrape(request: Request) -> Response:
        text, media_type = exposed(metrics.registry, request.headers.get("accept"))
        return Response(text, media_type=media_type)

    app.add_api_route("/metrics", scrape, methods=["GET"], **openapi.METRICS)
    return metrics


def _gated(app: FastAPI, settings: FanoutSettings, fanout: "_Fanout", metrics: PublisherMetrics | None) -> FastAPI:
    """Put the fan-out beside the routes of `app`, and whoever wants to use either through the gate."""
    own = frozenset({_first_segment(route.path) for route in app.routes if isinstance(route, Route)})
    app.add_middleware(
        FanoutGate,
        broadcaster=fanout.broadcaster,
        policy=fanout.policy,
        reserved=own,
        failure_status=settings.fanout_failure_status,
        request_bytes_max=settings.request_bytes_max,
        with_credentials=settings.fanout_forward_authorization,
    )
    add_problem_handlers(app)
    tokens = Tokens(settings.tokens)
    if tokens:
        # A broadcast is never a mere reading, whatever its method: it makes others act.
        app.add_middleware(
            TokenGate, tokens=tokens, open_paths=_OPEN_PATHS, is_reading=lambda path: _first_segment(path) in own
        )
    if metrics is not None:
        app.add_middleware(RequestCounter, observer=metrics)  # the last one that is added stands first
    openapi.describe(app, needs_token=bool(tokens), failure_status=settings.fanout_failure_status)
    app.state.takes_any_method = not fanout.policy.is_off
    return app


def takes_any_method(app: FastAPI) -> bool:
    """Whether the web server in front of `app` must let methods through that it does not know."""
    return bool(getattr(app.state, "takes_any_method", False))


def _first_segment(path: str) -> str:
    return path.removeprefix("/").partition("/")[0]


class _Fanout:
    """The broadcaster of these settings, for as long as an application runs."""

    def __init__(self, settings: FanoutSettings) -> None:
        self.policy: Final = settings.fanout_policy()
        self.broadcaster: Final = settings.fanout_broadcaster(self.policy)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        async with self.broadcaster:
            yield


async def _live() -> Response:
    return _json({"status": "live"})


# Described here and checked by whoever uses it, who says what is wrong with it.
_Namespace = Annotated[str, Field(json_schema_extra={"pattern": f"^{NAMESPACE_PATTERN}$"})]


class _HistoryQuery(BaseModel):
    """What may be asked of the history. A parameter that is misspelt is an error, not a default."""

    model_config = ConfigDict(extra="forbid")

    namespace: _Namespace = Field(DEFAULT_NAMESPACE, description="The family of caches whose log is read.")
    limit: int = Field(100, ge=1, le=1_000, description="How many invalidations a page has at most.")
    before: int | None = Field(
        None, ge=1, lt=2**64, description="Only those of a lower sequence: the last page's `next_before`."
    )
    key: str | None = Field(
        None,
        min_length=1,
        max_length=KEY_BYTES_MAX,
        description="Only those that concern this key: that name it, a prefix of it, or everything. What names tags "
        "is left out: which entries carry them is known to replicas alone.",
    )
    since: str | None = Field(
        None,
        max_length=100,
        description="Only those that were sent since: a time with an offset, or how long ago, as seconds or as 15m, "
        "2h, 1d. Publishers' clocks say when: for people, never for order.",
        examples=["15m", "2025-06-30T12:00:00Z"],
    )


class _EventsQuery(BaseModel):
    """What may be asked of the events."""

    model_config = ConfigDict(extra="forbid")

    namespace: _Namespace = Field(DEFAULT_NAMESPACE, description="The family of caches that is followed.")
    last_event_id: str | None = Field(
        None,
        max_length=100,
        description="Go on after the event of this id. The header Last-Event-ID says the same, and wins.",
    )


class _ReplicasQuery(BaseModel):
    """What may be asked of the replicas."""

    model_config = ConfigDict(extra="forbid")

    namespace: _Namespace = Field(DEFAULT_NAMESPACE, description="The family of caches that they follow.")


class _Api:
    """The endpoints, and what they share."""

    def __init__(self, settings: ApiSettings, fanout: _Fanout, publisher: Publisher, audits: Audits) -> None:
        self._settings = settings
        self._fanout = fanout
        self._publisher = publisher
        self._audits = audits
        self._namespaces = frozenset(settings.namespaces)
        self._scopes = Scopes(Tokens(settings.tokens), source=publisher.source)
        self.hub: Final = Hub(
            settings.redis_url,
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
        asked = PublishRequest.read(await read_body(request, self._settings.request_bytes_max))
        self._check_is_known(asked.namespace)
        idempotency_key = idempotency_key_of(request)
        id = scope = None
        if idempotency_key is not None:
            scope = await self._scopes.scope_of(request)
            id = id_of(scope, asked.namespace, idempotency_key)
        try:
            confirm = asked.confirmation()
        except InvalidSettings:
            raise Problem(INVALIDATION_INVALID, errors=asked.flaws()) from None
        try:
            receipt = await self._publisher.publish(
                *asked.targets(),
                namespace=asked.namespace,
                reason=asked.reason,
                id=id,
                scope=scope,
                receipt_seconds=self._settings.idempotency_seconds if idempotency_key else None,
                confirm=confirm,
            )
        except (InvalidTarget, InvalidNamespace):
            raise Problem(INVALIDATION_INVALID, errors=asked.flaws()) from None
        is_replayed = idempotency_key is not None and receipt.is_repeat
        headers = {"Idempotency-Replayed": "true"} if is_replayed else None
        is_confirmed = receipt.confirmation is None or receipt.confirmation.is_complete
        status = 200 if is_confirmed else self._settings.unconfirmed_status
        return _json(Accepted.of(receipt), status, headers=headers)

    async def preview(self, request: Request) -> Response:
        check_is_json(request)
        asked = PreviewRequest.read(await read_body(request, self._settings.request_bytes_max))
        self._check_is_known(asked.namespace)
        self._check_has_log()
        if flaws := asked.flaws():
            raise Problem(INVALIDATION_INVALID, errors=flaws)
        return _json(await self._publisher.preview(*asked.targets(), namespace=asked.namespace))

    async def history(self, query: Annotated[_HistoryQuery, Query()]) -> Response:
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
        return _json(History.of(query.namespace, page))

    async def events(self, request: Request, query: Annotated[_EventsQuery, Query()]) -> Response:
        self._check_is_known(query.namespace)
        _check_is_namespace(query.namespace)
        header = request.headers.get("last-event-id")
        return EventStream(
            self.hub,
            query.namespace,
            after=_position_of(header, "header Last-Event-ID")
            or _position_of(query.last_event_id, "query parameter last_event_id"),
        )

    async def replicas(self, query: Annotated[_ReplicasQuery, Query()]) -> Response:
        self._check_is_known(query.namespace)
        _check_is_namespace(query.namespace)
        replicas = await self._publisher.replicas(query.namespace)
        return _json(Replicas.of(query.namespace, replicas))

    async def ready(self) -> Response:
        if self._publisher.delivery != "redis":
            # Whoever took it out of service because Redis is away would close the second path as well.
            return _json({"status": "degraded" if self._publisher.retry_queue_length else "ready"})
        # The user of Redis may have rights to these namespaces alone.
        namespace = self._settings.namespaces[0] if self._namespaces else DEFAULT_NAMESPACE
        await self._publisher.head(namespace)
        return _json({"status": "ready"})

    def _check_has_log(self) -> None:
        if not self._publisher.has_log:
            raise Problem(LOG_MISSING, LOG_MISSING.example)

    def _check_is_known(self, namespace: str) -> None:
        if self._namespaces and namespace not in self._namespaces:
            raise Problem(
                NAMESPACE_UNKNOWN,
                f"expected one of the namespaces {', '.join(sorted(self._namespaces))}, got {namespace!r:.100}; "
                "correct it, or add it to BROADCACHE_NAMESPACES",
            )


def _check_is_namespace(text: str) -> None:
    try:
        check_namespace(text)
    except InvalidNamespace as error:
        raise _invalid("namespace", f"{error} at query parameter namespace") from None


def _since_ms_of(text: str) -> int:
    try:
        return since_ms_of(text, now_ms=time.time_ns() // 1_000_000)
    except InvalidSettings as error:
        raise _invalid("since", f"{error} at query parameter since") from None


def _position_of(id: str | None, where: str) -> Position | None:
    """Return the place that an event's id names; None without one. Raises: Problem."""
    if not id:
        return None
    position = position_of(id)
    if position is None:
        raise _invalid("last_event_id", f"expected the id of an event, EPOCH:SEQUENCE, got {id!r:.100} at {where}")
    return position


def _invalid(parameter: str, detail: str) -> Problem:
    return Problem(PARAMETER_INVALID, errors=(Flaw(parameter=parameter, detail=detail),))


def _json(answer: object, status: int = 200, *, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(answer), status, headers=headers, media_type="application/json")
