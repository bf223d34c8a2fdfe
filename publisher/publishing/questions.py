"""Queries all replicas of a namespace: sends questions and collects the answers."""

import asyncio
import contextlib
from collections.abc import Collection, Sequence
from functools import partial
from typing import Final, NamedTuple

from ...shared.errors import BroadcacheError
from ...shared.question import Question, ReplicaAnswer, encode_question
from ...shared.transport.redis.link import Link, Refused
from ...shared.transport.redis.refusals import refused
from ...shared.transport.redis.registry import Registries, ReplicaCounts
from .calls import Calls
from .confirmations import Confirmations

__all__ = ["Answers", "Query", "Questions", "count_replicas"]


class Answers(NamedTuple):
    """The answers of each replica, in the order of the questions.

    Shape:  `missing` names the replicas that may serve from their caches and have not answered every question in time,
            sorted: registered ones, and silent ones, which are not waited for. A replica that is not registered may
            answer too. `doubt` says why there may be replicas that are not registered; None
            when there are none.
    """

    by_replica: dict[str, list[ReplicaAnswer]]
    missing: list[str]
    doubt: str | None = None


class Query:
    """Questions that were sent together, and the answers so far."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._questions = questions
        self._expected: dict[str, None] = {}
        self._silent: set[str] = set()
        self._doubt: str | None = None
        self._answers: dict[str, dict[str, ReplicaAnswer]] = {}
        self._is_sent = False
        self._is_complete = asyncio.Event()

    @property
    def has_answers(self) -> bool:
        """Whether a replica has answered, or none is expected to."""
        return bool(self._answers) or not self._expected

    def expect(self, replicas: Collection[str], doubt: str | None = None, *, silent: Collection[str] = ()) -> None:
        """Expect answers from these replicas. `doubt` says why there may be other replicas.

        Shape: `silent` are replicas that may serve from their caches, and will hardly answer.
        """
        self._expected.update(dict.fromkeys(replicas))
        self._silent = {*silent}
        self._doubt = doubt or self._doubt

    def sent(self) -> None:
        """Record that the questions are published, and every replica to expect is known."""
        self._is_sent = True
        self._check_complete()

    def record(self, replica: str, answer: ReplicaAnswer) -> None:
        """Record an answer to one of the questions."""
        self._answers.setdefault(replica, {})[answer.id] = answer
        self._check_complete()

    async def until_complete(self) -> None:
        """Wait until every expected replica has answered every question."""
        await self._is_complete.wait()

    def answers(self) -> Answers:
        """Return the answers so far."""
        whole = {
            replica: [answers[question.id] for question in self._questions]
            for replica, answers in sorted(self._answers.items())
            if len(answers) == len(self._questions)
        }
        missing = (self._expected.keys() | self._silent) - whole.keys()
        return Answers(whole, sorted(missing), self._doubt)

    def _check_complete(self) -> None:
        if self._is_sent and self._expected.keys() <= self.answers().by_replica.keys():
            self._is_complete.set()


class Questions:
    """Publishes questions over the links of the publisher; the answers arrive on the channel for confirmations."""

    def __init__(self, confirmations: Confirmations, calls: Calls, registries: Registries) -> None:
        self._confirmations: Final = confirmations
        self._calls: Final = calls
        self._registries: Final = registries

    async def query(self, namespace: str, questions: Sequence[Question], timeout_seconds: float) -> Answers:
        """Send the questions, and wait at most `timeout_seconds` for the answers. Raises: LinkLost; LogRefused."""
        query = Query(questions)

        async def send(link: Link) -> None:
            registry = await self._registries.read(link, namespace)
            silent = [replica for replica in registry.expected if replica not in registry.left_ms]
            query.expect(registry.left_ms, registry.doubt, silent=silent)
            channel = link.names_of(namespace).question
            try:
                await link.call_all([(link.publish_command, channel, encode_question(each)) for each in questions])
            except Refused as refusal:
                raise refused(f"carry a question to the replicas of {namespace!r}", refusal) from refusal

        with self._confirmations.receiving(namespace, query, [question.id for question in questions]):
            await self._confirmations.subscribe(namespace, timeout_seconds)
            await self._calls.with_retries(namespace, send)
            query.sent()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await query.until_complete()
        if not query.has_answers:
            await self._confirmations.check(namespace)
        return query.answers()


async def count_replicas(
    calls: Calls, registries: Registries, namespaces: tuple[str, ...], timeout_seconds: float
) -> dict[str, ReplicaCounts]:
    """Count the replicas of the namespaces, without any of those read before; those without an answer are left out."""
    counts: dict[str, ReplicaCounts] = {}

    async def count(namespace: str) -> None:
        with contextlib.suppress(BroadcacheError):
            counts[namespace] = (await calls.once(namespace, partial(registries.read, namespace=namespace))).counts

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_seconds):
            await asyncio.gather(*map(count, namespaces or registries.namespaces))
    return counts
