"""Discovery of a service's replicas: by DNS, or from a fixed list. Doubts are reported with the addresses."""

import asyncio
import ipaddress
import math
import re
from collections.abc import Mapping, Sequence
from typing import Final

from ...shared.errors import InvalidSettings
from ...shared.process.extras import check_installed
from .addresses import Discovered, Discovery, ReplicaAddress, ServiceNotFound

__all__ = ["DnsDiscovery", "ListDiscovery"]

_PORT_MAX: Final = 65_535
_PORT_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,60}[A-Za-z0-9])?")  # with its underscore, a DNS label
_ADDRESS: Final = re.compile(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::([0-9]{1,5}))?")


class ListDiscovery:
    """Fixed lists: `ListDiscovery({"replicas": ("127.0.0.1:8101", "127.0.0.2", "[::1]:80")})`.

    An entry without a port gets the port of the request. Services that have no list are left to `otherwise`.

    Raises: InvalidSettings.
    """

    def __init__(self, lists: Mapping[str, Sequence[str]], otherwise: Discovery | None = None) -> None:
        self._lists = {_folded(service): [_parsed(entry) for entry in entries] for service, entries in lists.items()}
        self._otherwise = otherwise
        if len(self._lists) < len(lists):
            raise InvalidSettings(
                f"expected each service once (names are not case-sensitive), got {', '.join(sorted(lists))}"
            )

    async def discover(self, service: str, port: int | str) -> Discovered:
        """Return the list of `service`. Raises: ServiceNotFound, and the errors of `otherwise`."""
        entries = self._lists.get(_folded(service))
        if entries is None and self._otherwise is not None:
            return await self._otherwise.discover(service, port)
        if not entries:
            raise ServiceNotFound(f"expected one of the services {', '.join(self._lists)}, got {service}")
        number = _number(port)
        addresses = [ReplicaAddress(host, chosen) for host, own in entries if (chosen := own or number) is not None]
        if len(addresses) < len(entries):
            raise ServiceNotFound(
                f"expected a port number for {service}, got {port!r}: an address in its list has no port of its own"
            )
        return Discovered(tuple(dict.fromkeys(addresses)), "list", is_complete=True, notes=())


class DnsDiscovery:
    """Discovery by DNS: the A and AAAA records of a headless service, or the SRV records of a named port. No cache.

    Shape:  `nameservers` such as `10.0.0.10:53`, `10.0.0.10` or `[fd00::10]:53`; empty: those of `resolv_conf`.
            The search list and `ndots` of that file apply in any case.
    Units:  `timeout_seconds` bounds one discovery as a whole.
    Raises: InvalidSettings, also when the extra `fanout` is not installed.
    Source: Kubernetes DNS-Based Service Discovery.
    """

    def __init__(
        self,
        nameservers: Sequence[str] = (),
        *,
        timeout_seconds: float = 2.0,
        resolv_conf: str = "/etc/resolv.conf",
    ) -> None:
        if not (math.isfinite(timeout_seconds) and timeout_seconds > 0):
            raise InvalidSettings(f"expected timeout_seconds above 0, got {timeout_seconds}")
        parsed = [_parsed(nameserver) for nameserver in nameservers]
        check_installed("the look-up of a service in DNS", "dns")
        # Imported here: only a DNS discovery pays for the DNS library.
        from .resolver import Resolver

        self._timeout_seconds = timeout_seconds
        self._resolver = Resolver(
            [ReplicaAddress(host, port or 53) for host, port in parsed],
            timeout_seconds=timeout_seconds,
            resolv_conf=resolv_conf,
        )

    async def discover(self, service: str, port: int | str) -> Discovered:
        """Look `service` up, as given or with the domains of the search list.

        Raises: ServiceNotFound, ResolverFailed, ResolverTimedOut, AliasRefused.
        """
        from .lookup import Lookup

        number = _number(port)
        lookup = Lookup(self._resolver, asyncio.get_running_loop().time() + self._timeout_seconds)
        names = self._resolver.candidates(service)
        for name in names:
            # All queries about one name are answered before the next name is tried: kinds and families never mix.
            if number is None:
                found = await lookup.by_rows(name, str(port))
            else:
                found = await lookup.by_addresses(name, number)
            if found is not None:
                return found
        tried = ", ".join(map(str, names))
        if number is None:
            raise ServiceNotFound(
                f"expected SRV records for the port {port!r} of {service}, got none (tried {tried}): check that the "
                "service exists, and that its port has that name; unnamed ports have no SRV records"
            )
        raise ServiceNotFound(
            f"expected addresses for {service}, got none (tried {tried}): check that the service exists and has ready "
            "replicas"
        )


def _number(port: int | str) -> int | None:
    """Return the port if it is a number, None if it is a name. Raises: ServiceNotFound if it is neither."""
    if isinstance(port, str) and not (port.isascii() and port.isdecimal()):
        if _PORT_NAME.fullmatch(port):
            return None
        raise ServiceNotFound(f"expected a port number or the name of a port, got {port!r}")
    if not 1 <= int(port) <= _PORT_MAX:
        raise ServiceNotFound(f"expected a port from 1 to {_PORT_MAX}, got {port}")
    return int(port)


def _folded(service: str) -> str:
    return service.lower().removesuffix(".")


def _parsed(text: str) -> tuple[str, int | None]:
    """Read `10.0.0.7`, `10.0.0.7:80`, `fd00::7` or `[fd00::7]:80`. Raises: InvalidSettings."""
    found = _ADDRESS.fullmatch(text)
    host, port = (found[1] or found[2], found[3]) if found else (text, None)
    try:
        canonical = str(ipaddress.ip_address(host))
        if port is not None and not 1 <= int(port) <= _PORT_MAX:
            raise ValueError(f"the port is not from 1 to {_PORT_MAX}")
    except ValueError as error:
        raise InvalidSettings(
            f"expected an IP address such as 10.0.0.7:80 or [fd00::7]:80, got {text!r}: {error}"
        ) from None
    return canonical, int(port) if port else None
