"""The registries of replicas, as a publisher reads them."""

from ...shared.presence import Registry, registered
from ...shared.transport.redis.link import Link

__all__ = ["Registries"]


class Registries:
    """Reads registries, and remembers the longest lease that it has seen in each namespace.

    A loss of the registry may take the log's own record of the longest lease with it.
    """

    def __init__(self) -> None:
        self._leases_ms: dict[str, int] = {}

    async def read(self, link: Link, namespace: str) -> Registry:
        """Return the registry of `namespace`. Raises: LinkLost; LogRefused."""
        registry = await registered(link, namespace)
        # What is left of a registration is never more than its lifetime.
        seen_ms = (self._leases_ms.get(namespace, 0), registry.lease_ms or 0, *registry.left_ms.values())
        longest_ms = max(seen_ms)
        if longest_ms:
            self._leases_ms[namespace] = longest_ms
        return registry if registry.lease_ms is None else registry._replace(lease_ms=longest_ms)
