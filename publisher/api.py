"""The publisher's HTTP API."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Final

import msgspec
from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from ..shared.errors import InvalidNamespace, InvalidTarget
from ..shared.invalidation import DEFAULT_NAMESPACE
from . import openapi
from .gate import TokenGate
from .handlers import add_problem_handlers
from .models import Accepted, History, PublishRequest
from .problems import INVALIDATION_INVALID, LOG_MISSING, NAMESPACE_UNKNOWN, PARAMETER_INVALID, Flaw, Problem
from .publisher import Publisher
from .requests import check_is_json, id_of, idempotency_key_of, read_body
from .settings import ApiSettings
from .tokens import Tokens

__all__ = ["create_app"]

_HEALTH_PATHS: Final = frozenset({"/health/live", "/health/ready"})


def create_app(settings: ApiSettings, *, publisher: Publisher | None = None) -> FastAPI:
    """Return the API as an ASGI application; its lifespan opens and closes the publisher.

    Raises: InvalidSettings.
    """
    api = _Api(
        settings,
        publisher
        or Publisher(
            settings.redis_url,
            delivery=settings.delivery,
            timeout_seconds=settings.publish_timeout_seconds,
            log_length=settings.log_length,
        ),
    )
    app = FastAPI(
        # Their pages load scripts from other people's hosts.
        docs_url=None,
        redoc_url=None,
        # A path is either right or an error: a client that is redirected may send its body twice, or not at all.
        redirect_slashes=False,
        lifespan=api.lifespan,
    )
    app.add_api_route("/invalidations", api.publish, methods=["POST"], **openapi.PUBLISH)
    app.add_api_route("/invalidations", api.history, methods=["GET"], **openapi.HISTORY)
    app.add_api_route("/health/live", api.live, methods=["GET"], **openapi.LIVE)
    app.add_api_route("/health/ready", api.ready, methods=["GET"], **openapi.READY)
    add_problem_handlers(app)
    tokens = Tokens(settings.tokens)
    if tokens:
        app.add_middleware(TokenGate, tokens=tokens, open_paths=_HEALTH_PATHS)
    openapi.describe(app, needs_token=bool(tokens))
    return app


class _HistoryQuery(BaseModel):
    """What may be asked of the history. A parameter that is misspelt is an error, not a default."""

    model_config = ConfigDict(extra="forbid")

    namespace: str = Field(DEFAULT_NAMESPACE, description="The family of caches whose log is read.")
    limit: int = Field(100, ge=1, le=1_000, description="How many invalidations a page has at most.")
    before: int | None = Field(
        None, ge=1, lt=2**64, description="Only those of a lower sequence: the last page's `next_before`."
    )


class _Api:
    """The endpoints, and what they share."""

    def __init__(self, settings: ApiSettings, publisher: Publisher) -> None:
        self._settings = settings
        self._publisher = publisher
        self._namespaces = frozenset(settings.namespaces)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        async with self._publisher:
            yield

    async def publish(self, request: Request) -> Response:
        check_is_json(request)
        asked = PublishRequest.read(await read_body(request, self._settings.request_bytes_max))
        self._check_is_known(asked.namespace)
        idempotency_key = idempotency_key_of(request)
        try:
            receipt = await self._publisher.publish(
                *asked.targets(),
                namespace=asked.namespace,
                reason=asked.reason,
                id=idempotency_key and id_of(asked.namespace, idempotency_key),
                receipt_seconds=self._settings.idempotency_seconds if idempotency_key else None,
            )
        except (InvalidTarget, InvalidNamespace):
            raise Problem(INVALIDATION_INVALID, errors=asked.flaws()) from None
        is_replayed = idempotency_key is not None and receipt.is_repeat
        headers = {"Idempotency-Replayed": "true"} if is_replayed else None
        return _json(Accepted.of(receipt), headers=headers)

    async def history(self, query: Annotated[_HistoryQuery, Query()]) -> Response:
        self._check_is_known(query.namespace)
        if not self._publisher.has_log:
            raise Problem(LOG_MISSING, LOG_MISSING.example)
        try:
            entries = await self._publisher.history(query.namespace, count=query.limit + 1, before=query.before)
        except InvalidNamespace as error:
            flaw = Flaw(parameter="namespace", detail=f"{error} at query parameter namespace")
            raise Problem(PARAMETER_INVALID, errors=(flaw,)) from None
        return _json(History.of(query.namespace, entries, query.limit))

    async def live(self) -> Response:
        return _json({"status": "live"})

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


def _json(answer: object, *, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(answer), headers=headers, media_type="application/json")
