"""The auditor: samples invalidations, and finds the replicas that are not consistent with them."""

import asyncio
import logging
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from ...shared.clock import Clock, monotonic
from ...shared.errors import BroadcacheError, InvalidSettings
from ...shared.fingerprint import NO_FINGERPRINT, fingerprint_of
from ...shared.invalidation import DEFAULT_NAMESPACE, Invalidation, Position, check_namespace, new_id
from ...shared.question import Question, looking_up
from ..publishing.publisher import Publisher
from .newest import NewestInvalidations
from .source import READS_MAX, SourceLookup
from .stats import COUNTS, AuditStats, Inconsistency, Within
from .verdict import Observation, Signature, inconsistencies, served_entries, signature_of

__all__ = ["TIMESCALES_SECONDS", "Auditor"]

_log = logging.getLogger("broadcache.publisher")


TIMESCALES_SECONDS: Final = (1.0, 10.0, 60.0)
_BATCH_SAMPLES: Final = 500
_OBSERVATIONS_MAX: Final = 5
_SAMPLES_MAX: Final = 10_000
_FINDINGS_MAX: Final = 100
_READ_ENTRIES_MAX: Final = 5_000


@dataclass(slots=True)
class _Sample:
    """One sampled invalidation, and for how many timescales it has been checked."""

    key: str | None
    position: Position
    seen_at: float
    checked: int = 0


@dataclass(slots=True)
class _Tally:
    """The results of the samples at one timescale."""

    judged: int = 0
    consistent: int = 0
    kinds: Counter[str] = field(default_factory=Counter)


class Auditor:
    """Follows the log of a namespace, samples invalidations, and checks the replicas for each at every timescale.

    A replica is inconsistent if it has applied the newest invalidation of a key, and would serve a value that differs
    from the source, or from the value of other replicas that have applied it too. A difference may also mean that the
    source has just changed, and its invalidation is under way. So the replicas are queried again `settle_seconds`
    later: only a difference that is unchanged by then, with no newer invalidation of the key, is an inconsistency.

    Shape:  `source` reads a key where replicas load it; without one, replicas are compared with each other. `on_found`
            is called with each inconsistency; it must not block, nor raise.
    Units:  `sample` is the share of invalidations that is chosen, above 0, at most 1. Times count from when the auditor
            reads an invalidation, up to `poll_seconds` after it was logged.
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
            raise InvalidSettings(f"expected timescales_seconds in rising order, got {timescales_seconds!r}")
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
        self._newest = NewestInvalidations()
        self._samples: list[_Sample] = []
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
        return AuditStats(namespace=self.namespace, pending=len(self._samples), within=tuple(within), **counts)

    @property
    def findings(self) -> tuple[Inconsistency, ...]:
        """The newest hundred inconsistencies, the oldest first."""
        return tuple(self._findings)

    async def run(self, seconds: float | None = None) -> None:
        """Audit for this time, or for ever. While Redis is away, failures are counted and the audit keeps trying.

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
                if not is_away:  # logged once for each outage, not for each attempt
                    _log.warning("the audit of %s is interrupted: %s", self.namespace, error)
                is_away = True
            if ends_at is not None and self._clock() >= ends_at:
                return
            await self._sleep(self._poll_seconds)

    async def step(self) -> None:
        """Read new entries of the log, and check the samples that are due.

        Raises: LinkLost, LogRefused, InvalidSettings.
        """
        await self._follow()
        now = self._clock()
        due = [sample for sample in self._samples if now >= sample.seen_at + self._timescales[sample.checked]]
        for start in range(0, len(due), _BATCH_SAMPLES):
            await self._judge(due[start : start + _BATCH_SAMPLES])
        self._samples = [sample for sample in self._samples if sample.checked < len(self._timescales)]

    # --- the log -----------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Read the entries logged since the last time, and sample from them."""
        newest = await self._publisher.head(self.namespace)
        last = self._head
        if not self._has_begun or newest is None or (last is not None and newest.epoch != last.epoch):
            # Positions of another epoch cannot be compared with earlier ones.
            self._head, self._has_begun = newest, True
            self._newest = NewestInvalidations()
            self._samples.clear()
            return
        after = last.sequence if last is not None else 0
        if newest.sequence <= after:
            return
        count = min(newest.sequence - after, _READ_ENTRIES_MAX)
        # Without the entries that arrive meanwhile: as many would be cut off at the other end.
        entries = await self._publisher.history(self.namespace, count=count, before=newest.sequence + 1)
        now = self._clock()
        for entry in reversed(entries):
            if entry.sequence <= after:
                continue
            if entry.sequence != after + 1:
                self._newest.record_everything(entry.sequence - 1)  # trimmed entries may have named any key
            after = entry.sequence
            self._record(entry.sequence, entry.invalidation, newest.epoch, now)
        self._head = Position(newest.epoch, after)
        self._newest.trim({sample.key for sample in self._samples})

    def _record(self, sequence: int, invalidation: Invalidation | None, epoch: str, now: float) -> None:
        self._counts["seen"] += 1
        position = Position(epoch, sequence)
        if invalidation is None or invalidation.position != position:
            self._newest.record_everything(sequence)
            return
        self._newest.record(sequence, invalidation)
        if self._uniform() >= self._sample:
            return
        if len(self._samples) >= _SAMPLES_MAX:
            self._counts["left_out"] += 1
            return
        self._counts["sampled"] += 1
        keys = invalidation.keys
        key = keys[int(self._uniform() * len(keys)) % len(keys)] if keys else None
        self._samples.append(_Sample(key, position, now))

    # --- the replicas ------------------------------------------------------------------------------------------------

    async def _judge(self, samples: Sequence[_Sample]) -> None:
        """Query the replicas about these samples; repeat for those whose answers are still ambiguous."""
        suspected: dict[int, Signature] = {}
        for number in range(_OBSERVATIONS_MAX):
            if number:
                await self._sleep(self._settle_seconds)
                await self._follow()
            keys = list(dict.fromkeys(sample.key for sample in samples if sample.key is not None))
            observation = await self._observe(keys)
            source_after = await self._read_source(keys)
            await self._follow()
            ambiguous: list[_Sample] = []
            for sample in samples:
                if self._head is None or self._head.epoch != sample.position.epoch:
                    sample.checked = len(self._timescales)  # its log is lost
                    continue
                within_seconds = self._timescales[sample.checked]
                found = list(inconsistencies(observation, sample.key, sample.position, within_seconds))
                if not found and not observation.is_conclusive:  # no replica answered, or one may not have been queried
                    self._counts["unasked"] += 1
                    sample.checked += 1
                    continue
                signature = signature_of(found)
                is_settled = sample.key is None or (
                    self._newest.of(sample.key) == observation.newest[sample.key]
                    and source_after.get(sample.key) == observation.source.get(sample.key)
                )
                if not signature or (is_settled and suspected.get(id(sample)) == signature):
                    self._conclude(sample, found)
                    continue
                suspected[id(sample)] = signature if is_settled else frozenset()
                ambiguous.append(sample)
            samples = ambiguous
            if not samples:
                return
        for sample in samples:
            self._counts["undecided"] += 1
            sample.checked += 1

    async def _observe(self, keys: Sequence[str]) -> Observation:
        newest = {key: self._newest.of(key) for key in keys}
        source = await self._read_source(keys)
        questions = looking_up(keys) or [Question(id=new_id())]
        answers = await self._publisher.query(
            *questions, namespace=self.namespace, timeout_seconds=self._answer_seconds
        )
        replicas = {replica: served_entries(questions, each) for replica, each in answers.by_replica.items()}
        return Observation(newest, source, replicas, answers.missing, answers.doubt)

    async def _read_source(self, keys: Sequence[str]) -> dict[str, str]:
        """Return the fingerprints of the source's values, without keys that cannot be read or have no fingerprint."""
        if self._source is None:
            return {}
        read = await asyncio.gather(*(self._read_one(self._source, key) for key in keys))
        return {key: each for key, each in zip(keys, read, strict=True) if each != NO_FINGERPRINT}

    async def _read_one(self, source: SourceLookup, key: str) -> str:
        async with self._reading:
            try:
                return fingerprint_of(await source(key))
            except LookupError:
                return fingerprint_of(None)
            except Exception as error:  # noqa: BLE001  (user code: replicas are then compared with each other)
                self._counts["source_failures"] += 1
                _log.warning("cannot read %r from the source: %s", key, error)
                return NO_FINGERPRINT

    def _conclude(self, sample: _Sample, found: Sequence[Inconsistency]) -> None:
        tally = self._tallies[sample.checked]
        tally.judged += 1
        tally.consistent += not found
        tally.kinds.update(each.kind for each in found)
        self._findings.extend(found)
        if self._on_found is not None:
            for each in found:
                self._on_found(each)
        sample.checked += 1
