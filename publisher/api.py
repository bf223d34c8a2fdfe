"""The publisher's HTTP API, and the fan-out beside it or alone."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Final, TypeAlias

import msgspec
from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.routing import Route

from ..shared.errors import InvalidNamespace, InvalidSettings, InvalidTarget
from ..shared.invalidation import DEFAULT_NAMESPACE
from . import openapi
from .broadcaster import Broadcaster
from .discovery import DnsDiscovery, ListDiscovery
from .fanout_api import FanoutGate
from .gate import TokenGate
from .handlers import add_problem_handlers
from .models import Accepted, History, PreviewRequest, PublishRequest, Replicas
from .problems import INVALIDATION_INVALID, LOG_MISSING, NAMESPACE_UNKNOWN, PARAMETER_INVALID, Flaw, Problem
from .publisher import Publisher
from .requests import check_is_json, id_of, idempotency_key_of, read_body
from .settings import ApiSettings, FanoutSettings, lists_of
from .tokens import Tokens

__all__ = ["create_app", "create_fanout_app", "takes_any_method"]

Lifespan: TypeAlias = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_HEALTH_PATHS: Final = frozenset({"/health/live", "/health/ready"})


def create_app(settings: ApiSettings, *, publisher: Publisher | None = None) -> FastAPI:
    """Return the API as an ASGI application; its lifespan opens and closes the publisher.

    Raises: InvalidSettings.
    """
    fanout = _Fanout(settings)
    api = _Api(
        settings,
        fanout,
        publisher
        or Publisher(
            settings.redis_url,
            delivery=settings.delivery,
            fanout=settings.second_path(),
            timeout_seconds=settings.publish_timeout_seconds,
            log_length=settings.log_length,
        ),
    )
    app = _new_app(api.lifespan)
    app.add_api_route("/invalidations", api.publish, methods=["POST"], **openapi.PUBLISH)
    app.add_api_route("/invalidations/preview", api.preview, methods=["POST"], **openapi.PREVIEW)
    app.add_api_route("/invalidations", api.history, methods=["GET"], **openapi.HISTORY)
    app.add_api_route("/replicas", api.replicas, methods=["GET"], **openapi.REPLICAS)
    app.add_api_route("/health/live", _live, methods=["GET"], **openapi.LIVE)
    app.add_api_route("/health/ready", api.ready, methods=["GET"], **openapi.READY)
    return _gated(app, settings, fanout)


def create_fanout_app(settings: FanoutSettings) -> FastAPI:
    """Return the fan-out alone, as an ASGI application that needs no Redis.

    Raises: InvalidSettings.
    """
    fanout = _Fanout(settings)
    app = _new_app(fanout.lifespan)
    app.add_api_route("/health/live", _live, methods=["GET"], **openapi.LIVE)
    return _gated(app, settings, fanout)


def _new_app(lifespan: Lifespan) -> FastAPI:
    return FastAPI(
        # Their pages load scripts from other people's hosts.
        docs_url=None,
        redoc_url=None,
        # A path is either right or an error: a client that is redirected may send its body twice, or not at all.
        redirect_slashes=False,
        lifespan=lifespan,
    )


def _gated(app: FastAPI, settings: FanoutSettings, fanout: "_Fanout") -> FastAPI:
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
            TokenGate, tokens=tokens, open_paths=_HEALTH_PATHS, is_reading=lambda path: _first_segment(path) in own
        )
    openapi.describe(app, needs_token=bool(tokens))
    app.state.takes_any_method = not fanout.policy.is_off
    return app


def takes_any_method(app: FastAPI) -> bool:
    """Whether the web server in front of `app` must let methods through that it does not know."""
    return bool(getattr(app.state, "takes_any_method", False))


def _first_segment(path: str) -> str:
    return path.split("/", 2)[1]


class _Fanout:
    """The broadcaster of these settings, for as long as an application runs."""

    def __init__(self, settings: FanoutSettings) -> None:
        self.policy: Final = settings.fanout_policy()
        self.broadcaster: Final = Broadcaster(
            # One that is off needs no DNS library, and calls nobody.
            ListDiscovery(
                lists_of(settings.fanout_lists),
                None if self.policy.is_off else DnsDiscovery(settings.fanout_nameservers),
            ),
            self.policy,
            limits=settings.fanout_limits(),
            scheme=settings.fanout_scheme,
            host_mode=settings.fanout_host,
            tls=settings.fanout_tls(),
            tls_name=settings.fanout_tls_name,
        )

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        async with self.broadcaster:
            yield


async def _live() -> Response:
    return _json({"status": "live"})


class _HistoryQuery(BaseModel):
    """What may be asked of the history. A parameter that is misspelt is an error, not a default."""

    model_config = ConfigDict(extra="forbid")

    namespace: str = Field(DEFAULT_NAMESPACE, description="The family of caches whose log is read.")
    limit: int = Field(100, ge=1, le=1_000, description="How many invalidations a page has at most.")
    before: int | None = Field(
        None, ge=1, lt=2**64, description="Only those of a lower sequence: the last page's `next_before`."
    )


class _ReplicasQuery(BaseModel):
    """What may be asked of the replicas."""

    model_config = ConfigDict(extra="forbid")

    namespace: str = Field(DEFAULT_NAMESPACE, description="The family of caches that they follow.")


class _Api:
    """The endpoints, and what they share."""

    def __init__(self, settings: ApiSettings, fanout: _Fanout, publisher: Publisher) -> None:
        self._settings = settings
        self._fanout = fanout
        self._publisher = publisher
        self._namespaces = frozenset(settings.namespaces)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        async with self._fanout.broadcaster, self._publisher:
            yield

    async def publish(self, request: Request) -> Response:
        check_is_json(request)
        asked = PublishRequest.read(await read_body(request, self._settings.request_bytes_max))
        self._check_is_known(asked.namespace)
        idempotency_key = idempotency_key_of(request)
        try:
            confirm = asked.confirmation()
        except InvalidSettings:
            raise Problem(INVALIDATION_INVALID, errors=asked.flaws()) from None
        try:
            receipt = await self._publisher.publish(
                *asked.targets(),
                namespace=asked.namespace,
                reason=asked.reason,
                id=idempotency_key and id_of(asked.namespace, idempotency_key),
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
        if not self._publisher.has_log:
            raise Problem(LOG_MISSING, LOG_MISSING.example)
        if flaws := asked.flaws():
            raise Problem(INVALIDATION_INVALID, errors=flaws)
        return _json(await self._publisher.preview(*asked.targets(), namespace=asked.namespace))

    async def history(self, query: Annotated[_HistoryQuery, Query()]) -> Response:
        self._check_is_known(query.namespace)
        if not self._publisher.has_log:
            raise Problem(LOG_MISSING, LOG_MISSING.example)
        try:
            entries = await self._publisher.history(query.namespace, count=query.limit + 1, before=query.before)
        except InvalidNamespace as error:
            raise _invalid_namespace(error) from None
        return _json(History.of(query.namespace, entries, query.limit))

    async def replicas(self, query: Annotated[_ReplicasQuery, Query()]) -> Response:
        self._check_is_known(query.namespace)
        try:
            replicas = await self._publisher.replicas(query.namespace)
        except InvalidNamespace as error:
            raise _invalid_namespace(error) from None
        return _json(Replicas.of(query.namespace, replicas))

    async def ready(self) -> Response:
        if self._publisher.delivery != "redis":
            # Whoever took it out of service because Redis is away would close the second path as well.
            return _json({"status": "degraded" if self._publisher.outbox_length else "ready"})
        # The user of Redis may have rights to these namespaces alone.
        namespace = self._settings.namespaces[0] if self._namespaces else DEFAULT_NAMESPACE
        await self._publisher.head(namespace)
        return _json({"status": "ready"})

    def _check_is_known(self, namespace: str) -> None:
        if self._namespaces and namespace not in self._namespaces:
            raise Problem(
                NAMESPACE_UNKNOWN,
                f"expected one of the namespaces {', '.join(sorted(self._namespaces))}, got {namespace!r:.100}; "
                "correct it, or add it to BROADCACHE_NAMESPACES",
            )


def _invalid_namespace(error: InvalidNamespace) -> Problem:
    flaw = Flaw(parameter="namespace", detail=f"{error} at query parameter namespace")
    return Problem(PARAMETER_INVALID, errors=(flaw,))


def _json(answer: object, status: int = 200, *, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(answer), status, headers=headers, media_type="application/json")
