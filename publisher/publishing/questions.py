"""Asks all replicas of a namespace, and takes what they answer."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final, NamedTuple, Protocol

from ...shared.question import Question, ReplicaAnswer, encode_question
from ...shared.transport.redis.link import Link, Refused
from ...shared.transport.redis.names import names_of
from ...shared.transport.redis.refusals import refused
from ...shared.transport.redis.registry import Registries
from .confirmations import Confirmations

__all__ = ["Answers", "Asked", "Questions"]


class Answers(NamedTuple):
    """What replicas answered, by replica, in the order of the questions.

    Shape:  `missing` are those that are registered and have not answered everything in time, by name. A replica that is
            not registered may answer all the same. `doubt` says why there may be replicas that are not registered; None
            when there are none.
    """

    by_replica: dict[str, list[ReplicaAnswer]]
    missing: list[str]
    doubt: str | None = None


class Asked:
    """Some questions under way, and what has been answered."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._questions = questions
        self._expected: dict[str, None] = {}
        self._doubt: str | None = None
        self._answers: dict[str, dict[str, ReplicaAnswer]] = {}
        self._is_sent = False
        self._is_complete = asyncio.Event()

    @property
    def has_heard(self) -> bool:
        """Whether anybody has answered, or nobody could."""
        return bool(self._answers) or not self._expected

    def expect(self, replicas: Collection[str], doubt: str | None = None) -> None:
        """Expect an answer of each of these replicas. `doubt` says why there may be others."""
        self._expected.update(dict.fromkeys(replicas))
        self._doubt = doubt or self._doubt

    def sent(self) -> None:
        """Take note that whoever is to be asked has been."""
        self._is_sent = True
        self._note()

    def record(self, replica: str, answer: ReplicaAnswer) -> None:
        """Take an answer to one of the questions."""
        self._answers.setdefault(replica, {})[answer.id] = answer
        self._note()

    async def until_complete(self) -> None:
        """Wait until everybody has answered everything."""
        await self._is_complete.wait()

    def answers(self) -> Answers:
        """Return what is known now."""
        whole = {
            replica: [answers[question.id] for question in self._questions]
            for replica, answers in sorted(self._answers.items())
            if len(answers) == len(self._questions)
        }
        return Answers(whole, sorted(self._expected.keys() - whole.keys()), self._doubt)

    def _note(self) -> None:
        if self._is_sent and not self.answers().missing:
            self._is_complete.set()


class Call(Protocol):
    """Does some work over a link, and over new ones when it is lost. Raises: LinkLost; LogRefused."""

    def __call__(self, namespace: str, work: Callable[[Link], Awaitable[None]], /) -> Awaitable[None]: ...


class Questions:
    """Publishes questions over the publisher's own links, and hears the answers where confirmations are heard."""

    def __init__(self, confirmations: Confirmations, call: Call, registries: Registries) -> None:
        self._confirmations: Final = confirmations
        self._call: Final = call
        self._registries: Final = registries

    async def query(self, namespace: str, questions: Sequence[Question], timeout_seconds: float) -> Answers:
        """Ask, and wait at most `timeout_seconds` for whoever is there. Raises: LinkLost; LogRefused."""
        asked = Asked(questions)

        async def send(link: Link) -> None:
            registry = await self._registries.read(link, namespace)
            asked.expect(registry.left_ms, registry.doubt)
            channel = names_of(namespace).question
            try:
                await link.call_all([(link.publish_command, channel, encode_question(each)) for each in questions])
            except Refused as refusal:
                raise refused(f"carry a question to the replicas of {namespace!r}", refusal) from refusal

        with self._confirmations.receiving(namespace, asked, [question.id for question in questions]):
            await self._confirmations.listen(namespace, timeout_seconds)
            await self._call(namespace, send)
            asked.sent()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await asked.until_complete()
        if not asked.has_heard:
            await self._confirmations.check(namespace)
        return asked.answers()
