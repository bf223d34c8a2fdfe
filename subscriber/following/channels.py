"""The channels of a follower's link: its subscriptions to invalidations, questions and the replica's own echo."""

import asyncio
import logging
from collections.abc import Sequence

from ...shared.errors import LinkLost
from ...shared.transport.redis.link import Link, Refused

__all__ = ["Channels"]

_log = logging.getLogger("broadcache.subscriber")


class Channels:
    """The channels that the current link is subscribed to, as far as the server has confirmed them.

    Shape:  `echo` is the channel on which this replica's probes arrive.
    """

    def __init__(self, replica_id: str, *, timeout_seconds: float) -> None:
        self.echo: str = ""
        self._replica_id = replica_id
        self._timeout_seconds = timeout_seconds
        self._subscribed: set[str] = set()
        # The question channels. A refused one is not tried again over the same link.
        self._questions: set[str] = set()
        self._refused_questions: set[str] = set()

    def begin(self) -> None:
        """Begin with a new link, which is not subscribed to anything."""
        self._subscribed = set()
        self._questions, self._refused_questions = set(), set()

    def carries(self, link: Link, namespace: str) -> bool:
        """Whether invalidations of `namespace` arrive over the link."""
        return link.names_of(namespace).channel in self._subscribed

    async def follow(self, link: Link, namespaces: Sequence[str]) -> None:
        """Subscribe to the channels of `namespaces`, and to no others. Raises: LinkLost, also when it is refused."""
        wanted = {link.names_of(namespace).channel for namespace in namespaces}
        self.echo = link.names_of(namespaces[0]).echo_prefix + self._replica_id
        wanted.add(self.echo)
        try:
            async with link.within(self._timeout_seconds):
                if missing := wanted - self._subscribed:
                    await link.subscribe(*missing)
                if too_many := self._subscribed - wanted:
                    await link.unsubscribe(*too_many)
        except Refused as refusal:
            raise LinkLost(f"expected {link.label} to let this user subscribe, got: {refusal}") from refusal
        self._subscribed = wanted
        await self._follow_questions(link, {link.names_of(namespace).question for namespace in namespaces})

    async def _follow_questions(self, link: Link, wanted: set[str]) -> None:
        """Subscribe to the question channels, as far as the user may.

        Answering questions is optional: a replica whose user may not subscribe to them keeps its link.
        """
        missing, too_many = wanted - self._questions - self._refused_questions, self._questions - wanted
        if not missing and not too_many:
            return
        changes = [
            *((link.subscribe, channel) for channel in missing),
            *((link.unsubscribe, each) for each in too_many),
        ]
        async with link.within(self._timeout_seconds):
            # Each by itself: a user may have the right to one and not to another.
            results = await asyncio.gather(*(change(channel) for change, channel in changes), return_exceptions=True)
        refusals = {channel: result for (_, channel), result in zip(changes, results, strict=True) if result}
        for refusal in refusals.values():
            if not isinstance(refusal, Refused):
                raise refusal
        self._refused_questions |= refusals.keys()
        self._questions = wanted - self._refused_questions
        if refusals:
            _log.warning(
                "this Redis user may not subscribe to the question channel at %s: expected the right to it, got: %s; "
                "previews and audits will show this replica as missing",
                link.label,
                "; ".join({str(refusal) for refusal in refusals.values()}),
            )
