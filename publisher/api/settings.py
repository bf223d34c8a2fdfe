"""The settings of the publisher's HTTP API, and of the fan-out, which can be served alone."""

import ssl
from collections.abc import Sequence
from typing import Annotated, Final, TypedDict

from msgspec import Meta

from ...shared.errors import BroadcacheError, InvalidNamespace, InvalidSettings
from ...shared.invalidation import check_namespace
from ...shared.process.extras import MissingPackage
from ...shared.process.logs import LogSettings
from ...shared.process.serving import is_loopback
from ...shared.process.tokens import Tokens
from ...shared.transport.redis.log import LOG_LENGTH
from ..audit.source import check_source_url
from ..fanout.addresses import Discovery
from ..fanout.broadcaster import Broadcaster, HostMode, Limits, Scheme, tls_of
from ..fanout.discovery import DnsDiscovery, ListDiscovery
from ..fanout.fanout import Fanout
from ..fanout.policy import FanoutPolicy
from ..publishing.delivery import Delivery

__all__ = ["ApiSettings", "FanoutSettings", "lists_of"]

_STATUSES_WITHOUT_BODY: Final = frozenset({204, 205, 304})
_Text = Annotated[str, Meta(min_length=1)]


class _Calling(TypedDict):
    """How addresses are called, for a broadcast and for the second path alike."""

    limits: Limits
    scheme: Scheme
    host_mode: HostMode
    tls: ssl.SSLContext | None
    tls_name: str | None


class FanoutSettings(LogSettings, frozen=True, kw_only=True):
    """The address to listen on, the access to it, and the limits of the fan-out.

    Raises: InvalidSettings, at construction.
    """

    listen_host: Annotated[
        str, Meta(min_length=1, description="The address to listen on; a non-loopback address requires a token.")
    ] = "127.0.0.1"
    listen_port: Annotated[
        int, Meta(ge=0, le=65_535, description="The TCP port to listen on; 0 takes a free one, which is printed.")
    ] = 8_000
    tokens: Annotated[
        tuple[str, ...],
        Meta(
            description="TOKEN or rw:TOKEN (read and write) or ro:TOKEN (only GET). With several, a token can be "
            "replaced while the old one is still valid. None: any client that reaches the port may publish.",
            extra={"secret": True},
        ),
    ] = ()
    allow_open: Annotated[
        bool, Meta(description="Listen on a non-loopback address without a token: for closed networks.")
    ] = False
    request_bytes_max: Annotated[
        int,
        Meta(ge=1_024, le=2**30, description="The largest request body: it bounds the memory that one request uses."),
    ] = 4 * 2**20
    fanout_allow: Annotated[
        tuple[_Text, ...],
        Meta(
            description="service:port, the services that may be broadcast to; a port is a number, a name or *. A "
            "name needs the numbers besides that it may stand for. None: the fan-out is off."
        ),
    ] = ()
    fanout_networks: Annotated[
        tuple[_Text, ...],
        Meta(
            description="CIDRs of allowed addresses. None: all but loopback, link-local, metadata and similar "
            "addresses, which have to be listed here."
        ),
    ] = ()
    fanout_methods: Annotated[
        tuple[_Text, ...], Meta(description="The only methods that may be broadcast. None: all but CONNECT.")
    ] = ()
    fanout_nameservers: Annotated[
        tuple[_Text, ...], Meta(description="host:port of name servers. None: the system's.")
    ] = ()
    fanout_lists: Annotated[
        tuple[_Text, ...],
        Meta(description="service=address|address: services with fixed addresses. Each is host:port, or host."),
    ] = ()
    fanout_failure_status: Annotated[
        int, Meta(ge=400, le=599, description="The status when not every address answered 200 to 299.")
    ] = 400
    fanout_connect_timeout_seconds: Annotated[
        float, Meta(gt=0, le=60, description="How long connecting to one address may take.")
    ] = 0.5
    fanout_timeout_seconds: Annotated[
        float, Meta(gt=0, le=600, description="How long one address may take in total, with retries.")
    ] = 2.0
    fanout_deadline_seconds: Annotated[
        float,
        Meta(
            gt=0,
            le=3_600,
            description="How long a broadcast may take; addresses that were not called by then are skipped.",
        ),
    ] = 10.0
    fanout_concurrency: Annotated[
        int, Meta(ge=1, le=65_536, description="How many addresses are called at the same time.")
    ] = 256
    fanout_broadcasts_max: Annotated[
        int,
        Meta(
            ge=1, le=65_536, description="How many broadcasts may run at the same time; one more is refused with 429."
        ),
    ] = 32
    fanout_host: Annotated[
        HostMode, Meta(description="The Host header: address, service, or original (the caller's).")
    ] = "address"
    fanout_scheme: Annotated[Scheme, Meta(description="http, or https, which checks certificates.")] = "http"
    fanout_tls_name: Annotated[
        str | None, Meta(description="The name that certificates have to match. None: the name of the service.")
    ] = None
    fanout_ca_file: Annotated[
        str | None, Meta(description="A file with trusted certificate authorities. None: the system's.")
    ] = None
    fanout_forward_authorization: Annotated[
        bool,
        Meta(description="Forward the caller's Authorization and Cookie headers, which were meant for the publisher."),
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens = Tokens(self.tokens)
        if not tokens and not self.allow_open and not is_loopback(self.listen_host):
            raise InvalidSettings(
                f"BROADCACHE_LISTEN_HOST: expected a loopback address such as 127.0.0.1 without a token, got "
                f"{self.listen_host!r}: any client that reaches it could empty every cache; set BROADCACHE_TOKENS, or "
                "BROADCACHE_ALLOW_OPEN=true (--allow-open) in a closed network"
            )
        self.fanout_policy()
        self.fanout_limits()
        self.fanout_tls()
        ListDiscovery(lists_of(self.fanout_lists))

    def fanout_policy(self) -> FanoutPolicy:
        """Return the policy of the fan-out. Raises: InvalidSettings."""
        return FanoutPolicy(self.fanout_allow, networks=self.fanout_networks, methods=self.fanout_methods)

    def fanout_limits(self) -> Limits:
        """Return the limits of the fan-out. Raises: InvalidSettings."""
        return Limits(
            connect_timeout_seconds=self.fanout_connect_timeout_seconds,
            timeout_seconds=self.fanout_timeout_seconds,
            deadline_seconds=max(self.fanout_deadline_seconds, self.fanout_timeout_seconds),
            concurrency=self.fanout_concurrency,
            broadcasts_max=self.fanout_broadcasts_max,
        )

    def fanout_discovery(self) -> Discovery:
        """Return the discovery of addresses: by list, or else by DNS. Raises: InvalidSettings."""
        # A fan-out that is off needs no DNS library.
        try:
            otherwise = DnsDiscovery(self.fanout_nameservers) if self.fanout_allow else None
        except MissingPackage:
            raise
        except InvalidSettings as error:
            raise InvalidSettings(f"BROADCACHE_FANOUT_NAMESERVERS: {error}") from None
        return ListDiscovery(lists_of(self.fanout_lists), otherwise)

    def fanout_broadcaster(self, policy: FanoutPolicy, discovery: Discovery | None = None) -> Broadcaster:
        """Return a broadcaster, with `discovery` or else that of these settings. Raises: InvalidSettings."""
        return Broadcaster(discovery or self.fanout_discovery(), policy, **self._calling())

    def fanout_tls(self) -> ssl.SSLContext | None:
        """Return the TLS context of the fan-out; None for plain HTTP. Raises: InvalidSettings."""
        return tls_of(self.fanout_scheme, self.fanout_ca_file, "BROADCACHE_FANOUT_CA_FILE")

    def _calling(self) -> "_Calling":
        return {
            "limits": self.fanout_limits(),
            "scheme": self.fanout_scheme,
            "host_mode": self.fanout_host,
            "tls": self.fanout_tls(),
            "tls_name": self.fanout_tls_name,
        }


def lists_of(items: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read `service=address|address` items. Raises: InvalidSettings."""
    lists = {}
    for item in items:
        service, equals, addresses = item.partition("=")
        if not service or not equals or not all(addresses.split("|")):
            raise InvalidSettings(
                f"BROADCACHE_FANOUT_LISTS: expected service=address|address, got {item!r:.100}; for example "
                "replicas=127.0.0.1:8101|127.0.0.1:8102"
            )
        lists[service] = tuple(addresses.split("|"))
    return lists


class ApiSettings(FanoutSettings, frozen=True, kw_only=True):
    """The settings of the API: those of the fan-out, and of publishing, events and audits.

    Raises: InvalidSettings, at construction.
    """

    redis_url: Annotated[
        str,
        Meta(
            min_length=1,
            description="The Redis that holds the log; the URL may contain a password.",
            extra={"secret": True},
        ),
    ] = "redis://127.0.0.1:6379"
    delivery: Annotated[
        Delivery,
        Meta(
            description="The path to the replicas: redis (only the log), fanout (only HTTP), redis-then-fanout (HTTP "
            "when Redis does not accept it at once), both."
        ),
    ] = "redis"
    fanout_service: Annotated[
        str | None,
        Meta(description="service:port of the replicas, for invalidations by HTTP. For any delivery but redis."),
    ] = None
    replica_token: Annotated[
        str | None,
        Meta(description="The token that replicas accept. Of several, the first is sent.", extra={"secret": True}),
    ] = None
    namespaces: Annotated[
        tuple[_Text, ...],
        Meta(description="The allowed namespaces, so that a misspelt one is an error. None: any."),
    ] = ()
    publish_timeout_seconds: Annotated[
        float, Meta(gt=0, le=60, description="How long one publish is tried before the response is 503.")
    ] = 2.0
    log_length: Annotated[
        int,
        Meta(ge=1, description="About how many invalidations each log keeps, for replicas that reconnect."),
    ] = LOG_LENGTH
    idempotency_seconds: Annotated[
        float,
        Meta(ge=1, le=2_592_000, description="How long an Idempotency-Key is kept: a retry is safe until then."),
    ] = 86_400.0
    unconfirmed_status: Annotated[
        int,
        Meta(
            ge=200, le=599, description="The status of a publish that was logged, but not confirmed by every replica."
        ),
    ] = 207
    event_clients_max: Annotated[
        int, Meta(ge=1, le=100_000, description="How many clients may follow GET /events at the same time.")
    ] = 100
    event_heartbeat_seconds: Annotated[
        float,
        Meta(gt=0, le=3_600, description="The longest silence of GET /events: proxies close idle connections."),
    ] = 15.0
    audit_namespaces: Annotated[
        tuple[_Text, ...],
        Meta(description="The namespaces whose replicas are audited, for /metrics. None: the audit is off."),
    ] = ()
    audit_sample: Annotated[
        float, Meta(gt=0, le=1, description="The share of invalidations that the audit examines.")
    ] = 0.1
    audit_source_url: Annotated[
        str | None,
        Meta(
            description="http://…/{key}, the URL of a value in the source, as JSON. None: replicas are compared with "
            "each other.",
            extra={"secret": True},
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_namespaces(self.namespaces, "BROADCACHE_NAMESPACES")
        self._check_audit()
        if (self.delivery == "redis") == (self.fanout_service is not None):
            raise InvalidSettings(
                "BROADCACHE_FANOUT_SERVICE: expected service:port with BROADCACHE_DELIVERY=fanout, "
                "redis-then-fanout or both, and none with redis, "
                f"got {self.fanout_service!r} with {self.delivery}; set both, or neither"
            )
        self.second_path()
        if self.unconfirmed_status in _STATUSES_WITHOUT_BODY:
            raise InvalidSettings(
                f"BROADCACHE_UNCONFIRMED_STATUS: expected a status with a response body, for the missing replicas, got "
                f"{self.unconfirmed_status}; use 207, or 504 for clients that only look for errors"
            )

    def _check_audit(self) -> None:
        _check_namespaces(self.audit_namespaces, "BROADCACHE_AUDIT_NAMESPACES")
        if len({*self.audit_namespaces}) < len(self.audit_namespaces):
            raise InvalidSettings(
                f"BROADCACHE_AUDIT_NAMESPACES: expected each namespace once, got {','.join(self.audit_namespaces)!r}; "
                "remove the duplicates"
            )
        unknown = [each for each in self.audit_namespaces if self.namespaces and each not in self.namespaces]
        if unknown:
            raise InvalidSettings(
                f"BROADCACHE_AUDIT_NAMESPACES: expected some of the namespaces {', '.join(self.namespaces)}, got "
                f"{unknown[0]!r}; correct it, or add it to BROADCACHE_NAMESPACES"
            )
        if self.audit_namespaces and self.delivery == "fanout":
            raise InvalidSettings(
                "BROADCACHE_AUDIT_NAMESPACES: expected none with BROADCACHE_DELIVERY=fanout, which logs nothing that "
                f"an audit could follow, got {','.join(self.audit_namespaces)!r}; leave it out"
            )
        if self.audit_source_url is not None:
            try:
                check_source_url(self.audit_source_url)
            except InvalidSettings as error:
                raise InvalidSettings(f"BROADCACHE_AUDIT_SOURCE_URL: {error}; correct it, or leave it out") from None

    def second_path(self) -> Fanout | None:
        """Return the fan-out that is the second path; None without one. Raises: InvalidSettings."""
        if self.fanout_service is None:
            return None
        service, colon, port = self.fanout_service.rpartition(":")
        lists = lists_of(self.fanout_lists)
        token = self.replica_token and self.replica_token.partition(",")[0].strip()
        if token is not None:
            Tokens([token], variable="BROADCACHE_REPLICA_TOKEN", has_rights=False)
        try:
            if not colon:
                raise InvalidSettings("expected service:port")
            return Fanout(
                service,
                port,
                addresses=lists.get(service, ()),
                token=token,
                networks=self.fanout_networks,
                nameservers=self.fanout_nameservers,
                **self._calling(),
            )
        except MissingPackage:
            raise
        except BroadcacheError as error:
            raise InvalidSettings(f"BROADCACHE_FANOUT_SERVICE: {error}; got {self.fanout_service!r:.100}") from None


def _check_namespaces(namespaces: Sequence[str], variable: str) -> None:
    for namespace in namespaces:
        try:
            check_namespace(namespace)
        except InvalidNamespace as error:
            raise InvalidSettings(f"{variable}: {error}; correct it") from None
