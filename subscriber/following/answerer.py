"""The answerer: answers questions that a publisher sends to all replicas. It drops no entries."""

import asyncio
import logging
from collections import deque
from typing import Final

from ...shared.confirmation import encode_reports
from ...shared.errors import BroadcacheError, MalformedFrame
from ...shared.question import Question, ReplicaAnswer, decode_question
from ...shared.transport.redis.link import Link, Refused
from ..cache.entries import Count
from .sequencer import Sequencer

__all__ = ["Answerer"]

_log = logging.getLogger("broadcache.subscriber")

_WAITING_MAX: Final = 1_000


class Answerer:
    """Answers over the current link, one question after another, and lets other tasks run in between.

    Receiving never waits. Questions beyond `_WAITING_MAX`, and those that arrived over a previous link, are not
    answered: the publisher then lists this replica as missing.

    Shape:  `left_out` counts questions that were not answered.
    """

    def __init__(self, replica_id: str) -> None:
        self.left_out: int = 0
        self._replica_id = replica_id
        self._waiting: deque[tuple[Sequencer, bytes]] = deque()
        self._has_questions = asyncio.Event()

    def receive(self, sequencer: Sequencer, frame: bytes) -> None:
        """Queue a question about a namespace."""
        if len(self._waiting) >= _WAITING_MAX:
            self.left_out += 1
            return
        self._waiting.append((sequencer, frame))
        self._has_questions.set()

    async def answer_for_ever(self, link: Link) -> None:
        """Answer questions until the link is lost."""
        self.left_out += len(self._waiting)
        self._waiting.clear()
        try:
            while True:
                if not self._waiting:
                    self._has_questions.clear()
                    await self._has_questions.wait()
                await self._answer(link, *self._waiting.popleft())
        except BroadcacheError:
            return  # the follower handles the loss
        except Exception:  # noqa: BLE001  (the outermost task: the publisher sees that no answer arrived)
            _log.exception("questions over this link are not answered: an error in broadcache, please report it")

    async def _answer(self, link: Link, sequencer: Sequencer, frame: bytes) -> None:
        """Answer one question. Raises: LinkLost."""
        try:
            question = decode_question(frame)
        except MalformedFrame as error:
            self.left_out += 1
            _log.warning("a question to %s is not answered: %s", sequencer.namespace, error)
            return
        answer = await _answer_to(question, sequencer)
        channel = link.names_of(sequencer.namespace).confirmed
        try:
            await link.publish(channel, encode_reports(self._replica_id, answers=[answer]))
        except Refused as refusal:
            self.left_out += 1
            _log.warning("expected %s to let this user answer, got: %s", link.label, refusal)


async def _answer_to(question: Question, sequencer: Sequencer) -> ReplicaAnswer:
    # First: the entries that are read later are not older than this position.
    position = sequencer.position
    fingerprints: list[tuple[str | None, ...]] = []
    for key in question.entries:
        fingerprints.append(tuple(cache.fingerprint(key) for cache in sequencer.caches))
        await asyncio.sleep(0)  # values may be large
    count, is_estimate = await _count(question, sequencer)
    return ReplicaAnswer(
        id=question.id,
        position=position,
        count=count,
        is_estimate=is_estimate,
        fingerprints=tuple(fingerprints),
    )


async def _count(question: Question, sequencer: Sequencer) -> tuple[int, bool]:
    named, entries, is_estimate = question.counted, 0, False
    if named is not None:
        for cache in sequencer.caches:
            count = Count(0, is_estimate=False)
            for so_far in cache.counting(named):
                count = so_far
                await asyncio.sleep(0)
            entries += count.entries
            is_estimate = is_estimate or count.is_estimate
    return entries, is_estimate
