"""Links that are replaced when they are lost, and that concurrent calls share."""

import asyncio
import contextlib
from typing import Any, Final

from ...shared.errors import LinkLost
from ...shared.process.forks import in_forked_child, keep_inherited
from ...shared.transport.redis.address import RedisAddress
from ...shared.transport.redis.link import Link, OnMessage
from ...shared.transport.redis.topology import Node, Primaries

__all__ = ["KeptLink", "KeptLinks"]

_CONNECT_TIMEOUT_SECONDS: Final = 2.0


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

    @property
    def link(self) -> Link | None:
        """The last link."""
        return self._link

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

    def abandon(self) -> None:
        """Close the link, for good, without its event loop: that has ended."""
        self._is_closed = True
        self._connecting = None
        link, self._link = self._link, None
        if link is not None:
            link.abandon()

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
            if self._connecting is asyncio.current_task():
                self._connecting = None


def _retrieve_failure(connecting: asyncio.Task[Any]) -> None:
    """Keep asyncio from reporting a failed attempt that has no caller left: the next call reports its own failure."""
    if not connecting.cancelled():
        connecting.exception()


class KeptLinks:
    """The link of all namespaces; in a cluster, one for each server that is the primary of any.

    In a cluster, one query finds the servers of all namespaces. Its answer is used for one until `distrust` says
    that it may be outdated. No link is closed to make room for another: there are as many as servers.
    """

    def __init__(self, address: RedisAddress, *, client_name: str, on_message: OnMessage | None = None) -> None:
        self._address = address
        self._client_name = client_name
        self._on_message = on_message
        self._links: dict[Node | None, KeptLink] = {}
        self._primaries: Primaries | None = None
        self._finding: asyncio.Task[Primaries] | None = None
        self._distrusted: set[str] = set()
        # The last owner of a slot knows first where it moved to.
        self._asked_first: Node | None = None

    @property
    def shared(self) -> Link | None:
        """The open link of all namespaces; None in a cluster, and while there is none."""
        kept = self._links.get(None)
        link = None if kept is None else kept.link
        return link if link is not None and link.is_open else None

    async def connected(self, namespace: str) -> Link:
        """Return the open link to the server that has `namespace`, or open one. Raises: LinkLost."""
        node = await self._node_of(namespace) if self._address.is_cluster else None
        kept = self._links.get(node)
        if kept is None:
            kept = self._links[node] = KeptLink(
                self._address if node is None else self._address.at(node),
                client_name=self._client_name,
                on_message=self._on_message,
            )
        try:
            return await kept.connected()
        except LinkLost:
            self.distrust(namespace)
            raise

    def distrust(self, namespace: str, link: Link | None = None) -> None:
        """Find the server of `namespace` anew: the last one was lost, or is no primary of it.

        Shape: `link` is the link that led there. A failure over one that has been replaced changes nothing.
        """
        if self._primaries is None:
            return
        with contextlib.suppress(LinkLost):
            node = self._primaries.of(namespace)
            if link is not None and node in self._links and self._links[node].link is not link:
                return
            self._asked_first = node
        self._distrusted.add(namespace)

    async def close(self) -> None:
        """Close all links; `connected` opens new ones. Closing twice is harmless."""
        links, self._links = self._links, {}
        finding, self._finding, self._primaries = self._finding, None, None
        if finding is not None and not finding.done():
            finding.cancel()
            await asyncio.wait([finding])
        await asyncio.gather(*[link.close() for link in links.values()])

    def abandon(self) -> None:
        """Close all links without their event loop, which has ended; `connected` opens new ones."""
        links, self._links = self._links, {}
        self._finding = self._primaries = None
        for link in links.values():
            link.abandon()

    async def _node_of(self, namespace: str) -> Node:
        if self._primaries is not None and namespace not in self._distrusted:
            return self._primaries.of(namespace)
        if self._finding is None:
            self._finding = asyncio.create_task(self._find(), name="broadcache publisher finds primaries")
            self._finding.add_done_callback(_retrieve_failure)
        finding = self._finding
        await asyncio.wait([finding])
        if finding.cancelled():
            raise LinkLost("the publisher was closed while it was connecting")
        return finding.result().of(namespace)

    async def _find(self) -> Primaries:
        distrusted, self._distrusted = self._distrusted, set()
        try:
            self._primaries = await self._address.primaries(
                timeout_seconds=_CONNECT_TIMEOUT_SECONDS, first=self._asked_first
            )
            return self._primaries
        except BaseException:
            self._distrusted |= distrusted
            raise
        finally:
            self._finding = None
