"""The auditor: samples invalidations, and asks all replicas whether they keep to them."""

import asyncio
import logging
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from ...shared.clock import Clock, monotonic
from ...shared.errors import BroadcacheError, InvalidSettings
from ...shared.fingerprint import NO_FINGERPRINT, fingerprint_of
from ...shared.invalidation import DEFAULT_NAMESPACE, Invalidation, Position, check_namespace, new_id
from ...shared.question import Question, ReplicaAnswer, looking_up
from ..publishing.publisher import Publisher
from ..publishing.questions import Answers
from .source import READS_MAX, SourceLookup
from .stats import COUNTS, AuditStats, Inconsistency, Within

__all__ = ["TIMESCALES_SECONDS", "Auditor"]

_log = logging.getLogger("broadcache.publisher")

_Signature: TypeAlias = frozenset[tuple[str, str | None, str | None]]

TIMESCALES_SECONDS: Final = (1.0, 10.0, 60.0)
_BATCH_CHECKS: Final = 500
_LOOKS_MAX: Final = 5
_CHECKS_MAX: Final = 10_000
_NAMES_MAX: Final = 50_000
_PREFIXES_MAX: Final = 1_000
_FINDINGS_MAX: Final = 100
_READ_ENTRIES_MAX: Final = 5_000


@dataclass(slots=True)
class _Check:
    """One sampled invalidation. `asked` is at how many timescales it has been asked about."""

    key: str | None
    position: Position
    seen_at: float
    asked: int = 0


@dataclass(slots=True)
class _Tally:
    """What came of the checks at one timescale."""

    judged: int = 0
    consistent: int = 0
    kinds: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Look:
    """What was seen at one moment: the newest invalidation of each key before, the source, and the answers after."""

    newest: dict[str, int]
    source: dict[str, str]
    answers: dict[str, tuple[Position | None, dict[str, Sequence[str | None]]]]
    asked: Answers


class Auditor:
    """Follows the log of a namespace, samples invalidations, and asks the replicas about each at every timescale.

    What proves a replica wrong: it has applied the newest invalidation of a key, and would serve a value that differs
    from the source, or from what other replicas serve that have applied it too. Until the next invalidation of that
    key is logged, this may only mean that the source has changed and its invalidation is under way. So it is asked
    again `settle_seconds` later, and only what has not changed by then, with no newer invalidation, is inconsistent.

    Shape:  `source` reads a key where replicas load it; without one, replicas are compared with each other. `on_found`
            is told of each inconsistency; it must not block, nor raise.
    Units:  `sample` is the share of invalidations that is chosen, above 0, at most 1. Times count from when the auditor
            has seen an invalidation, which is up to `poll_seconds` later than it was logged.
    Raises: InvalidSettings, InvalidNamespace.
    """

    def __init__(
        self,
        publisher: Publisher,
        namespace: str = DEFAULT_NAMESPACE,
        *,
        sample: float = 0.1,
        source: SourceLookup | None = None,
        on_found: Callable[[Inconsistency], None] | None = None,
        timescales_seconds: Sequence[float] = TIMESCALES_SECONDS,
        poll_seconds: float = 0.25,
        settle_seconds: float = 0.5,
        answer_seconds: float = 1.0,
        clock: Clock = monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        if not 0 < sample <= 1:
            raise InvalidSettings(f"expected sample to be above 0 and at most 1, got {sample!r}")
        if not timescales_seconds or list(timescales_seconds) != sorted({*timescales_seconds}):
            raise InvalidSettings(f"expected timescales_seconds that rise, got {timescales_seconds!r}")
        self._publisher = publisher
        self.namespace: Final = check_namespace(namespace)
        self._on_found = on_found
        self._sample = sample
        self._source = source
        self._timescales = tuple(timescales_seconds)
        self._poll_seconds = poll_seconds
        self._settle_seconds = settle_seconds
        self._answer_seconds = answer_seconds
        self._clock = clock
        self._sleep = sleep
        self._uniform = uniform
        self._head: Position | None = None
        self._has_begun = False
        self._reading = asyncio.Semaphore(READS_MAX)
        self._newest = _Newest()
        self._checks: list[_Check] = []
        self._tallies = [_Tally() for _ in self._timescales]
        self._counts: Counter[str] = Counter()
        self._findings: deque[Inconsistency] = deque(maxlen=_FINDINGS_MAX)

    def stats(self) -> AuditStats:
        """Return the counters."""
        within = (
            Within(seconds=seconds, judged=each.judged, consistent=each.consistent, inconsistencies=dict(each.kinds))
            for seconds, each in zip(self._timescales, self._tallies, strict=True)
        )
        counts = {name: self._counts[name] for name in COUNTS}
        return AuditStats(namespace=self.namespace, pending=len(self._checks), within=tuple(within), **counts)

    @property
    def findings(self) -> tuple[Inconsistency, ...]:
        """The newest hundred inconsistencies, the oldest first."""
        return tuple(self._findings)

    async def run(self, seconds: float | None = None) -> None:
        """Audit for so long, or for ever. A Redis that is away is counted and waited for.

        Raises: InvalidSettings when the publisher has no log, or is not open.
        """
        ends_at = None if seconds is None else self._clock() + seconds
        is_away = False
        while True:
            try:
                await self.step()
                is_away = False
            except InvalidSettings:
                raise
            except BroadcacheError as error:
                self._counts["failures"] += 1
                if not is_away:  # it is tried again all the time, and an outage is one piece of news
                    _log.warning("nothing is audited for now: %s", error)
                is_away = True
            if ends_at is not None and self._clock() >= ends_at:
                return
            await self._sleep(self._poll_seconds)

    async def step(self) -> None:
        """Read what is new in the log, and ask about what is due. Raises: LinkLost, LogRefused, InvalidSettings."""
        await self._follow()
        now = self._clock()
        due = [check for check in self._checks if now >= check.seen_at + self._timescales[check.asked]]
        for start in range(0, len(due), _BATCH_CHECKS):
            await self._judge(due[start : start + _BATCH_CHECKS])
        self._checks = [check for check in self._checks if check.asked < len(self._timescales)]

    # --- the log -----------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Take note of what has been logged since, and sample from it."""
        newest = await self._publisher.head(self.namespace)
        last = self._head
        if not self._has_begun or newest is None or (last is not None and newest.epoch != last.epoch):
            # Of another epoch nothing can be compared with what was before.
            self._head, self._has_begun = newest, True
            self._newest = _Newest()
            self._checks.clear()
            return
        after = last.sequence if last is not None else 0
        if newest.sequence <= after:
            return
        count = min(newest.sequence - after, _READ_ENTRIES_MAX)
        # Not what comes in meanwhile: as many would be left out at the other end.
        entries = await self._publisher.history(self.namespace, count=count, before=newest.sequence + 1)
        now = self._clock()
        for entry in reversed(entries):
            if entry.sequence <= after:
                continue
            if entry.sequence != after + 1:
                self._newest.record_everything(entry.sequence - 1)  # what was trimmed may have named anything
            after = entry.sequence
            self._take(entry.sequence, entry.invalidation, newest.epoch, now)
        self._head = Position(newest.epoch, after)
        self._newest.forget({check.key for check in self._checks})

    def _take(self, sequence: int, invalidation: Invalidation | None, epoch: str, now: float) -> None:
        self._counts["seen"] += 1
        position = Position(epoch, sequence)
        if invalidation is None or invalidation.position != position:
            self._newest.record_everything(sequence)
            return
        self._newest.record(sequence, invalidation)
        if self._uniform() >= self._sample:
            return
        if len(self._checks) >= _CHECKS_MAX:
            self._counts["left_out"] += 1
            return
        self._counts["sampled"] += 1
        keys = invalidation.keys
        key = keys[int(self._uniform() * len(keys)) % len(keys)] if keys else None
        self._checks.append(_Check(key, position, now))

    # --- the replicas ------------------------------------------------------------------------------------------------

    async def _judge(self, checks: Sequence[_Check]) -> None:
        """Ask about some invalidations, and again about those where it is not clear yet what an answer means."""
        suspected: dict[int, _Signature] = {}
        for number in range(_LOOKS_MAX):
            if number:
                await self._sleep(self._settle_seconds)
                await self._follow()
            keys = list(dict.fromkeys(check.key for check in checks if check.key is not None))
            look = await self._look(keys)
            source_after = await self._read_source(keys)
            await self._follow()
            unclear: list[_Check] = []
            for check in checks:
                if self._head is None or self._head.epoch != check.position.epoch:
                    check.asked = len(self._timescales)  # the log it was in is lost
                    continue
                found = list(self._found(check, look))
                if not found and (look.asked.doubt is not None or not look.answers):
                    # No replica answered, or one may not have been asked: this is not a clean result.
                    self._counts["unasked"] += 1
                    check.asked += 1
                    continue
                signature = _signature_of(found)
                is_settled = check.key is None or (
                    self._newest.of(check.key) == look.newest[check.key]
                    and source_after.get(check.key) == look.source.get(check.key)
                )
                if not signature or (is_settled and suspected.get(id(check)) == signature):
                    self._record(check, found)
                    continue
                suspected[id(check)] = signature if is_settled else frozenset()
                unclear.append(check)
            checks = unclear
            if not checks:
                return
        for check in checks:
            self._counts["undecided"] += 1
            check.asked += 1

    async def _look(self, keys: Sequence[str]) -> _Look:
        newest = {key: self._newest.of(key) for key in keys}
        source = await self._read_source(keys)
        questions = looking_up(keys) or [Question(id=new_id())]
        answers = await self._publisher.query(
            *questions, namespace=self.namespace, timeout_seconds=self._answer_seconds
        )
        by_replica = {
            # The place of the first answer: what was said later is not older.
            replica: (parts[0].position, dict(_fingerprints(questions, parts)))
            for replica, parts in answers.by_replica.items()
        }
        return _Look(newest, source, by_replica, answers)

    async def _read_source(self, keys: Sequence[str]) -> dict[str, str]:
        """Return the fingerprints of what the source says. What it does not say, or has none, is left out."""
        if self._source is None:
            return {}
        read = await asyncio.gather(*(self._read_one(self._source, key) for key in keys))
        return {key: said for key, said in zip(keys, read, strict=True) if said != NO_FINGERPRINT}

    async def _read_one(self, source: SourceLookup, key: str) -> str:
        async with self._reading:
            try:
                return fingerprint_of(await source(key))
            except LookupError:
                return fingerprint_of(None)
            except Exception as error:  # noqa: BLE001  (somebody else's code: it is compared without)
                self._counts["source_failures"] += 1
                _log.warning("expected the source to say what %r is, got: %s", key, error)
                return NO_FINGERPRINT

    # --- the verdict -------------------------------------------------------------------------------------------------

    def _found(self, check: _Check, look: _Look) -> Iterator[Inconsistency]:
        """Yield who was not consistent with an invalidation."""
        within_seconds = self._timescales[check.asked]
        for replica in look.asked.missing:
            yield Inconsistency(
                replica=replica, kind="missing", key=check.key, position=check.position, within_seconds=within_seconds
            )
        for replica, (position, _) in look.answers.items():
            if not _reaches(position, check.position):
                yield Inconsistency(
                    replica=replica,
                    kind="behind",
                    key=check.key,
                    position=check.position,
                    replica_position=position,
                    within_seconds=within_seconds,
                )
        if check.key is not None:
            yield from self._differing(check, check.key, look)

    def _differing(self, check: _Check, key: str, look: _Look) -> Iterator[Inconsistency]:
        """Yield who serves another value than the source, or most of those who have applied all that names the key."""
        up_to_date = Position(check.position.epoch, max(look.newest[key], check.position.sequence))
        served = {
            (replica, place): fingerprint
            for replica, (position, fingerprints) in look.answers.items()
            if _reaches(position, up_to_date)
            for place, fingerprint in enumerate(fingerprints.get(key, ()))
            if fingerprint
        }
        against_source = look.source.get(key)
        for place in {place for _, place in served}:
            of_place = {replica: print_ for (replica, where), print_ in served.items() if where == place}
            expected = against_source or _of_most(list(of_place.values()))
            for replica, fingerprint in of_place.items():
                if fingerprint != expected:
                    yield Inconsistency(
                        replica=replica,
                        kind="differs",
                        key=key,
                        position=check.position,
                        replica_position=look.answers[replica][0],
                        within_seconds=self._timescales[check.asked],
                        fingerprint=fingerprint,
                        expected=expected,
                        against="source" if against_source else "replicas",
                    )

    def _record(self, check: _Check, found: Sequence[Inconsistency]) -> None:
        tally = self._tallies[check.asked]
        tally.judged += 1
        tally.consistent += not found
        tally.kinds.update(each.kind for each in found)
        self._findings.extend(found)
        if self._on_found is not None:
            for each in found:
                self._on_found(each)
        check.asked += 1


class _Newest:
    """The newest invalidation that may have named a key, by its sequence. What is forgotten counts for every key."""

    def __init__(self) -> None:
        self._keys: dict[str, int] = {}
        self._prefixes: dict[str, int] = {}
        self._all = 0

    def of(self, key: str) -> int:
        prefixed = (sequence for prefix, sequence in self._prefixes.items() if key.startswith(prefix))
        return max(self._all, self._keys.get(key, 0), *prefixed)

    def record(self, sequence: int, invalidation: Invalidation) -> None:
        self._keys.update(dict.fromkeys(invalidation.keys, sequence))
        self._prefixes.update(dict.fromkeys(invalidation.prefixes, sequence))
        # Nobody here knows which tags an entry has.
        if invalidation.everything or invalidation.tags:
            self.record_everything(sequence)

    def record_everything(self, sequence: int) -> None:
        self._all = sequence
        self._prefixes.clear()

    def forget(self, but: Container[str | None]) -> None:
        """Forget the keys that nobody asks about, and the prefixes, once they have become many."""
        if len(self._keys) > _NAMES_MAX:
            self._keys = {key: sequence for key, sequence in self._keys.items() if key in but}
        if len(self._prefixes) > _PREFIXES_MAX:
            self.record_everything(max(self._prefixes.values()))


def _fingerprints(
    questions: Sequence[Question], answers: Sequence[ReplicaAnswer]
) -> Iterator[tuple[str, Sequence[str | None]]]:
    for question, answer in zip(questions, answers, strict=True):
        yield from zip(question.entries, answer.fingerprints, strict=False)


def _reaches(theirs: Position | None, wanted: Position) -> bool:
    return theirs is not None and theirs.reaches(wanted)


def _of_most(fingerprints: Sequence[str]) -> str | None:
    """Return what most serve; None when there is no such majority."""
    [(first, count), *others] = Counter(fingerprints).most_common(2)
    return None if others and others[0][1] == count else first


def _signature_of(found: Sequence[Inconsistency]) -> _Signature:
    """What has to be the same a little later, for answers that differ to prove something."""
    return frozenset((each.replica, each.fingerprint, each.expected) for each in found if each.kind == "differs")
