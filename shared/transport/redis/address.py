"""The address of Redis: one server, a primary known to sentinels, or a cluster. Checked once, shown without secrets."""

import asyncio
import copy
import functools
import logging
import os
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeVar

from ...errors import InvalidSettings, LinkLost
from .credentials import Credentials, Login, explained
from .names import Names, Naming, check_prefix
from .options import tls_context_of
from .responses import usable_hiredis
from .topology import AddressRemap, Cluster, FixedPrimary, Node, Nodes, Primaries, Sentinels, query, remap_of
from .url import ServerURL, read_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from redis.asyncio.connection import AbstractConnection

__all__ = ["AddressRemap", "Connected", "Credentials", "RedisAddress", "address_of"]

T = TypeVar("T")

_DISCOVERY_SHARE: Final = 0.6
"""The part of a connect timeout in which the primary is found: the rest is for the connection to it."""
_SHARDED_SINCE_VERSION: Final = 7
_PREFIX_VARIABLE: Final = "BROADCACHE_PREFIX"
_SENTINELS_WANT_TLS: Final = (
    "; they are queried over TLS: check that their ports in the URL accept TLS, with certificates for the URL's hosts; "
    "docs/redis.md says what to do where they cannot"
)

_log = logging.getLogger("broadcache.redis")


class Connected(NamedTuple):
    """An open connection to a primary, its label for errors and logs, whether its channels are sharded, and its naming.

    In a cluster, a sharded message stays within the shard of the channel's slot; an ordinary message is sent to every
    server of the cluster.
    """

    connection: "AbstractConnection"
    label: str
    is_sharded: bool
    naming: Naming = Naming()


class RedisAddress:
    """The address of a Redis or Valkey server, checked once; its password is never shown.

    Shape:  `redis://[[user]:password@]host[:port][/db]`, `rediss://…` with TLS, or `unix://path`;
            `redis+sentinel://[[user]:password@]sentinel[:port],…/service[/db]`;
            `redis+cluster://[[user]:password@]host[:port],…`; `rediss+…://` with TLS, also to the sentinels.
            `valkey` may be written for `redis`.
            `credentials` returns (user, password) of the data servers, and is called for each connection.
            `address_remap` maps the addresses that sentinels and clusters announce to those that are connected to.
            `prefix` begins the names of keys and channels; None means that of the URL's option `prefix`, and without
            one that of BROADCACHE_PREFIX. An empty text means none.
            `label` names the address in errors and logs.
    Raises: InvalidSettings.
    Source: docs/redis.md, options.py.
    """

    def __init__(
        self,
        url: str,
        *,
        credentials: Credentials = None,
        address_remap: AddressRemap | None = None,
        prefix: str | None = None,
    ) -> None:
        parsed = read_url(url)
        self.naming: Final = Naming(parsed.arguments["db"], _prefix_of(parsed, prefix))
        self.label: Final = f"{parsed.label}?prefix={self.naming.prefix}" if self.naming.prefix else parsed.label
        self.is_tls: Final = parsed.is_tls
        """Whether connections to the data servers use TLS."""
        self._topology: Sentinels | Cluster | FixedPrimary | None = None
        self._login = Login(credentials, parsed.arguments)
        self._arguments = {**parsed.arguments, **_place_of(parsed)}
        self._connection_class = _connection_class_of(parsed)
        self._secrets = tuple(
            {**parsed.arguments, **parsed.sentinel_login}.get(name) for name in ("password", "ssl_password")
        )
        self._check_arguments()
        remap = remap_of(address_remap)
        if parsed.kind == "cluster":
            self._topology = Cluster(
                Nodes(parsed.nodes, lambda node, login: self._new_connection("broadcache", node, login)),
                remap,
                self.naming,
            )
        elif parsed.kind == "sentinel":
            self._topology = Sentinels(self._sentinels_of(parsed), parsed.service, remap)

    def __repr__(self) -> str:
        return f"RedisAddress({self.label!r})"

    @property
    def is_cluster(self) -> bool:
        """Whether each namespace may be on a different server, and needs its own link."""
        return isinstance(self._topology, Cluster)

    def names_of(self, namespace: str) -> Names:
        """Return the names of the keys and channels of `namespace`."""
        return self.naming.of(namespace)

    def of(self, namespace: str) -> Self:
        """Return the address of `namespace`: this one, or in a cluster that of the namespace's slot."""
        if not isinstance(self._topology, Cluster):
            return self
        other = copy.copy(self)
        other._topology = self._topology.of(namespace)
        return other

    def at(self, node: Node) -> Self:
        """Return the address of one server of a cluster."""
        other = copy.copy(self)
        other._topology = FixedPrimary(node)
        return other

    async def primaries(self, *, timeout_seconds: float, first: Node | None = None) -> Primaries:
        """Query a cluster, and `first` before its other servers, for the primaries of all slots.

        Raises: LinkLost.
        """
        assert isinstance(self._topology, Cluster)
        cluster, attempt = self._topology, _Attempt(self.label)

        async def query_primaries() -> Primaries:
            await self._log_in(attempt)
            return await cluster.primaries(attempt.login, timeout_seconds * _DISCOVERY_SHARE, first)

        return await self._attempted(attempt, query_primaries(), timeout_seconds)

    async def connect(self, client_name: str, *, timeout_seconds: float) -> Connected:
        """Find the primary, connect to it and send HELLO, with every automatism of the client library off.

        Units:  all of it may take `timeout_seconds`.
        Raises: LinkLost, which names the server that failed, and neither shows a secret nor is chained to an error that
                may: the client library's errors repeat what a server says.
        """
        attempt = _Attempt(self.label)
        return await self._attempted(attempt, self._connect(client_name, attempt, timeout_seconds), timeout_seconds)

    async def _attempted(self, attempt: "_Attempt", work: Coroutine[Any, Any, T], timeout_seconds: float) -> T:
        try:
            async with asyncio.timeout(timeout_seconds):
                return await work
        except LinkLost:
            raise
        except TimeoutError:
            problem = (
                f"no answer from {attempt.label} within {timeout_seconds:g} s; "
                f"check {attempt.advice}{' and accepts TLS' if self.is_tls else ''}"
            )
        except Exception as error:  # noqa: BLE001  (the client library's errors have no base of their own)
            secrets = (*self._secrets, *attempt.login.values())
            problem = f"cannot connect to {attempt.label}: {explained(error, secrets)}"
        raise LinkLost(problem)

    async def _log_in(self, attempt: "_Attempt") -> None:
        if self._login.is_read_anew:
            attempt.label = f"the credentials for {self.label}"
            attempt.advice = "that the function returns in time, and also that the server runs"
            attempt.login = await self._login.read()
            attempt.reset(self.label)
        else:
            attempt.login = await self._login.read()

    async def _connect(self, client_name: str, attempt: "_Attempt", timeout_seconds: float) -> Connected:
        await self._log_in(attempt)
        node = None
        if self._topology is not None:
            node = await self._topology.find_primary(attempt.login, timeout_seconds * _DISCOVERY_SHARE)
            attempt.label = f"{node} of {self.label}"
        connection = self._new_connection(client_name, node, attempt.login)
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            hello = {_text(name): _text(value) for name, value in (await query(connection, "HELLO")).items()}
            if isinstance(self._topology, Sentinels) and hello["role"] != "master":
                raise LinkLost(f"expected the sentinels to name a primary, got {node}, whose role is {hello['role']}")
            version = int(hello["version"].partition(".")[0])
            is_sharded = hello["mode"] == "cluster" and version >= _SHARDED_SINCE_VERSION
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return Connected(connection, attempt.label, is_sharded, self.naming)

    def _sentinels_of(self, parsed: ServerURL) -> Nodes:
        from redis.asyncio.connection import Connection

        connection_class: type[AbstractConnection] = Connection
        arguments: dict[str, Any] = {
            name: value for name, value in parsed.arguments.items() if name.startswith("socket_")
        } | parsed.sentinel_login
        if parsed.is_sentinel_tls:
            # A sentinel decides which server receives the password, so its certificate is checked like the servers'.
            connection_class = self._connection_class
            arguments |= {name: value for name, value in self._arguments.items() if name.startswith("ssl_")}
        elif parsed.is_tls:
            _warn_of_sentinels_in_clear(self.label)
        return Nodes(
            parsed.nodes,
            lambda node, _: connection_class(**{**arguments, **_automatisms_off(), **node._asdict()}),
            secrets=(parsed.sentinel_login.get("password"), parsed.arguments.get("ssl_password")),
            advice=_SENTINELS_WANT_TLS if parsed.is_sentinel_tls else "",
        )

    def _check_arguments(self) -> None:
        problem = ""
        try:
            connection: Any = self._new_connection("checks the arguments")
            if self.is_tls:
                connection.ssl_context.get()
            return
        except (ValueError, TypeError, AttributeError, OSError) as error:
            # An ssl.SSLError is an OSError. None of their texts is shown: it may repeat an argument.
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
            problem = f"the TLS options cannot be used together: {reason}" if self.is_tls else str(type(error).__name__)
        raise InvalidSettings(f"the options of {self.label} are not valid: {problem}; check files, key and ciphers")

    def _new_connection(
        self, client_name: str, node: Node | None = None, login: "Mapping[str, Any] | None" = None
    ) -> "AbstractConnection":
        arguments: dict[str, Any] = {**self._arguments, **_automatisms_off(), "client_name": client_name}
        if login is not None:
            arguments |= login
        if node is not None:
            arguments |= node._asdict()
        return self._connection_class(**arguments)


class _Attempt:
    """What an attempt to connect is waiting for: what its error names."""

    def __init__(self, label: str) -> None:
        self.login: Mapping[str, Any] = {}
        self.reset(label)

    def reset(self, label: str) -> None:
        self.label = label
        self.advice = "the address, and that the server runs"


def _place_of(parsed: ServerURL) -> dict[str, Any]:
    if parsed.kind == "socket":
        return {"path": parsed.path}
    # The first server is a placeholder for the primary, which is found for each connection.
    return dict(parsed.nodes[0]._asdict())


def _connection_class_of(parsed: ServerURL) -> "type[AbstractConnection]":
    # The client library takes a third of a second to import: only those who connect pay for it.
    from redis.asyncio.connection import Connection, UnixDomainSocketConnection

    if parsed.kind == "socket":
        return UnixDomainSocketConnection
    return _tls_connection_class() if parsed.is_tls else Connection


@functools.cache
def _tls_connection_class() -> "type[AbstractConnection]":
    from redis.asyncio.connection import SSLConnection

    class TlsConnection(SSLConnection):
        """A connection whose TLS settings are ours, whatever the library's version does with them."""

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**{name: value for name, value in arguments.items() if not name.startswith("ssl_")})
            self.ssl_context: Any = _TlsSettings(arguments)

    return TlsConnection


class _TlsSettings:
    """Stands in the place of the library's own: its `get` is called for each connection."""

    def __init__(self, options: "Mapping[str, Any]") -> None:
        self.get = functools.cache(functools.partial(tls_context_of, options))


def address_of(
    url: str | RedisAddress,
    credentials: Credentials = None,
    address_remap: AddressRemap | None = None,
    prefix: str | None = None,
) -> RedisAddress:
    """Return the address of `url`; one that was read before, as it is. Raises: InvalidSettings."""
    if not isinstance(url, RedisAddress):
        return RedisAddress(url, credentials=credentials, address_remap=address_remap, prefix=prefix)
    if credentials is not None or address_remap is not None or prefix is not None:
        raise InvalidSettings(f"expected no options for {url.label}, which was read before with its own, got some")
    return url


def _prefix_of(parsed: ServerURL, given: str | None) -> str:
    """Return the prefix: the explicit one, or that of the environment. Raises: InvalidSettings."""
    if given is None and parsed.prefix is not None:
        return parsed.prefix
    text = os.environ.get(_PREFIX_VARIABLE, "").strip() if given is None else given
    try:
        prefix = check_prefix(text) if text != "" else ""
    except ValueError as error:
        source = _PREFIX_VARIABLE if given is None else "prefix"
        raise InvalidSettings(f"{source} is not valid: {error}; correct it, or leave it out") from None
    if parsed.prefix not in (None, prefix):
        raise InvalidSettings(
            f"expected one prefix, got two: the argument has {prefix!r}, the URL has {parsed.prefix!r}; leave one of "
            "them out"
        )
    return prefix


@functools.cache
def _warn_of_sentinels_in_clear(label: str) -> None:
    """Warn once for each address, however many publishers and subscribers use it."""
    _log.warning(
        "the sentinels of %s are queried without TLS (sentinel_tls=false): an attacker in their network can name its "
        "own server as the primary and receive the password; enable TLS on the sentinels, then leave sentinel_tls out",
        label,
    )


def _automatisms_off() -> dict[str, Any]:
    from redis._parsers import _AsyncRESP3Parser
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    arguments: dict[str, Any] = {
        "protocol": 3,  # replies and pushes arrive on one connection, in one order
        "decode_responses": False,
        "health_check_interval": 0,
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
        "retry_on_timeout": False,
        "socket_timeout": None,  # the link's owner sets deadlines
    }
    if usable_hiredis() is None:
        arguments["parser_class"] = _AsyncRESP3Parser  # the library's own for hiredis, if there is one, knows no pushes
    try:
        from redis.maint_notifications import MaintNotificationsConfig
    except ImportError:  # redis-py before 7 has no such notifications
        return arguments
    return {**arguments, "maint_notifications_config": MaintNotificationsConfig(enabled=False)}


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
