"""The identity of the server at the other end of a link."""

import logging

from ...shared.errors import LogRefused
from ...shared.transport.redis.link import Link
from ...shared.transport.redis.log import Identity, identity

__all__ = ["IdentityReader"]

_log: logging.Logger = logging.getLogger("broadcache.subscriber")


class IdentityReader:
    """Reads the identity of servers, and warns once when a server does not reveal it."""

    def __init__(self) -> None:
        self._has_warned = False

    async def read(self, link: Link, *, timeout_seconds: float) -> Identity:
        """Return the identity of the server, if it reveals one: an unknown identity equals no other.

        Raises: LinkLost.
        """
        refusal: LogRefused | None = None
        server = Identity("", "")
        try:
            async with link.within(timeout_seconds):
                server = await identity(link)
        except LogRefused as error:
            refusal = error
        if not server.is_known and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "a restart of %s cannot be distinguished from a lost connection, so each new subscription clears the "
                "caches: expected INFO to have run_id and master_replid, got: %s",
                link.label,
                refusal or "neither or one of them",
            )
        return server
