"""Links that are replaced when they are lost, and that concurrent calls share."""

import asyncio
from typing import Final

from ...shared.errors import LinkLost
from ...shared.process.forks import in_forked_child, keep_inherited
from ...shared.transport.redis.address import RedisAddress
from ...shared.transport.redis.link import Link, OnMessage

__all__ = ["KeptLink", "KeptLinks"]

_CONNECT_TIMEOUT_SECONDS: Final = 2.0
_LINKS_MAX: Final = 100
"""The limit on links in a cluster, where each namespace has its own."""


class KeptLink:
    """One link at a time to one address. Concurrent callers wait for the same attempt to connect."""

    def __init__(self, address: RedisAddress, *, client_name: str, on_message: OnMessage | None = None) -> None:
        self._address = address
        self._client_name = client_name
        self._on_message = on_message
        self._link: Link | None = None
        self._connecting: asyncio.Task[Link] | None = None
        self._is_closed = False
        in_forked_child(self._start_over)

    def _start_over(self) -> None:
        """Connect anew: in a forked child, the link and an attempt to connect belong to its parent."""
        keep_inherited(self._link, self._connecting)
        self._link = self._connecting = None

    async def connected(self) -> Link:
        """Return the open link, or open one. Raises: LinkLost."""
        if self._is_closed:
            raise LinkLost(f"the link to {self._address.label} was closed")
        if self._link is not None and self._link.is_open:
            return self._link
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect(), name="broadcache publisher connect")
            self._connecting.add_done_callback(_retrieve_failure)
        connecting = self._connecting
        await asyncio.wait([connecting])
        if connecting.cancelled():
            raise LinkLost("the publisher was closed while it was connecting")
        return connecting.result()

    async def close(self) -> None:
        """Close the link, for good. Closing twice, or before there is a link, is harmless."""
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


def _retrieve_failure(connecting: asyncio.Task[Link]) -> None:
    """Keep asyncio from reporting a failed attempt that has no caller left: the next call reports its own failure."""
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
        """Return the link for a namespace. Beyond the limit, the least recently used one is closed."""
        key = namespace if self._address.is_cluster else ""
        kept = self._links.pop(key, None) or KeptLink(
            self._address.of(namespace), client_name=self._client_name, on_message=self._on_message
        )
        self._links[key] = kept  # ordered by last use
        if len(self._links) > _LINKS_MAX:
            await self._links.pop(next(iter(self._links))).close()
        return kept

    async def close(self) -> None:
        """Close all links; `of` makes new ones. Closing twice is harmless."""
        links, self._links = self._links, {}
        await asyncio.gather(*[link.close() for link in links.values()])
