"""The address of Redis: one server, a primary known to sentinels, or a cluster. Checked once, shown without secrets."""

import copy
import functools
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from ...errors import InvalidSettings, LinkLost
from .topology import Cluster, Node, Nodes, Sentinels, query

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

__all__ = ["Connected", "RedisAddress"]

_OF_MANY: Final = re.compile(r"(rediss?)\+(sentinel|cluster)")
_URL_OF_MANY: Final = re.compile(r"(rediss?\+(?:sentinel|cluster))://([^/?#]*)(/[^?#]*)?(?:\?([^#]*))?(?:#(.*))?")
_PORTS: Final = {"sentinel": 26_379, "cluster": 6_379}
_NODE: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]]+))(?::(\d{1,5}))?")
_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_SHARDED_SINCE_VERSION: Final = 7
_TRUTHS: Final = {"true": True, "false": False}
_SENTINELS_WANT_TLS: Final = (
    "; they are queried over TLS: check that their ports in the URL accept TLS, with certificates for the URL's hosts; "
    "docs/redis.md says what to do where they cannot"
)

_log = logging.getLogger("broadcache.redis")


class Connected(NamedTuple):
    """An open connection to a primary, its label for errors and logs, and whether its channels are sharded.

    In a cluster, a sharded message stays within the shard of the channel's slot; an ordinary message is sent to every
    server of the cluster.
    """

    connection: "AbstractConnection"
    label: str
    is_sharded: bool


class RedisAddress:
    """The address of a Redis or Valkey server, checked once; its password is never shown.

    Shape:  `redis://[[user]:password@]host[:port][/db]`, `rediss://…` with TLS, or `unix://path`;
            `redis+sentinel://[[user]:password@]sentinel[:port],…/service[/db]`;
            `redis+cluster://[[user]:password@]host[:port],…`; `rediss+…://` with TLS, also to the sentinels.
    Raises: InvalidSettings.
    Source: docs/redis.md, and the client library's `parse_url`.
    """

    def __init__(self, url: str) -> None:
        self.label: Final = _without_password(url)
        self._topology: Sentinels | Cluster | None = None
        try:
            parts = _checked_parts(url)
            if kind := _OF_MANY.fullmatch(parts.scheme):
                self._read_many(parts, scheme=kind[1], kind=kind[2])
            else:
                self._connection_class, self._arguments = _read_one(url)
            self._new_connection("check of the arguments")
        except (ValueError, TypeError, AttributeError) as error:
            raise InvalidSettings(
                f"expected a URL such as redis://127.0.0.1:6379/0, got {self.label!r}: {error}"
            ) from None

    def __repr__(self) -> str:
        return f"RedisAddress({self.label!r})"

    @property
    def is_cluster(self) -> bool:
        """Whether each namespace may be on a different server, and needs its own link."""
        return isinstance(self._topology, Cluster)

    @property
    def is_tls(self) -> bool:
        """Whether connections to the data servers use TLS."""
        return self.label.startswith("rediss")

    def of(self, namespace: str) -> Self:
        """Return the address of `namespace`: this one, or in a cluster that of the namespace's slot."""
        if not isinstance(self._topology, Cluster):
            return self
        other = copy.copy(self)
        other._topology = self._topology.of(namespace)
        return other

    async def connect(self, client_name: str) -> Connected:
        """Find the primary, connect to it and send HELLO, with every automatism of the client library off.

        Raises: LinkLost, OSError, or an error of the client library.
        """
        label = self.label
        node = None
        if self._topology is not None:
            node = await self._topology.find_primary()
            label = f"{node} of {label}"
        connection = self._new_connection(client_name, node)
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            hello = {_text(name): _text(value) for name, value in (await query(connection, "HELLO")).items()}
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        if isinstance(self._topology, Sentinels) and hello["role"] != "master":
            await connection.disconnect(nowait=True)
            raise LinkLost(f"expected the sentinels to name a primary, got {node}, whose role is {hello['role']}")
        version = int(hello["version"].partition(".")[0])
        return Connected(connection, label, hello["mode"] == "cluster" and version >= _SHARDED_SINCE_VERSION)

    def _read_many(self, parts: SplitResult, *, scheme: str, kind: str) -> None:
        user, at, hosts = parts.netloc.rpartition("@")
        nodes = [_node_of(text, _PORTS[kind]) for text in hosts.split(",")]
        places = [unquote(place) for place in parts.path.split("/")[1:]]
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        sentinel_options: dict[str, Any] = {
            name.removeprefix("sentinel_"): options.pop(name)
            for name in ("sentinel_username", "sentinel_password")
            if kind == "sentinel" and name in options
        }
        is_asked_over_tls = kind == "sentinel" and _is_asked_over_tls(scheme, options)
        if kind == "sentinel" and (not 1 <= len(places) <= 2 or not places[0]):
            raise ValueError("after the sentinels comes /service, their name for the primary, and optionally /db")
        if kind == "cluster" and places not in ([], [""], ["0"]):
            raise ValueError("a cluster has one database: leave out the path after the servers")
        database = places[1] if len(places) == 2 else "0"
        if not database.isdecimal():
            raise ValueError("the database is not a number")
        # The first server is a placeholder for the primary, which is found for each connection.
        self._connection_class, self._arguments = _read_one(
            f"{scheme}://{user}{at}{nodes[0]}/{database}?{urlencode(options)}"
        )
        if kind == "cluster":
            self._topology = Cluster(Nodes(nodes, lambda node: self._new_connection("broadcache", node)))
            return
        from redis.asyncio.connection import Connection

        connection_class: type[AbstractConnection] = Connection
        if is_asked_over_tls:
            # A sentinel decides which server receives the password, so its certificate is checked like the servers'.
            connection_class = self._connection_class
            sentinel_options |= {name: value for name, value in self._arguments.items() if name.startswith("ssl_")}
        elif scheme == "rediss":
            _warn_of_sentinels_in_clear(self.label)
        self._topology = Sentinels(
            Nodes(
                nodes,
                lambda node: connection_class(**{**sentinel_options, **_automatisms_off(), **node._asdict()}),
                advice=_SENTINELS_WANT_TLS if is_asked_over_tls else "",
            ),
            places[0],
        )

    def _new_connection(self, client_name: str, node: Node | None = None) -> "AbstractConnection":
        arguments: dict[str, Any] = {**self._arguments, **_automatisms_off(), "client_name": client_name}
        if node is not None:
            arguments |= node._asdict()
        return self._connection_class(**arguments)


def _split(url: str) -> SplitResult:
    """Split `url`. Raises: ValueError."""
    many = _URL_OF_MANY.fullmatch(url)
    # Newer patch levels of the standard library refuse a bracketed host that is one of several.
    return SplitResult(*many.groups(default="")) if many else urlsplit(url)


def _checked_parts(url: str) -> SplitResult:
    """Split `url`. Raises: ValueError that does not repeat any part, since it may be a misplaced password."""
    parts = _split(url)
    if not _OF_MANY.fullmatch(parts.scheme):
        try:
            parts.port  # noqa: B018  (reading it checks it)
        except ValueError:
            raise ValueError("after the host comes a port from 0 to 65535") from None
    return parts


def _read_one(url: str) -> "tuple[type[AbstractConnection], dict[str, Any]]":
    # Importing the client library takes a third of a second: only a process that connects pays for it.
    from redis.asyncio.connection import Connection, parse_url

    arguments: dict[str, Any] = dict(parse_url(url))
    for name in _FILES:
        if name in arguments and not Path(arguments[name]).is_file():
            raise ValueError(f"the file of {name} does not exist: {arguments[name]}")
    return arguments.pop("connection_class", Connection), arguments


def _node_of(text: str, default_port: int) -> Node:
    found = _NODE.fullmatch(text)
    if found is None or int(found[3] or 0) > 65_535:
        raise ValueError("between // and / come servers such as 10.0.0.1:26379,10.0.0.2:26379")
    return Node(found[1] or found[2], int(found[3] or default_port))


def _is_asked_over_tls(scheme: str, options: dict[str, str]) -> bool:
    """Remove `sentinel_tls` from `options`; return whether sentinels are queried over TLS. Raises: ValueError."""
    written = options.pop("sentinel_tls", None)
    if written is None:
        return scheme == "rediss"
    if scheme != "rediss":
        raise ValueError("sentinel_tls needs rediss+sentinel: write rediss+sentinel, or leave sentinel_tls out")
    if written not in _TRUTHS:
        raise ValueError("sentinel_tls must be true or false")
    return _TRUTHS[written]


@functools.cache
def _warn_of_sentinels_in_clear(label: str) -> None:
    """Warn once for each address, however many publishers and subscribers use it."""
    _log.warning(
        "the sentinels of %s are queried without TLS (sentinel_tls=false): an attacker in their network can name its "
        "own server as the primary and receive the password; enable TLS on the sentinels, then leave sentinel_tls out",
        label,
    )


def _automatisms_off() -> dict[str, Any]:
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.maint_notifications import MaintNotificationsConfig

    return {
        "protocol": 3,  # replies and pushes arrive on one connection, in one order
        "decode_responses": False,
        "health_check_interval": 0,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
        "retry_on_timeout": False,
        "socket_timeout": None,  # the link's owner sets deadlines
    }


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _without_password(url: object) -> str:
    """Return the address for errors and logs, without its secrets."""
    if not isinstance(url, str):
        return repr(url)
    try:
        parts = _split(url)
    except ValueError:
        return "a URL that cannot be read"
    user, at, hosts = parts.netloc.rpartition("@")
    # A port that is no number may be a password, of a URL without a host.
    hosts = re.sub(r":(?![0-9]{1,5}(?:,|$)|[0-9A-Fa-f:.]*\])[^,]*", ":…", hosts)
    shown = f"{user.partition(':')[0]}{':…' if ':' in user else ''}{at}{hosts}"
    if parts.scheme == "unix":  # geturl() would drop the empty host
        return f"unix://{shown}{parts.path}"
    return parts._replace(netloc=shown, query="").geturl()
