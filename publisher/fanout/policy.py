"""The policy of the fan-out: it may call services that are allowed by name, at addresses outside the refused ranges.

No I/O. It checks a request before the name is looked up, and every address before it is dialled. The address dialled
must be the one that was checked: never look the name up again.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from ipaddress import IPv6Address
from typing import Final, Literal, NamedTuple, NoReturn, TypeAlias
from urllib.parse import unquote

from ...shared.errors import BroadcacheError, InvalidSettings
from .ranges import IPAddress, Network, address_of, embedded_in, is_within, network_of, refused_ranges_of

__all__ = [
    "Destination",
    "FanoutPolicy",
    "FanoutRefused",
    "InvalidService",
    "Rule",
    "allow_of",
    "check_destination",
]

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

# Names of Compose services may have underscores inside. A leading one marks an SRV name, which is no service.
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?", re.ASCII | re.IGNORECASE)
_NAME_CHARACTERS_MAX: Final = 253
_PORT_NUMBER: Final = re.compile(r"[1-9][0-9]{0,4}", re.ASCII)
# RFC 6335, 5.1. A text like a hexadecimal number is not a name: other parsers would read it as a number.
_PORT_NAME: Final = re.compile(
    r"(?!0x[0-9a-f]*\Z)(?=[0-9-]*[a-z])[a-z0-9](?:-?[a-z0-9]){0,14}", re.ASCII | re.IGNORECASE
)
_PORT_NAME_CHARACTERS_MAX: Final = 15
_METHOD: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)
# The rule of browsers (WHATWG URL, "ends in a number"). C libraries read fewer forms: 127.1, 0177.0.0.1, 0x7f000001.
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
# C libraries stop at these characters, and use the text before them.
_BREAKS: Final = re.compile(r"[\x00-\x20\x7f]+")


class FanoutRefused(BroadcacheError):
    """The policy forbids this request. `rule` names the rule, and does not change from version to version."""

    def __init__(self, rule: Rule, text: str) -> None:
        super().__init__(text)
        self.rule: Final[Rule] = rule


class InvalidService(BroadcacheError, ValueError):
    """A malformed service name or port; `part` says which of the two."""

    def __init__(self, part: Literal["service", "port"], text: str) -> None:
        super().__init__(text)
        self.part: Final = part


class Destination(NamedTuple):
    """The service and port of a request that is allowed.

    Shape:  `service` is the name to look up, in lower case; a final dot, which makes it absolute, is kept. `name` is
            the same without that dot. `port` is a number from 1 to 65535, or the name of a port.
    """

    service: str
    name: str
    port: int | str


def check_destination(service: str, port: str) -> None:
    """Check the service and the port that a caller has named as arguments of their own.

    Raises: InvalidSettings, which names the wrong argument.
    """
    if _is_address(service):
        raise InvalidSettings(
            f"service: expected the DNS name of a service, got {_shown(service)}, which can be read as an IP address; "
            "use a name, and list its addresses with addresses= (--address) if it is not in DNS"
        )
    try:
        _name_of(service)
        _port_of(port)
    except InvalidService as error:
        raise InvalidSettings(f"{error.part}: {error}") from None


class FanoutPolicy:
    """The services, ports, methods and addresses that the fan-out may call.

    Shape:  `allow` holds `service:port`, the port being a number, a name or `*`; an empty list turns the fan-out off.
            A name needs the numbers besides that DNS may resolve it to, or `*`.
            `networks` holds CIDRs that addresses must lie in; empty means any address outside the refused ranges.
            `methods` holds the permitted HTTP methods; empty means every method except CONNECT.
    Raises: InvalidSettings, which names the wrong item.
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
        """Whether no service is allowed."""
        return not self._ports

    def check(self, method: str, service: str, port: str) -> Destination:
        """Return the destination of a request that is allowed.

        Shape:  `service` and `port` as they stand in the path, still percent-encoded.
        Raises: FanoutRefused; InvalidService when the service or the port is malformed.
        """
        if self.is_off:
            raise FanoutRefused(
                "fan-out-off",
                f"the fan-out is off: {_ALLOW} is empty; set {_ALLOW}=service:port to turn it on",
            )
        _check_is_no_address(service)
        destination = Destination(service.lower(), _name_of(service), _port_of(port))
        self._check_method(method)
        self._check_allowed(destination)
        return destination

    def check_port(self, destination: Destination, number: int) -> None:
        """Check that a port to which DNS resolved a port's name may be dialled: its number must be allowed as well.

        Raises: FanoutRefused.
        """
        ports = self._ports.get(destination.name, set())
        if number not in ports and "*" not in ports:
            raise FanoutRefused(
                "port-not-allowed",
                f"expected a number that {_ALLOW} names for this service, got {number} for its port "
                f"{destination.port!r} from SRV records; add {destination.name}:{number} there if it may be called",
            )

    def check_address(self, host: str) -> None:
        """Check that an address to which a name resolved may be dialled.

        Shape:  the text of one IP address, without brackets, with or without a scope.
        Raises: FanoutRefused, also for a text that is not an address.
        """
        try:
            address = address_of(host)
        except ValueError:
            raise FanoutRefused(
                "address-refused",
                f"expected an IP address, got {_shown(host)}: only checked addresses are called; check the name server",
            ) from None
        for form in (address, *embedded_in(address)):
            self._check_refused_ranges(host, form)
        if self._networks and not any(address in network for network in self._networks):
            raise FanoutRefused(
                "address-not-allowed",
                f"expected an address within the networks of {_NETWORKS}, got {_shown(host)}; "
                "add its network there if it may be called",
            )

    def permits(self, host: str) -> bool:
        """Whether an address may be dialled: `check_address` as a predicate."""
        try:
            self.check_address(host)
        except FanoutRefused:
            return False
        return True

    def _check_method(self, method: str) -> None:
        if _METHOD.fullmatch(method) is None:
            raise FanoutRefused("method-not-allowed", f"expected an HTTP method, got {_shown(method)}")
        # Some clients convert methods to upper case before they send them.
        if method.upper() == "CONNECT":
            raise FanoutRefused(
                "method-not-allowed",
                f"expected a method that can be fanned out, got {_shown(method)}, which opens a tunnel; use another: "
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
                f"expected a service that {_ALLOW} names, spelled the same, got {_shown(destination.service)}; "
                "add it there, with its port, if it may be called",
            )
        if destination.port not in ports and "*" not in ports:
            raise FanoutRefused(
                "port-not-allowed",
                f"expected a port that {_ALLOW} names for this service, "
                f"got {_shown(f'{destination.port} of {destination.name}')}; add it there if it may be called",
            )

    def _check_refused_ranges(self, host: str, address: IPAddress) -> None:
        """A refused range is opened only by a network inside it: 127.0.0.0/8 opens loopback, 0.0.0.0/0 does not."""
        for refused in refused_ranges_of(address):
            if not any(address in network and is_within(network, refused.network) for network in self._networks):
                raise FanoutRefused(
                    "address-refused",
                    f"expected an address of a replica, got {_shown(host)}: {address} lies in {refused.network} "
                    f"({refused.what}); name that network, or a part of it, in {_NETWORKS} if it may be called",
                )


def allow_of(service: str, port: int | str) -> tuple[str, ...]:
    """Return the `allow` of a policy for one service whose caller has typed it, and leaves a port's number to DNS."""
    named = f"{service}:{port}"
    return (named,) if str(port).isdecimal() else (named, f"{service}:*")


def _numbered(variable: str, items: Sequence[str]) -> Iterable[tuple[int, str]]:
    if isinstance(items, str):
        raise InvalidSettings(
            f"{variable}: expected a list of strings, got a string, {_shown(items)}; put it in a list"
        )
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
            f"got {_shown(item)}"
        ) from None


def _method_of(number: int, item: str) -> str:
    method = item.upper()
    if _METHOD.fullmatch(item) is None or method == "CONNECT":
        raise InvalidSettings(
            f"{_METHODS}: expected an HTTP method other than CONNECT as item {number}, got {_shown(item)}; leave the "
            "variable out to permit every method"
        )
    return method


def _name_of(service: str) -> str:
    """Return the name of a service in lower case, without a final dot."""
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
        "service", f"expected the name of a service, of {expected}, got {_shown(service)} as the service"
    )


def _port_of(port: str) -> int | str:
    if _PORT_NUMBER.fullmatch(port) and int(port) <= 65_535:
        return int(port)
    if len(port) <= _PORT_NAME_CHARACTERS_MAX and _PORT_NAME.fullmatch(port):
        return port.lower()
    raise InvalidService(
        "port",
        "expected a number from 1 to 65535 without zeros in front, or a name of 1 to 15 letters, digits and single "
        f"hyphens, got {_shown(port)} as the port",
    )


def _check_is_no_address(service: str) -> None:
    if _is_address(service):
        raise FanoutRefused(
            "ip-literal",
            f"expected the name of a service, got {_shown(service)}, which can be read as an IP address; use the name: "
            f"{_ALLOW} cannot permit an address",
        )


def _is_address(service: str) -> bool:
    once = unquote(service)
    return any(_reads_as_address(form) for form in (service, once, unquote(once)))


def _reads_as_address(text: str) -> bool:
    """Whether some component on the way might read a text as an address instead of a name to look up."""
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
    """Write the digits and dots of all scripts in ASCII, as a resolver library may do before a lookup."""
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
    """Quote a received text in ASCII: no control characters in logs and terminals, no lookalike digits."""
    quoted = ascii(text[:_SHOWN_CHARACTERS_MAX])
    if len(text) <= _SHOWN_CHARACTERS_MAX and len(quoted) <= _SHOWN_CHARACTERS_MAX:
        return quoted
    return quoted[: _SHOWN_CHARACTERS_MAX - 1] + "…"
