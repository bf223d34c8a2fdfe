"""A link that is made anew when it is lost, and that concurrent calls share."""

import asyncio
from typing import Final

from ..shared.address import RedisAddress
from ..shared.errors import LinkLost
from ..shared.link import Link
from ..shared.tasks import is_cancelled

__all__ = ["KeptLink"]

_CONNECT_TIMEOUT_SECONDS: Final = 2.0


class KeptLink:
    """One link at a time to one address. Whoever needs it while it is being made waits for the same attempt."""

    def __init__(self, address: RedisAddress) -> None:
        self._address = address
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
        connecting = self._connecting
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            if connecting.cancelled() and not is_cancelled():
                raise LinkLost("the publisher was closed while it was connecting") from None
            raise

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
                self._address, client_name="broadcache:publisher", timeout_seconds=_CONNECT_TIMEOUT_SECONDS
            )
            return self._link
        finally:
            self._connecting = None
