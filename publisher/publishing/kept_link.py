"""Links that are made anew when they are lost, and that concurrent calls share."""

import asyncio
from typing import Final

from ...shared.errors import LinkLost
from ...shared.transport.redis.address import RedisAddress
from ...shared.transport.redis.link import Link, OnMessage

__all__ = ["KeptLink", "KeptLinks"]

_CONNECT_TIMEOUT_SECONDS: Final = 2.0
_LINKS_MAX: Final = 100
"""How many links there are at most in a cluster, where each namespace has its own."""


class KeptLink:
    """One link at a time to one address. Whoever needs it while it is being made waits for the same attempt."""

    def __init__(self, address: RedisAddress, *, client_name: str, on_message: OnMessage | None = None) -> None:
        self._address = address
        self._client_name = client_name
        self._on_message = on_message
        self._link: Link | None = None
        self._connecting: asyncio.Task[Link] | None = None
        self._is_closed = False

    async def connected(self) -> Link:
        """Return the open link, or make one. Raises: LinkLost."""
        if self._is_closed:
            raise LinkLost(f"the link to {self._address.label} was closed")
        if self._link is not None and self._link.is_open:
            return self._link
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect(), name="broadcache publisher connect")
            self._connecting.add_done_callback(_note_failure)
        connecting = self._connecting
        await asyncio.wait([connecting])
        if connecting.cancelled():
            raise LinkLost("the publisher was closed while it was connecting")
        return connecting.result()

    async def close(self) -> None:
        """Close the link, for good. Closing twice, or before there was one, is harmless."""
        self._is_closed = True
        connecting, self._connecting = self._connecting, None
        if connecting is not None and not connecting.done():
            connecting.cancel()
            await asyncio.wait([connecting])
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    async def _connect(self) -> Link:
        try:
            lost, self._link = self._link, None
            if lost is not None:
                await lost.close()
            self._link = await Link.open(
                self._address,
                client_name=self._client_name,
                timeout_seconds=_CONNECT_TIMEOUT_SECONDS,
                on_message=self._on_message,
            )
            return self._link
        finally:
            self._connecting = None


def _note_failure(connecting: asyncio.Task[Link]) -> None:
    """Have an attempt that failed when nobody waited for it any more pass in silence: the next one will tell."""
    if not connecting.cancelled():
        connecting.exception()


class KeptLinks:
    """The link of all namespaces; in a cluster, where each may be at another server, one for each namespace."""

    def __init__(self, address: RedisAddress, *, client_name: str, on_message: OnMessage | None = None) -> None:
        self._address = address
        self._client_name = client_name
        self._on_message = on_message
        self._links: dict[str, KeptLink] = {}

    async def of(self, namespace: str) -> KeptLink:
        """Return the link for a namespace. The one that was not used for longest makes room for one too many."""
        key = namespace if self._address.is_cluster else ""
        kept = self._links.pop(key, None) or KeptLink(
            self._address.of(namespace), client_name=self._client_name, on_message=self._on_message
        )
        self._links[key] = kept  # the one used last stands last
        if len(self._links) > _LINKS_MAX:
            await self._links.pop(next(iter(self._links))).close()
        return kept

    async def close(self) -> None:
        """Close them all, for good; `of` makes new ones. Closing twice is harmless."""
        links, self._links = self._links, {}
        await asyncio.gather(*[link.close() for link in links.values()])
