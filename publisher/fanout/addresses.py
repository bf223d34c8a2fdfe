"""Addresses of a service's replicas, how a discovery reports them, and the errors it raises."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from ...shared.errors import BroadcacheError
from ...shared.texts import host_and_port

__all__ = [
    "AliasRefused",
    "Discovered",
    "Discovery",
    "ReplicaAddress",
    "ResolverFailed",
    "ResolverTimedOut",
    "ServiceNotFound",
]


class ReplicaAddress(NamedTuple):
    """The address on which one replica listens. Shape: `host` is an IP literal in canonical form, without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return host_and_port(self.host, self.port)


@dataclass(frozen=True, slots=True)
class Discovered:
    """The addresses of a service: each one once, in the resolver's order.

    Shape: `is_complete` is False if there may be replicas that `addresses` does not name; `notes` says why, in
           sentences.
    """

    addresses: tuple[ReplicaAddress, ...]
    how: Literal["dns", "srv", "list"]
    is_complete: bool
    notes: tuple[str, ...]


class ServiceNotFound(BroadcacheError):
    """The service does not exist, or has no addresses now."""


class ResolverFailed(BroadcacheError):
    """The name servers could not be reached, or refused to answer. Whether the service exists is not known."""


class ResolverTimedOut(ResolverFailed):
    """No name server answered in time."""


class AliasRefused(BroadcacheError):
    """The service is an alias of, or has SRV records for, a name outside its own domain, as an ExternalName service."""


class Discovery(Protocol):
    """Finds the replicas of a service."""

    async def discover(self, service: str, port: int | str) -> Discovered:
        """Return the current addresses of `service`, for a port number or a named port.

        Raises: ServiceNotFound, ResolverFailed, ResolverTimedOut, AliasRefused.
        """
        ...
