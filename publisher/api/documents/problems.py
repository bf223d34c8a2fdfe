"""What the API answers when it cannot do what was asked: problem documents (RFC 9457)."""

from collections.abc import Mapping
from typing import Final, NamedTuple

import msgspec
from starlette.responses import Response

__all__ = [
    "BODY_TOO_LARGE",
    "BODY_UNREADABLE",
    "BROADCASTS_TOO_MANY",
    "BROADCAST_LOOP",
    "FANOUT_REFUSED",
    "IDEMPOTENCY_CONFLICT",
    "IDEMPOTENCY_KEY_INVALID",
    "INTERNAL_ERROR",
    "INVALIDATION_INVALID",
    "LOG_MISSING",
    "LOG_REFUSED",
    "LOG_UNREACHABLE",
    "MEDIA_TYPE_UNSUPPORTED",
    "METHOD_NOT_ALLOWED",
    "NAMESPACE_UNKNOWN",
    "NOT_DELIVERED",
    "NOT_FOUND",
    "PARAMETER_INVALID",
    "RESOLVER_FAILED",
    "RESOLVER_TIMED_OUT",
    "RIGHT_MISSING",
    "SERVICE_INVALID",
    "SERVICE_NOT_FOUND",
    "STREAMS_EXHAUSTED",
    "TOKEN_INVALID",
    "Flaw",
    "Kind",
    "Problem",
    "ProblemDocument",
    "Reason",
]

_MEDIA_TYPE: Final = "application/problem+json"


class Kind(NamedTuple):
    """One kind of problem: its name in `type`, its status, its title, and the detail of the documented example."""

    name: str
    status: int
    title: str
    example: str

    @property
    def type(self) -> str:
        """The URI that names this kind of problem, for programs to tell it by."""
        return f"urn:broadcache:problem:{self.name}"


class Flaw(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that is wrong with a request: `pointer` into its body (RFC 6901), or the name of its `parameter`."""

    detail: str
    pointer: str | None = None
    parameter: str | None = None


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """Why one way to the replicas failed."""

    path: str
    detail: str


class ProblemDocument(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A problem as it is sent."""

    type: str
    title: str
    status: int
    detail: str
    errors: tuple[Flaw, ...] = ()
    reasons: tuple[Reason, ...] = ()
    rule: str | None = None


class Problem(Exception):
    """Raised where a request cannot be answered; the API answers with it.

    Shape:  `detail` says expected, got, where and what to do; without it, it is that of the first of `errors`. `rule`
            names what forbids a broadcast.
    """

    def __init__(
        self,
        kind: Kind,
        detail: str = "",
        *,
        errors: tuple[Flaw, ...] = (),
        reasons: tuple[Reason, ...] = (),
        rule: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self.document = ProblemDocument(
            type=kind.type,
            title=kind.title,
            status=kind.status,
            detail=detail or errors[0].detail,
            errors=errors,
            reasons=reasons,
            rule=rule,
        )
        self._headers = headers
        super().__init__(self.document.detail)

    def response(self) -> Response:
        """Return it as an HTTP response."""
        return Response(
            msgspec.json.encode(self.document), self.kind.status, headers=self._headers, media_type=_MEDIA_TYPE
        )


BODY_UNREADABLE: Final = Kind(
    "body-unreadable",
    400,
    "The body cannot be read",
    "expected a body of one JSON object in UTF-8, got: Input data was truncated; send the whole object",
)
IDEMPOTENCY_KEY_INVALID: Final = Kind(
    "idempotency-key-invalid",
    400,
    "The Idempotency-Key cannot be used",
    "expected an Idempotency-Key of 1 to 255 printable ASCII characters, got 300; send a UUID, for example",
)
TOKEN_INVALID: Final = Kind(
    "token-invalid",
    401,
    "A valid token is needed",
    "expected the header 'Authorization: Bearer TOKEN' with a valid token, got none; ask the operator for one",
)
RIGHT_MISSING: Final = Kind(
    "right-missing",
    403,
    "The token may only read",
    "expected a token that may write for POST, got one that may only read; use a read-write token",
)
NOT_FOUND: Final = Kind(
    "not-found", 404, "There is nothing at this path", "expected a path of this API, got '/invalidation'"
)
NAMESPACE_UNKNOWN: Final = Kind(
    "namespace-unknown",
    404,
    "The namespace is not known",
    "expected one of the namespaces products, users, got 'prodcuts' at /namespace",
)
LOG_MISSING: Final = Kind(
    "log-missing",
    404,
    "There is no log",
    'expected a publisher that has a log, got one with delivery="fanout" alone, which remembers nothing',
)
METHOD_NOT_ALLOWED: Final = Kind(
    "method-not-allowed", 405, "The path has no such method", "expected GET, POST, got DELETE at /invalidations"
)
BODY_TOO_LARGE: Final = Kind(
    "body-too-large",
    413,
    "The body is too large",
    "expected a body of at most 4194304 bytes, got more; send several requests, or name a tag or a prefix",
)
MEDIA_TYPE_UNSUPPORTED: Final = Kind(
    "media-type-unsupported",
    415,
    "The body is not JSON",
    "expected Content-Type: application/json, got 'text/plain'",
)
INVALIDATION_INVALID: Final = Kind(
    "invalidation-invalid",
    422,
    "The invalidation is not valid",
    "expected a string that is not empty, got '' at /keys/0",
)
PARAMETER_INVALID: Final = Kind(
    "parameter-invalid",
    422,
    "A query parameter is not valid",
    "expected an integer from 1 to 1000, got '0' at query parameter limit",
)
IDEMPOTENCY_CONFLICT: Final = Kind(
    "idempotency-conflict",
    422,
    "The Idempotency-Key was used for another request",
    "expected the request that this Idempotency-Key was first used for, got other targets; use a new key",
)
INTERNAL_ERROR: Final = Kind(
    "internal-error",
    500,
    "The publisher failed",
    "expected to answer this request, failed to; it is not known whether it took effect; the publisher's log says more",
)
LOG_UNREACHABLE: Final = Kind(
    "log-unreachable",
    503,
    "Redis cannot be reached",
    "expected Redis to log the invalidation within 2 s, got no answer: nothing is known to be accepted; send the "
    "request again, with the same Idempotency-Key if it has one",
)
LOG_REFUSED: Final = Kind(
    "log-refused",
    503,
    "Redis refused",
    "expected Redis to log an invalidation of 'products', got: OOM command not allowed when used memory > 'maxmemory'",
)
FANOUT_REFUSED: Final = Kind(
    "fanout-refused",
    403,
    "The fan-out may not do this",
    "expected a service that BROADCACHE_FANOUT_ALLOW names, got 'metadata'; add metadata:80 to it if this is meant",
)
SERVICE_NOT_FOUND: Final = Kind(
    "service-not-found",
    404,
    "The service has no addresses",
    "expected addresses of 'web' in DNS, got NXDOMAIN; check its name, and that one of its pods is ready",
)
SERVICE_INVALID: Final = Kind(
    "service-invalid",
    422,
    "The service or the port is not valid",
    "expected a port from 1 to 65535, or the name of one, got '0' after the service",
)
BROADCASTS_TOO_MANY: Final = Kind(
    "broadcasts-too-many",
    429,
    "Too many broadcasts are under way",
    "expected at most 32 broadcasts at a time, got one more; try again in a moment",
)
RESOLVER_FAILED: Final = Kind(
    "resolver-failed",
    502,
    "The name server failed",
    "expected the name servers to say where 'web' is, got SERVFAIL; nobody was called, try again",
)
RESOLVER_TIMED_OUT: Final = Kind(
    "resolver-timed-out",
    504,
    "The name server did not answer",
    "expected the name servers to say where 'web' is within 2 s, got no answer; nobody was called, try again",
)
BROADCAST_LOOP: Final = Kind(
    "broadcast-loop",
    508,
    "The broadcast has come back",
    "expected a request that no fan-out has sent, got one whose Via header names broadcache",
)
NOT_DELIVERED: Final = Kind(
    "not-delivered",
    503,
    "Neither path delivered",
    "expected the invalidation to be logged, or taken by every replica, got neither: it waits to be logged when Redis "
    "takes it; send the request again, with the same Idempotency-Key if it has one",
)
STREAMS_EXHAUSTED: Final = Kind(
    "streams-exhausted",
    503,
    "No more clients can follow",
    "expected at most 100 clients to follow at once, got one more; come back later, or raise "
    "BROADCACHE_EVENT_CLIENTS_MAX",
)
