"""What of a caller's request goes on to the addresses, and what stays here: RFC 9110 §7.6, and no credentials."""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from .exchange import Header

__all__ = ["BODY_DROPPED", "Caller", "forwarded", "is_idempotent", "is_loop"]

_PSEUDONYM: Final = b"broadcache"
BODY_DROPPED: Final = frozenset({"GET", "HEAD", "DELETE", "CONNECT", "TRACE"})
"""Methods whose bodies have no meaning that all servers share: RFC 9110 §9.3."""
_IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "QUERY"})
# Of one connection, not of the request; or of what is written anew for each address.
_OF_THE_CONNECTION: Final = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
        *(b"proxy-authenticate", b"proxy-authentication-info", b"proxy-authorization", b"http2-settings"),
        *(b"content-length", b"expect", b"host"),
    }
)
# Whoever may call us has shown that to us. Pods are somebody else.
_CREDENTIALS: Final = frozenset({b"authorization", b"cookie"})
_OF_THE_BODY: Final = frozenset({b"content-encoding", b"content-language", b"content-location", b"content-type"})


class Caller(NamedTuple):
    """Who sent a request, and how it came: for the headers that say so."""

    host: str = ""
    scheme: str = "http"
    http_version: str = "1.1"


def is_loop(headers: Iterable[Header]) -> bool:
    """Whether a request has been through a fan-out already: one that reached itself would never end."""
    hops = b",".join(value for name, value in headers if name.lower() == b"via").split(b",")
    return any(word == _PSEUDONYM for hop in hops for word in hop.split()[1:2])


def is_idempotent(method: str, headers: Iterable[Header]) -> bool:
    """Whether sending a request twice is as good as sending it once: by its method, or because its sender says so."""
    return method in _IDEMPOTENT or any(name.lower() == b"idempotency-key" for name, _ in headers)


def forwarded(
    headers: Sequence[Header], caller: Caller, *, with_credentials: bool, with_body: bool
) -> tuple[Header, ...]:
    """Return the headers that go on, in their order, with those that tell where the request has been.

    Shape:  without Host and Content-Length, which belong to each address's own request. Names keep their case.
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
    return (*_told(kept, headers, caller), (b"Via", b"%s %s" % (caller.http_version.encode(), _PSEUDONYM)))


def _told(kept: list[Header], headers: Sequence[Header], caller: Caller) -> list[Header]:
    """Add who asked for what: after what others have said of it before us, never instead."""
    if caller.host:
        kept.append((b"X-Forwarded-For", caller.host.encode("ascii", "replace")))
    present = {name.lower() for name, _ in kept}
    if b"x-forwarded-proto" not in present:
        kept.append((b"X-Forwarded-Proto", caller.scheme.encode()))
    host = next((value for name, value in headers if name.lower() == b"host"), b"")
    if host and b"x-forwarded-host" not in present:
        kept.append((b"X-Forwarded-Host", host))
    return kept
