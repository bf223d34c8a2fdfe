"""What the fan-out may call: nothing, unless it is allowed by name, and then only addresses that are safe to dial.

It does no I/O. It judges a request before a name is looked up, and every address before it is dialled. What it
permits must be dialled as it was judged, never looked up again.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from ipaddress import IPv6Address
from typing import Final, Literal, NamedTuple, NoReturn, TypeAlias
from urllib.parse import unquote

from ...shared.errors import BroadcacheError, InvalidSettings
from .ranges import IPAddress, Network, address_of, embedded_in, is_within, network_of, refused_ranges_of

__all__ = ["Destination", "FanoutPolicy", "FanoutRefused", "InvalidService", "Rule"]

Rule: TypeAlias = Literal[
    "fan-out-off",
    "ip-literal",
    "method-not-allowed",
    "service-not-allowed",
    "port-not-allowed",
    "address-not-allowed",
    "address-refused",
]

_ALLOW: Final = "BROADCACHE_FANOUT_ALLOW"
_NETWORKS: Final = "BROADCACHE_FANOUT_NETWORKS"
_METHODS: Final = "BROADCACHE_FANOUT_METHODS"
_SHOWN_CHARACTERS_MAX: Final = 100

# Names of Compose services may have underscores inside. One in front marks an SRV name, which is no service.
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?", re.ASCII | re.IGNORECASE)
_NAME_CHARACTERS_MAX: Final = 253
_PORT_NUMBER: Final = re.compile(r"[1-9][0-9]{0,4}", re.ASCII)
# RFC 6335, 5.1. What looks like a hexadecimal number is no name: others would read it as one.
_PORT_NAME: Final = re.compile(
    r"(?!0x[0-9a-f]*\Z)(?=[0-9-]*[a-z])[a-z0-9](?:-?[a-z0-9]){0,14}", re.ASCII | re.IGNORECASE
)
_PORT_NAME_CHARACTERS_MAX: Final = 15
_METHOD: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)
# The rule of browsers (WHATWG URL, "ends in a number"). C libraries read fewer forms: 127.1, 0177.0.0.1, 0x7f000001.
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
# C libraries stop reading at these, and take what came before.
_BREAKS: Final = re.compile(r"[\x00-\x20\x7f]+")


class FanoutRefused(BroadcacheError):
    """The fan-out may not do this. `rule` names what forbids it, and does not change from version to version."""

    def __init__(self, rule: Rule, text: str) -> None:
        super().__init__(text)
        self.rule: Final[Rule] = rule


class InvalidService(BroadcacheError, ValueError):
    """A text that is no name of a service, or no port; `part` says which of the two."""

    def __init__(self, part: Literal["service", "port"], text: str) -> None:
        super().__init__(text)
        self.part: Final = part


class Destination(NamedTuple):
    """What a request asks to fan out to, after it was found to be allowed.

    Shape:  `service` is the name to look up, in lower case; a dot at its end, which says that it is absolute, is kept.
            `name` is the same without that dot. `port` is a number from 1 to 65535, or the name of a port.
    """

    service: str
    name: str
    port: int | str


class FanoutPolicy:
    """What the fan-out may call.

    Shape:  `allow` holds `service:port`, the port being a number, a name or `*`; nothing turns the fan-out off.
            `networks` holds CIDRs that addresses must lie in; none means any address outside of the refused ranges.
            `methods` holds what may be sent; none means every method but CONNECT.
    Raises: InvalidSettings, which says which item is wrong.
    """

    def __init__(self, allow: Sequence[str], *, networks: Sequence[str] = (), methods: Sequence[str] = ()) -> None:
        self._ports: Final[dict[str, set[int | str]]] = {}
        for number, item in _numbered(_ALLOW, allow):
            name, port = _entry_of(number, item)
            self._ports.setdefault(name, set()).add(port)
        self._networks: Final = [_network_of(number, item) for number, item in _numbered(_NETWORKS, networks)]
        self._methods: Final = {_method_of(number, item) for number, item in _numbered(_METHODS, methods)}

    @property
    def is_off(self) -> bool:
        """Whether nothing is allowed at all."""
        return not self._ports

    def check(self, method: str, service: str, port: str) -> Destination:
        """Return where a request may go.

        Shape:  `service` and `port` as they stand in the path, with percent signs and all.
        Raises: FanoutRefused; InvalidService when the service or the port is malformed.
        """
        if self.is_off:
            raise FanoutRefused(
                "fan-out-off",
                f"expected {_ALLOW} to name what may be called, got nothing there: the fan-out is off; "
                f"set {_ALLOW}=service:port to turn it on",
            )
        _check_is_no_address(service)
        destination = Destination(service.lower(), _name_of(service), _port_of(port))
        self._check_method(method)
        self._check_allowed(destination)
        return destination

    def check_address(self, host: str) -> None:
        """Return if an address that a name led to may be dialled.

        Shape:  the text of one IP address, without brackets, with or without a scope.
        Raises: FanoutRefused, also for a text that is no address.
        """
        try:
            address = address_of(host)
        except ValueError:
            raise FanoutRefused(
                "address-refused",
                f"expected an IP address, got {_shown(host)}: only what was checked is dialled; check the name server",
            ) from None
        for seen_as in (address, *embedded_in(address)):
            self._check_refused_ranges(host, seen_as)
        if self._networks and not any(address in network for network in self._networks):
            raise FanoutRefused(
                "address-not-allowed",
                f"expected an address within the networks of {_NETWORKS}, got {_shown(host)}; "
                "add the network that it lies in if it may be called",
            )

    def permits(self, host: str) -> bool:
        """Whether an address may be dialled: `check_address` as a question."""
        try:
            self.check_address(host)
        except FanoutRefused:
            return False
        return True

    def _check_method(self, method: str) -> None:
        if _METHOD.fullmatch(method) is None:
            raise FanoutRefused("method-not-allowed", f"expected an HTTP method, got {_shown(method)}; send another")
        # Some clients write methods in capitals before they send them.
        if method.upper() == "CONNECT":
            raise FanoutRefused(
                "method-not-allowed",
                f"expected a method that can be fanned out, got {_shown(method)}, which opens a tunnel; send another: "
                f"{_METHODS} cannot permit it",
            )
        if self._methods and method not in self._methods:
            raise FanoutRefused(
                "method-not-allowed",
                f"expected a method that {_METHODS} names, got {_shown(method)}; add it there if it may be sent",
            )

    def _check_allowed(self, destination: Destination) -> None:
        ports = self._ports.get(destination.name)
        if ports is None:
            raise FanoutRefused(
                "service-not-allowed",
                f"expected a service that {_ALLOW} names, in the same words, got {_shown(destination.service)}; "
                "add it there, with its port, if it may be called",
            )
        if destination.port not in ports and "*" not in ports:
            raise FanoutRefused(
                "port-not-allowed",
                f"expected a port that {_ALLOW} names for this service, "
                f"got {_shown(f'{destination.port} of {destination.name}')}; add it there if it may be called",
            )

    def _check_refused_ranges(self, host: str, address: IPAddress) -> None:
        """A network opens a refused range only from within: 0.0.0.0/0 does not name loopback, 127.0.0.0/8 does."""
        for refused in refused_ranges_of(address):
            if not any(address in network and is_within(network, refused.network) for network in self._networks):
                raise FanoutRefused(
                    "address-refused",
                    f"expected an address of a replica, got {_shown(host)}: {address} lies in {refused.network} "
                    f"({refused.what}); name that network, or a part of it, in {_NETWORKS} if it may be called",
                )


def _numbered(variable: str, items: Sequence[str]) -> Iterable[tuple[int, str]]:
    if isinstance(items, str):
        raise InvalidSettings(f"{variable}: expected a list of texts, got the text {_shown(items)}; put it in a list")
    return enumerate((item.strip() for item in items), start=1)


def _entry_of(number: int, item: str) -> tuple[str, int | str]:
    service, colon, port = item.rpartition(":")
    if not colon:
        raise InvalidSettings(
            f"{_ALLOW}: expected service:port, the port a number, a name or *, as item {number}, got {_shown(item)}; "
            "add the port"
        )
    try:
        _check_is_no_address(service)
        return _name_of(service), port if port == "*" else _port_of(port)
    except (FanoutRefused, InvalidService) as error:
        raise InvalidSettings(f"{_ALLOW}: in item {number}, {error}") from None


def _network_of(number: int, item: str) -> Network:
    try:
        return network_of(item)
    except ValueError:
        raise InvalidSettings(
            f"{_NETWORKS}: expected a CIDR such as 10.42.0.0/16, with no bits set beyond its prefix, as item {number}, "
            f"got {_shown(item)}; correct it"
        ) from None


def _method_of(number: int, item: str) -> str:
    method = item.upper()
    if _METHOD.fullmatch(item) is None or method == "CONNECT":
        raise InvalidSettings(
            f"{_METHODS}: expected an HTTP method other than CONNECT as item {number}, got {_shown(item)}; correct it, "
            "or leave the variable out for every method"
        )
    return method


def _name_of(service: str) -> str:
    """Return the name of a service in lower case, without the dot that makes it absolute."""
    name = service.removesuffix(".")
    if len(name) > _NAME_CHARACTERS_MAX:
        _reject_service(service, f"at most {_NAME_CHARACTERS_MAX} characters")
    for label in name.split("."):
        if _LABEL.fullmatch(label) is None:
            _reject_service(
                service, "labels of 1 to 63 letters, digits, hyphens and underscores, the latter two only inside"
            )
    return name.lower()


def _reject_service(service: str, expected: str) -> NoReturn:
    raise InvalidService(
        "service", f"expected the name of a service, of {expected}, got {_shown(service)} as the service; correct it"
    )


def _port_of(port: str) -> int | str:
    if _PORT_NUMBER.fullmatch(port) and int(port) <= 65_535:
        return int(port)
    if len(port) <= _PORT_NAME_CHARACTERS_MAX and _PORT_NAME.fullmatch(port):
        return port.lower()
    raise InvalidService(
        "port",
        "expected a number from 1 to 65535 without zeros in front, or a name of 1 to 15 letters, digits and single "
        f"hyphens, got {_shown(port)} as the port; correct it",
    )


def _check_is_no_address(service: str) -> None:
    once = unquote(service)
    if any(_reads_as_address(form) for form in (service, once, unquote(once))):
        raise FanoutRefused(
            "ip-literal",
            f"expected the name of a service, got {_shown(service)}, which can be read as an IP address; use the name: "
            f"{_ALLOW} cannot permit an address",
        )


def _reads_as_address(text: str) -> bool:
    """Whether anything on the way might take a text for an address instead of a name to look up."""
    words = [word for word in _BREAKS.split(_folded(text)) if word]
    if not words:
        return False
    word = words[0]
    if word.startswith("["):
        return True
    if ":" in word:
        return _is_ipv6(word.partition("%")[0])
    return _NUMBER.fullmatch(word.rstrip(".").rpartition(".")[2]) is not None


def _folded(text: str) -> str:
    """Write the digits and dots of all scripts in ASCII, as whatever prepares a name for its lookup may do."""
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", text).replace("\u3002", ".")
    return "".join(str(unicodedata.decimal(character, character)) for character in folded).lower()


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


def _shown(text: str) -> str:
    """Quote what came, in ASCII: no control character reaches a log or a terminal, no digit looks like another."""
    quoted = ascii(text[:_SHOWN_CHARACTERS_MAX])
    if len(text) <= _SHOWN_CHARACTERS_MAX and len(quoted) <= _SHOWN_CHARACTERS_MAX:
        return quoted
    return quoted[: _SHOWN_CHARACTERS_MAX - 1] + "…"
