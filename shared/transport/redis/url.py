"""Redis URLs, read strictly. No error shows any part of one: what a misread part holds may belong to the password."""

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, NoReturn, TypeAlias
from urllib.parse import unquote

from ...errors import InvalidSettings
from ...texts import host_and_port
from .options import read_options

__all__ = ["Kind", "Node", "ServerURL", "node_of", "read_url"]

Kind: TypeAlias = Literal["server", "socket", "sentinel", "cluster"]

_FORM: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(/[^?#]*)?(?:\?([^#]*))?(#.*)?")
_SCHEME: Final = re.compile(r"(redis|valkey)(s?)(?:\+(sentinel|cluster))?")
_SCHEMES: Final = (
    "redis://, rediss://, redis+sentinel://, rediss+sentinel://, redis+cluster://, rediss+cluster://, unix://"
)
_SCHEMES_OF_OTHERS: Final = {
    **dict.fromkeys(("sentinel", "redis-sentinel", "redissentinel", "valkey-sentinel"), "redis+sentinel://"),
    **dict.fromkeys(("rediss-sentinel", "sentinels"), "rediss+sentinel://"),
    **dict.fromkeys(("redis-cluster", "rediscluster", "valkey-cluster"), "redis+cluster://"),
    **dict.fromkeys(("rediss-cluster", "redissclusters"), "rediss+cluster://"),
    **dict.fromkeys(("redis+socket", "redis-socket", "redis+unix", "valkey+unix", "unix+redis", "file"), "unix://"),
    **dict.fromkeys(("redis+tls", "redis+ssl", "redis-tls", "redis-ssl", "valkey+tls", "tls", "ssl"), "rediss://"),
    **dict.fromkeys(("tcp", "redis+tcp", "http", "https"), "redis://"),
}
_PORTS: Final = {"server": 6_379, "sentinel": 26_379, "cluster": 6_379}
_IN_BRACKETS: Final = re.compile(r"\[([0-9A-Fa-f:.]{2,}(?:%[\w.-]{1,32})?)\](?::([0-9]{1,5}))?", re.ASCII)
_NAMED: Final = re.compile(r"((?!-)[\w-]{1,63}(?:\.[\w-]{1,63})*\.?)(?::([0-9]{1,5}))?")
_HOST_CHARACTERS_MAX: Final = 253
_DATABASE: Final = re.compile(r"/?|/([0-9]{1,9})")
_SERVICE: Final = re.compile(r"/([^/]+)(?:/([0-9]{1,9}))?")
_ENCODE: Final = "characters such as / ? # @ and % in a user or password must be percent-encoded"


class Node(NamedTuple):
    """The host and port of one server."""

    host: str
    port: int

    def __str__(self) -> str:
        return host_and_port(self.host, self.port)


@dataclass(frozen=True, slots=True)
class ServerURL:
    """A URL that was read.

    Shape:  `label` names the address in errors and logs, without user, password and options. `arguments` are those of
            the client library's connections, without host and port; `sentinel_login` are those for sentinels alone.
            `path` is that of a unix socket, `service` what sentinels call the primary. `prefix` is None if it has none.
    """

    label: str
    kind: Kind
    is_tls: bool
    nodes: tuple[Node, ...] = ()
    path: str = ""
    service: str = ""
    is_sentinel_tls: bool = False
    prefix: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict, repr=False)
    sentinel_login: dict[str, Any] = field(default_factory=dict, repr=False)


def read_url(url: str) -> ServerURL:
    """Read a URL. Raises: InvalidSettings, which shows no part of it."""
    problem = ""
    try:
        return _read(url)
    except (TypeError, ValueError) as error:
        problem = str(error)
    # Raised here, so that no traceback shows an error that quotes the URL.
    raise InvalidSettings(
        f"the Redis URL (not shown, since it may contain a password) is not valid: {problem}; expected a URL such as "
        "redis://127.0.0.1:6379/0"
    )


def node_of(text: str, default_port: int) -> Node:
    """Read `host` or `host:port`, an IPv6 address in brackets. Raises: ValueError, which does not show it."""
    found = _IN_BRACKETS.fullmatch(text)
    if found is not None:
        ipaddress.IPv6Address(found[1])  # its error is replaced by the caller's
    else:
        found = _NAMED.fullmatch(text)
    if found is None or len(found[1]) > _HOST_CHARACTERS_MAX:
        raise ValueError
    port = default_port if found[2] is None else int(found[2])
    if not 1 <= port <= 65_535:
        raise ValueError
    return Node(found[1], port)


def _read(url: object) -> ServerURL:
    if not isinstance(url, str):
        raise TypeError(f"it is no str but {type(url).__name__}")
    text = url.strip(" \t\r\n")
    if not text:
        raise ValueError("it is empty")
    if not text.isprintable() or " " in text:
        # The standard library would remove some of them without a word. Lone surrogates are not printable either.
        raise ValueError(f"it contains a space, or a character that cannot be printed; {_ENCODE}")
    found = _FORM.fullmatch(text)
    if found is None:
        raise ValueError(f"it does not begin with one of the following schemes and two slashes: {_SCHEMES}")
    scheme, authority, path, query, fragment = found.groups(default="")
    scheme = scheme.lower()
    if fragment:
        raise ValueError(f"it contains a #; {_ENCODE}")
    if "@" in path + query:
        raise ValueError(f"an @ comes after the first / or ?; {_ENCODE}")
    if scheme == "unix":
        return _read_socket(authority, path, query)
    kinds = _SCHEME.fullmatch(scheme)
    if kinds is None:
        instead = _SCHEMES_OF_OTHERS.get(scheme)
        advice = f"; write {instead} instead of {scheme}://" if instead else ""
        raise ValueError(f"it does not begin with one of the following schemes: {_SCHEMES}{advice}")
    kind: Any = kinds[3] or "server"
    return _read_servers((scheme, authority, path, query), kind, is_tls=kinds[2] == "s")


def _read_servers(parts: tuple[str, str, str, str], kind: Kind, *, is_tls: bool) -> ServerURL:
    scheme, authority, path, query = parts
    user, at, hosts = authority.rpartition("@")
    nodes = _nodes_of(hosts, kind)
    if kind != "server" and "@" in user:
        raise ValueError(f"user and password are written once, before the first server; {_ENCODE}")
    service = ""
    if kind == "sentinel":
        found = _SERVICE.fullmatch(path)
        if found is None:
            raise ValueError(
                "after the sentinels comes /service, the name they have for the primary, and perhaps /db, the number "
                "of a database"
            )
        service, database = _decoded(found[1]), found[2]
    else:
        found = _DATABASE.fullmatch(path)
        if found is None:
            raise ValueError(
                "after the server comes nothing, or / and the number of a database; the name of a primary belongs to "
                "redis+sentinel://"
            )
        database = found[1]
    options = read_options(query, is_tls=is_tls, is_sentinel=kind == "sentinel")
    prefix = options.pop("prefix", None)
    sentinel_login = {
        name.removeprefix("sentinel_"): options.pop(name)
        for name in ("sentinel_username", "sentinel_password")
        if name in options
    }
    is_sentinel_tls = options.pop("sentinel_tls", is_tls)
    if is_sentinel_tls and not is_tls:
        raise ValueError("sentinel_tls belongs to rediss+sentinel: write rediss+sentinel, or leave sentinel_tls out")
    if {"ssl_certfile", "ssl_keyfile"} & options.keys():
        options.setdefault("ssl_password", "")  # without one, OpenSSL would ask for it on the terminal
    arguments = _arguments(user, database, options)
    if kind == "cluster" and arguments["db"]:
        raise ValueError("a cluster has one database: leave out what comes after the servers, and db")
    return ServerURL(
        label=f"{scheme}://{'…@' if at else ''}{hosts}{path}",
        kind=kind,
        is_tls=is_tls,
        nodes=nodes,
        service=service,
        is_sentinel_tls=is_sentinel_tls,
        prefix=prefix,
        arguments=arguments,
        sentinel_login=sentinel_login,
    )


def _read_socket(authority: str, path: str, query: str) -> ServerURL:
    user, at, host = authority.rpartition("@")
    if host or path in ("", "/"):
        raise ValueError(f"after unix:// comes the absolute path of a socket: unix:///run/redis.sock; {_ENCODE}")
    options = read_options(query, is_tls=False, is_sentinel=False)
    prefix = options.pop("prefix", None)
    return ServerURL(
        label=f"unix://{'…@' if at else ''}{path}",
        kind="socket",
        is_tls=False,
        path=_decoded(path),
        prefix=prefix,
        arguments=_arguments(user, None, options),
    )


def _arguments(user: str, database: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Put together what the URL says in its parts and in its options. Raises: ValueError."""
    name, _, password = user.partition(":")
    parts: dict[str, Any] = {"username": _decoded(name), "password": _decoded(password)}
    if database is not None:
        parts["db"] = int(database)
    arguments = {"db": 0, **options}
    for option, value in parts.items():
        if value in ("", None):
            continue
        if options.get(option, value) != value:
            raise ValueError(f"it contains two values for {option}, one of them as an option; leave one of them out")
        arguments[option] = value
    return arguments


def _nodes_of(hosts: str, kind: str) -> tuple[Node, ...]:
    texts = hosts.split(",")
    if kind == "server" and len(texts) > 1:
        raise ValueError("it contains several servers; write redis+sentinel:// or redis+cluster://")
    if texts == [""]:
        raise ValueError(f"it contains no host; {_wanted(kind)}; {_ENCODE}")
    nodes = []
    for text in texts:
        try:
            nodes.append(node_of(text, _PORTS[kind]))
        except ValueError:
            _refuse_host(kind)
    return tuple(nodes)


def _refuse_host(kind: str) -> NoReturn:
    raise ValueError(f"the host or the port is not valid; {_wanted(kind)}; {_ENCODE}") from None


def _wanted(kind: str) -> str:
    if kind == "server":
        return "after the host comes a port from 1 to 65535, and an IPv6 address stands in brackets: [::1]:6379"
    return "between // and / come servers such as 10.0.0.1:26379,10.0.0.2:26379"


def _decoded(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("a percent-encoded part of it is not UTF-8") from None
