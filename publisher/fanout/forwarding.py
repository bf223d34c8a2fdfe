"""Which headers of a caller's request are forwarded to the addresses: RFC 9110 §7.6, and no credentials."""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from .response import Header

__all__ = ["BODY_DROPPED", "Caller", "forwarded", "is_idempotent", "is_loop"]

_PSEUDONYM: Final = b"broadcache"
BODY_DROPPED: Final = frozenset({"GET", "HEAD", "DELETE", "CONNECT", "TRACE"})
"""Methods whose body has no generally defined semantics: RFC 9110 §9.3."""
_IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "QUERY"})
# Hop-by-hop headers, and headers that each address's own request sets anew.
_OF_THE_CONNECTION: Final = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
        *(b"proxy-authenticate", b"proxy-authentication-info", b"proxy-authorization", b"http2-settings"),
        *(b"content-length", b"expect", b"host"),
    }
)
# Credentials for the publisher's API. Replicas must not see them.
_CREDENTIALS: Final = frozenset({b"authorization", b"cookie"})
_OF_THE_BODY: Final = frozenset({b"content-encoding", b"content-language", b"content-location", b"content-type"})


class Caller(NamedTuple):
    """The sender of a request and its protocol, for the headers X-Forwarded-* and Via."""

    host: str = ""
    scheme: str = "http"
    http_version: str = "1.1"


def is_loop(headers: Iterable[Header]) -> bool:
    """Whether a request has passed through a fan-out already: a fan-out that reaches itself would never end."""
    hops = b",".join(value for name, value in headers if name.lower() == b"via").split(b",")
    return any(word == _PSEUDONYM for hop in hops for word in hop.split()[1:2])


def is_idempotent(method: str, headers: Iterable[Header]) -> bool:
    """Whether a request may be sent twice: by its method, or because it carries an Idempotency-Key."""
    return method in _IDEMPOTENT or any(name.lower() == b"idempotency-key" for name, _ in headers)


def forwarded(
    headers: Sequence[Header], caller: Caller, *, with_credentials: bool, with_body: bool
) -> tuple[Header, ...]:
    """Return the headers to forward, in their order, with X-Forwarded-* and Via added.

    Shape:  without Host and Content-Length, which each address's own request sets. Names keep their case.
    Source: RFC 9110 §7.6.1 (hop-by-hop), §7.6.3 (Via).
    """
    dropped = set(_OF_THE_CONNECTION)
    for name, value in headers:
        if name.lower() == b"connection":
            dropped.update(word.strip().lower() for word in value.split(b","))
    if not with_credentials:
        dropped |= _CREDENTIALS
    if not with_body:
        dropped |= _OF_THE_BODY
    kept = [(name, value) for name, value in headers if name.lower() not in dropped]
    return (*_with_origin(kept, headers, caller), (b"Via", b"%s %s" % (caller.http_version.encode(), _PSEUDONYM)))


def _with_origin(kept: list[Header], headers: Sequence[Header], caller: Caller) -> list[Header]:
    """Add the X-Forwarded-* headers, after those of earlier proxies, and replace none of theirs."""
    if caller.host:
        kept.append((b"X-Forwarded-For", caller.host.encode("ascii", "replace")))
    present = {name.lower() for name, _ in kept}
    if b"x-forwarded-proto" not in present:
        kept.append((b"X-Forwarded-Proto", caller.scheme.encode()))
    host = next((value for name, value in headers if name.lower() == b"host"), b"")
    if host and b"x-forwarded-host" not in present:
        kept.append((b"X-Forwarded-Host", host))
    return kept
