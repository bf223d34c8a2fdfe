"""Address ranges that the fan-out refuses unless a setting names them, in every form of writing."""

import ipaddress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, NamedTuple, TypeAlias

__all__ = [
    "REFUSED_RANGES",
    "IPAddress",
    "Network",
    "RefusedRange",
    "address_of",
    "embedded_in",
    "is_within",
    "network_of",
    "refused_ranges_of",
]

IPAddress: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network


class RefusedRange(NamedTuple):
    """Addresses that are refused unless a setting names a network within `network`; `what` describes their use."""

    network: Network
    what: str


_MAPPED: Final = IPv6Network("::ffff:0:0/96")
_COMPATIBLE: Final = IPv6Network("::/96")
_TRANSLATED: Final = IPv6Network("::ffff:0:0:0/96")
_NAT64: Final = IPv6Network("64:ff9b::/96")
_NAT64_LOCAL: Final = IPv6Network("64:ff9b:1::/48")
_TEREDO: Final = IPv6Network("2001::/32")
_SIX_TO_FOUR: Final = IPv6Network("2002::/16")

REFUSED_RANGES: Final = (
    # Linux reads 0.0.0.0 as this machine.
    RefusedRange(IPv4Network("0.0.0.0/8"), "this host"),
    # Sidecars and administration ports listen here, and so does the publisher.
    RefusedRange(IPv4Network("127.0.0.0/8"), "loopback"),
    # The metadata services of AWS, Google, Azure and others serve credentials at 169.254.169.254.
    RefusedRange(IPv4Network("169.254.0.0/16"), "link-local, with the metadata services of clouds"),
    # One datagram reaches many hosts, and none of them speaks TCP there.
    RefusedRange(IPv4Network("224.0.0.0/4"), "multicast"),
    # Never assigned; 255.255.255.255 is the broadcast address.
    RefusedRange(IPv4Network("240.0.0.0/4"), "reserved, with the broadcast address"),
    # Protocol assignments; Oracle's first cloud has its metadata service at 192.0.0.192.
    RefusedRange(IPv4Network("192.0.0.0/24"), "protocol assignments"),
    # Every machine in Azure can read its certificates and its configuration from this address.
    RefusedRange(IPv4Network("168.63.129.16/32"), "the platform of Azure"),
    # It lies in the carrier-grade NAT range, which clusters do use for pods, so only the one address is refused.
    RefusedRange(IPv4Network("100.100.100.200/32"), "the metadata service of Alibaba Cloud"),
    RefusedRange(IPv6Network("::/128"), "unspecified"),
    RefusedRange(IPv6Network("::1/128"), "loopback"),
    RefusedRange(IPv6Network("fe80::/10"), "link-local"),
    # Deprecated, and still routed within some sites.
    RefusedRange(IPv6Network("fec0::/10"), "site-local"),
    RefusedRange(IPv6Network("ff00::/8"), "multicast"),
    # Metadata at fd00:ec2::254, pod credentials at fd00:ec2::23: Amazon reserves the prefix for such services.
    RefusedRange(IPv6Network("fd00:ec2::/32"), "the metadata services of AWS"),
    RefusedRange(IPv6Network("fd20:ce::254/128"), "the metadata service of Google Cloud"),
    RefusedRange(IPv6Network("fd00:42::42/128"), "the metadata service of Scaleway"),
    # No pod has an address of these forms. Each is a way to write, or to reach, an IPv4 address.
    RefusedRange(_COMPATIBLE, "IPv4-compatible"),
    RefusedRange(_TRANSLATED, "IPv4-translated"),
    RefusedRange(_NAT64, "NAT64"),
    RefusedRange(_NAT64_LOCAL, "local NAT64"),
    RefusedRange(_TEREDO, "Teredo"),
    RefusedRange(_SIX_TO_FOUR, "6to4"),
)


def address_of(text: str) -> IPAddress:
    """Read an address.

    Shape:  an IPv4-mapped one (::ffff:10.0.0.1) becomes the IPv4 address, which is the one dialled. A scope (%eth0) is
            dropped: it may be any text, and does not change the kind of the address.
    Raises: ValueError.
    """
    address = ipaddress.ip_address(text.partition("%")[0] if ":" in text else text)
    if isinstance(address, IPv6Address) and address in _MAPPED:
        return _low_32_bits(int(address))
    return address


def network_of(text: str) -> Network:
    """Read a network; one of IPv4-mapped addresses becomes the network of the IPv4 addresses.

    Raises: ValueError, also for a network that has bits set beyond its prefix, and for one with a scope.
    """
    if "%" in text:
        raise ValueError(f"{text!r} has a scope")
    network = ipaddress.ip_network(text)
    if is_within(network, _MAPPED):
        return IPv4Network((int(network.network_address) & _ALL_32_BITS, network.prefixlen - _MAPPED.prefixlen))
    return network


def is_within(inner: Network, outer: Network) -> bool:
    """Whether every address of `inner` is one of `outer`."""
    return inner.prefixlen >= outer.prefixlen and inner.network_address in outer


def refused_ranges_of(address: IPAddress) -> list[RefusedRange]:
    """Return the refused ranges that an address lies in."""
    return [refused for refused in REFUSED_RANGES if address in refused.network]


def embedded_in(address: IPAddress) -> tuple[IPv4Address, ...]:
    """Return the IPv4 addresses that a router or a translator may read out of an address.

    Source: RFC 4291 2.5.5.1, RFC 2765 2.1, RFC 6052 2.2, RFC 8215, RFC 4380 4, RFC 3056 2.
    """
    number = int(address)
    # The unspecified and the loopback address look like compatible ones, but are not.
    if address.version == 4 or number <= 1:
        return ()
    if address in _COMPATIBLE or address in _TRANSLATED or address in _NAT64:
        return (_low_32_bits(number),)
    if address in _NAT64_LOCAL:
        return _embedded_anywhere(number)
    if address in _SIX_TO_FOUR:
        return (_low_32_bits(number >> 80),)
    if address in _TEREDO:
        return (_low_32_bits(number >> 64), _low_32_bits(~number))  # the server, and the client with its bits inverted
    return ()


def _embedded_anywhere(number: int) -> tuple[IPv4Address, ...]:
    """Return the addresses embedded behind NAT64 prefixes of 96, 48, 56 and 64 bits: only the operator knows which.

    All forms but the first skip bits 64 to 71, as RFC 6052 demands. In the forms that do not apply, the address begins
    with zeros and is invalid: such a reading counts only if there is no other.
    """
    without_gap = number >> 64 << 56 | number & (1 << 56) - 1
    found = [_low_32_bits(number), *(_low_32_bits(without_gap >> shift) for shift in (40, 32, 24))]
    return tuple(address for address in found if int(address) >> 24) or (found[0],)


_ALL_32_BITS: Final = 0xFFFF_FFFF


def _low_32_bits(number: int) -> IPv4Address:
    return IPv4Address(number & _ALL_32_BITS)
