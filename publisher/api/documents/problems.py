"""The API's problem documents (RFC 9457): each kind of problem, and the exception that carries one."""

from collections.abc import Mapping
from typing import Final, NamedTuple

import msgspec

from ....shared.process.problems import BasicProblem, problem_type

__all__ = [
    "BODY_TOO_LARGE",
    "BODY_UNREADABLE",
    "BROADCASTS_TOO_MANY",
    "BROADCAST_LOOP",
    "CROSS_SITE",
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
    "REPLICA_REGISTERED",
    "REPLICA_UNKNOWN",
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


class Kind(NamedTuple):
    """One kind of problem: its name in `type`, its status, its title, and the detail of its example.

    Shape:  `is_fixed` is whether every problem of this kind has the detail of the example: it then has no made-up data.
    """

    name: str
    status: int
    title: str
    example: str
    is_fixed: bool = False

    @property
    def type(self) -> str:
        """The URI by which programs recognize this kind of problem."""
        return problem_type(self.name)


class Flaw(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One error in a request: where it is in the body, as a `pointer` (RFC 6901), or the name of its `parameter`."""

    detail: str
    pointer: str | None = None
    parameter: str | None = None


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """Why one path to the replicas failed."""

    path: str
    detail: str


class ProblemDocument(BasicProblem, frozen=True, kw_only=True, omit_defaults=True):
    """A problem as it is sent."""

    errors: tuple[Flaw, ...] = ()
    reasons: tuple[Reason, ...] = ()
    rule: str | None = None


class Problem(Exception):
    """Raised where a request cannot be processed; `problem_response` turns it into the response.

    Shape:  `detail` says expected, got, where and what to do; by default it is that of the first of `errors`, the
            fixed text of the kind, or its title, and never the example of another request. `rule` is the name of the
            rule that forbids a broadcast.
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
        self.document: ProblemDocument = ProblemDocument(
            type=kind.type,
            title=kind.title,
            status=kind.status,
            detail=detail or (errors[0].detail if errors else kind.example if kind.is_fixed else f"{kind.title}."),
            errors=errors,
            reasons=reasons,
            rule=rule,
        )
        self.headers: Final = headers
        super().__init__(self.document.detail)


BODY_UNREADABLE: Final = Kind(
    "body-unreadable",
    400,
    "The body cannot be read",
    "the request body is not one JSON object in UTF-8 (12 bytes): Input data was truncated; send the whole object",
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
    "this token may only read, and POST needs the right to write; use a read-write token",
)
NOT_FOUND: Final = Kind("not-found", 404, "The path does not exist", "expected a path of this API, got '/invalidation'")
NAMESPACE_UNKNOWN: Final = Kind(
    "namespace-unknown",
    404,
    "The namespace is not known",
    "expected one of the namespaces products, users, got 'prodcuts' at /namespace",
)
REPLICA_UNKNOWN: Final = Kind(
    "replica-unknown",
    404,
    "The replica is not known",
    "expected the id of a replica that fell silent, got 'web-9'; GET /replicas lists them",
)
REPLICA_REGISTERED: Final = Kind(
    "replica-registered",
    409,
    "The replica is registered",
    "expected a replica that fell silent, got 'web-1', whose next echo would list it again; stop it: it then leaves",
)
LOG_MISSING: Final = Kind(
    "log-missing",
    404,
    "The publisher has no log",
    'a publisher with delivery="fanout" keeps no log, and the log is needed here; use another delivery',
    is_fixed=True,
)
METHOD_NOT_ALLOWED: Final = Kind(
    "method-not-allowed", 405, "The path does not have this method", "expected GET, POST, got DELETE at /invalidations"
)
BODY_TOO_LARGE: Final = Kind(
    "body-too-large",
    413,
    "The body is too large",
    "expected a body of at most 4194304 bytes, got more; send several requests, or use a tag or a prefix",
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
    "this Idempotency-Key was first used with other targets; use a new key, or repeat the first request unchanged",
    is_fixed=True,
)
INTERNAL_ERROR: Final = Kind(
    "internal-error",
    500,
    "Internal error",
    "the publisher failed to process this request, and it is not known whether it took effect; see the publisher's log",
    is_fixed=True,
)
LOG_UNREACHABLE: Final = Kind(
    "log-unreachable",
    503,
    "Redis is unreachable",
    "Redis did not answer in time for POST /invalidations: it is not known whether anything was accepted; send the "
    "request again, a POST with the same Idempotency-Key if it has one",
)
LOG_REFUSED: Final = Kind(
    "log-refused",
    503,
    "Redis refused the command",
    "Redis refused POST /invalidations, and nothing was accepted unless `reasons` says so; send the request again, "
    "with the same Idempotency-Key if it has one, after the operator has fixed the cause in `reasons`",
)
FANOUT_REFUSED: Final = Kind(
    "fanout-refused",
    403,
    "The fan-out is not allowed to do this",
    "expected a service in BROADCACHE_FANOUT_ALLOW, got 'metadata'; add metadata:80 to it to allow this",
)
CROSS_SITE: Final = Kind(
    "cross-site",
    403,
    "A web page of another site may not do this",
    "expected a request that was not sent by a web page of another site, got one by Sec-Fetch-Site or Origin; send it "
    "from a program",
    is_fixed=True,
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
    "Too many broadcasts are in progress",
    "expected at most 32 broadcasts at a time, got one more; try again in a moment",
)
RESOLVER_FAILED: Final = Kind(
    "resolver-failed",
    502,
    "The name server failed",
    "the name servers answered SERVFAIL for 'web'; no address was called, try again",
)
RESOLVER_TIMED_OUT: Final = Kind(
    "resolver-timed-out",
    504,
    "The name server did not answer",
    "the name servers did not answer within 2 s for 'web'; no address was called, try again",
)
BROADCAST_LOOP: Final = Kind(
    "broadcast-loop",
    508,
    "The broadcast has returned to a fan-out",
    "the Via header says that a fan-out has sent this request, and it would return here for ever; make the "
    "service point at replicas, not at a fan-out",
    is_fixed=True,
)
NOT_DELIVERED: Final = Kind(
    "not-delivered",
    503,
    "The invalidation was not delivered",
    "the invalidation was neither acknowledged by Redis nor applied by every replica, it waits to be logged until "
    "Redis is back; send the request again, with the same Idempotency-Key if it has one",
)
STREAMS_EXHAUSTED: Final = Kind(
    "streams-exhausted",
    503,
    "Too many clients follow the events",
    "expected at most 100 clients of GET /events, got one more; reconnect later, or raise BROADCACHE_EVENT_CLIENTS_MAX",
)
