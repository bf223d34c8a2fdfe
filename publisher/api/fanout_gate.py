"""The fan-out over HTTP: `ANY /{service}/{port}/{rest}` sends the request to every address of the service."""

import logging
from collections.abc import Set as AbstractSet
from typing import Final, NamedTuple

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ..fanout.addresses import AliasRefused, ResolverFailed, ResolverTimedOut, ServiceNotFound
from ..fanout.broadcaster import Broadcast, Broadcaster, Request, TooManyBroadcasts
from ..fanout.forwarding import BODY_DROPPED, Caller, forwarded, is_idempotent, is_loop
from ..fanout.policy import Destination, FanoutPolicy, FanoutRefused, InvalidService
from .documents.broadcast import BroadcastResult, answer_of
from .documents.problems import (
    BROADCAST_LOOP,
    BROADCASTS_TOO_MANY,
    FANOUT_REFUSED,
    RESOLVER_FAILED,
    RESOLVER_TIMED_OUT,
    SERVICE_INVALID,
    SERVICE_NOT_FOUND,
    Problem,
)
from .paths import sent_path_of
from .request_counter import FANOUT_ROUTE
from .requests import check_is_same_site, read_body
from .responses import json_response, problem_response

__all__ = ["FanoutGate"]

_RETRY_AFTER_SECONDS: Final = 1

_log = logging.getLogger("broadcache.fanout")


class _Path(NamedTuple):
    """A request's path, still percent-encoded: `target` is what is sent to the service."""

    service: str
    port: str
    target: bytes


class FanoutGate:
    """ASGI application for paths without a route: broadcasts to the service that the path names.

    Requests that a browser sends for a page of another site are refused, whatever their method: replicas act on them.

    Shape:  paths are still percent-encoded (`EncodedPath`). `app` handles the other requests: paths of one segment, and
            paths that begin with one of `reserved`. `failure_status` is the status of the response when an address did
            not answer 200 to 299.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        broadcaster: Broadcaster,
        policy: FanoutPolicy,
        reserved: AbstractSet[str],
        failure_status: int,
        request_bytes_max: int,
        with_credentials: bool,
    ) -> None:
        self._app = app
        self._broadcaster = broadcaster
        self._policy = policy
        self._reserved = reserved
        self._failure_status = failure_status
        self._request_bytes_max = request_bytes_max
        self._with_credentials = with_credentials

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Broadcast the request, or pass it on."""
        path = _path_of(scope) if scope["type"] == "http" else None
        if path is None or path.service in self._reserved:
            await self._app(scope, receive, send)
            return
        scope["broadcache.route"] = FANOUT_ROUTE
        request = HttpRequest(scope, receive)
        try:
            response = await self._broadcast(request, path)
        except Problem as problem:
            _log.warning(
                "broadcast refused: %s %r for %s: %s", request.method, _shown(path), _caller_of(request), problem
            )
            response = problem_response(problem)
        except ClientDisconnect:
            return  # the client left before it had sent the whole request: nothing was sent, and no response can be
        await response(scope, receive, send)

    async def _broadcast(self, http: HttpRequest, path: _Path) -> Response:
        headers: list[tuple[bytes, bytes]] = http.scope["headers"]
        check_is_same_site(http)
        destination = self._checked(http.method, path)
        if is_loop(headers):
            raise Problem(BROADCAST_LOOP)
        body = await read_body(http, self._request_bytes_max)
        is_body_dropped = bool(body) and http.method in BODY_DROPPED
        request = Request(
            method=http.method,
            destination=destination,
            target=path.target,
            headers=forwarded(
                headers,
                Caller(http.client.host if http.client else "", http.scope["scheme"], http.scope["http_version"]),
                with_credentials=self._with_credentials,
                with_body=not is_body_dropped,
            ),
            body=b"" if is_body_dropped else body,
            is_idempotent=is_idempotent(http.method, headers),
            original_host=next((value for name, value in headers if name == b"host"), b""),
        )
        broadcast = await self._sent(request, http)
        result = answer_of(broadcast, is_body_dropped=is_body_dropped)
        # The response to a HEAD request has this header and no body.
        summary = {"X-Broadcache-Fanout": _summary_of(result)}
        return json_response(result, self._failure_status if result.failed else 200, headers=summary)

    def _checked(self, method: str, path: _Path) -> Destination:
        try:
            return self._policy.check(method, path.service, path.port)
        except FanoutRefused as refusal:
            raise _refused(refusal.rule, refusal) from None
        except InvalidService as error:
            raise Problem(SERVICE_INVALID, str(error)) from None

    async def _sent(self, request: Request, http: HttpRequest) -> Broadcast:
        try:
            broadcast = await self._broadcaster.broadcast(request)
        except FanoutRefused as refusal:
            raise _refused(refusal.rule, refusal) from None
        except AliasRefused as refusal:
            raise _refused("alias-leaves-service", refusal) from None
        except ServiceNotFound as error:
            raise Problem(SERVICE_NOT_FOUND, str(error)) from None
        except ResolverTimedOut as error:
            raise Problem(RESOLVER_TIMED_OUT, str(error)) from None
        except ResolverFailed as error:
            raise Problem(RESOLVER_FAILED, str(error)) from None
        except TooManyBroadcasts as error:
            raise Problem(BROADCASTS_TOO_MANY, str(error), headers={"Retry-After": str(_RETRY_AFTER_SECONDS)}) from None
        _audit(request, broadcast, _caller_of(http))
        return broadcast


def _path_of(scope: Scope) -> _Path | None:
    """Split a path, which is percent-encoded. None when it has no port."""
    service, slash, rest = sent_path_of(scope).removeprefix("/").partition("/")
    if not slash:
        return None
    port, _, rest = rest.partition("/")
    query: bytes = scope["query_string"]
    target = b"/" + rest.encode("latin-1") + (b"?" + query if query else b"")
    return _Path(service, port, target)


def _refused(rule: str, refusal: Exception) -> Problem:
    return Problem(FANOUT_REFUSED, str(refusal), rule=rule)


def _summary_of(result: BroadcastResult) -> str:
    complete = str(result.complete).lower()
    return f"total={result.total}, succeeded={result.succeeded}, failed={result.failed}, complete={complete}"


def _audit(request: Request, broadcast: Broadcast, caller: str) -> None:
    """Log a broadcast on one line: caller, request, result. Not its query and body, which may hold secrets."""
    failed = [f"{each.url.partition('?')[0]} ({each.error or each.status_code})" for each in broadcast.outcomes]
    failed = [shown for shown, each in zip(failed, broadcast.outcomes, strict=True) if not each.is_success]
    more = f"; {len(failed) - 10} more" if len(failed) > 10 else ""
    _log.info(
        "broadcast %s %r to %s:%s for %s: %d of %d succeeded in %.0f ms%s%s",
        request.method,
        request.target.partition(b"?")[0].decode("latin-1"),
        request.destination.name,
        request.destination.port,
        caller,
        broadcast.succeeded,
        len(broadcast.outcomes),
        broadcast.elapsed_ms,
        "" if broadcast.is_complete else ", not complete",
        f"; failed: {', '.join(failed[:10])}{more}" if failed else "",
    )


def _caller_of(request: HttpRequest) -> str:
    return request.client.host if request.client else "an unknown caller"


def _shown(path: _Path) -> str:
    return f"/{path.service}/{path.port}{path.target.partition(b'?')[0].decode('latin-1')}"[:200]
