"""Who may post an invalidation to a replica. It reads ASGI scopes, and needs no web framework."""

import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from ...shared.process.cross_site import is_cross_site
from ...shared.process.tokens import Tokens
from .replica_token import ALLOW_OPEN_VARIABLE, TOKEN_VARIABLE, replica_allow_open, replica_tokens

__all__ = ["Access", "Refusal", "is_from_this_machine", "refusal_of"]

_FORWARDED: Final = re.compile(
    rb"forwarded|via|x-forwarded(-.*)?|x-real-ip|x-envoy-.*|x-original-.*|l5d-.*"
    rb"|(x-|x-cluster-|true-|fastly-|fly-)?client-ip|cf-connecting-ip|cf-ray|x-amzn-trace-id|x-arr-.*|x-azure-.*"
    rb"|forwarded-for|x-vercel-.*|x-appengine-.*|x-cloud-trace-context|cloudfront-.*|x-proxyuser-ip|cdn-loop|dapr-.*"
    rb"|proxy-connection"
)
"""Headers that proxies, side-cars and load balancers add, and that no caller on this machine needs."""
_TEST_CLIENT: Final = "testclient"
"""The host that Starlette's TestClient states. No server does without a forwarding header: it is no address."""


class Access(NamedTuple):
    """What a caller needs for POST. Without tokens only callers on this machine may, or all if `allow_open`."""

    tokens: Tokens
    allow_open: bool

    @classmethod
    def of(cls, replica_token: str | None = None, *, allow_open: bool | None = None) -> "Access":
        """Return that of the arguments, by default of the environment. Raises: InvalidSettings."""
        return cls(replica_tokens(replica_token), replica_allow_open(allow_open=allow_open))

    @property
    def is_open(self) -> bool:
        """Whether each caller that reaches the route may use it."""
        return self.allow_open and not self.tokens


class Refusal(NamedTuple):
    """Why a request is refused: the parts of a problem document."""

    status: int
    kind: str
    title: str
    detail: str


_TOKEN_INVALID: Final = Refusal(
    401,
    "token-invalid",
    "A valid token is needed",
    "expected one header 'Authorization: Bearer TOKEN' with a valid token, got none; ask the operator for one",
)
_CROSS_SITE: Final = Refusal(
    403,
    "cross-site",
    "A web page of another site may not do this",
    "expected a request that was not sent by a web page of another site, got one by Sec-Fetch-Site or Origin; "
    "send it from a program",
)
_TOKEN_NOT_SET: Final = Refusal(
    403,
    "token-not-set",
    "This replica has no token, so only callers on its own machine may do this",
    "expected a request from loopback to loopback that no proxy has forwarded, since no token is set, got another "
    f"one; set {TOKEN_VARIABLE} for the replica and for the publisher, or, where each client that reaches the port may "
    f"empty the cache, allow_open=True or {ALLOW_OPEN_VARIABLE}=true",
)


def refusal_of(scope: Mapping[str, Any], access: Access) -> Refusal | None:
    """Return why the request of this ASGI scope may not invalidate; None when it may."""
    if access.tokens and access.tokens.authorize(scope["headers"]).right is None:
        return _TOKEN_INVALID
    if is_cross_site(scope["headers"]):
        return _CROSS_SITE
    if not access.tokens and not access.allow_open and not is_from_this_machine(scope):
        return _TOKEN_NOT_SET
    return None


def is_from_this_machine(scope: Mapping[str, Any]) -> bool:
    """Whether the caller itself is on this machine: both ends are loopback, and there is no trace of a proxy.

    A side-car or a proxy makes all traffic loopback. It shows by the headers that it adds, by HTTP/1.0, and by the
    Host that the caller used. A Host that is not loopback may also be the name of a web page that resolves to
    127.0.0.1. Over a Unix socket the caller is unknown: behind it is usually a proxy.
    """
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    if scope.get("http_version") == "1.0" or any(_FORWARDED.fullmatch(name) for name, _ in headers):
        return False
    client, server = scope.get("client"), scope.get("server")
    if not client or not server:
        return False
    if client[0] == _TEST_CLIENT:
        return True
    hosts = [_host_of(f"//{value.decode('latin-1')}") for name, value in headers if name == b"host"]
    return all(_is_loopback(host) for host in (client[0], server[0], *hosts))


def _is_loopback(host: object) -> bool:
    if not isinstance(host, str):
        return False
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() in {"localhost", "localhost."}
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
