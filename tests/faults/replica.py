"""`python -m tests.faults.replica SETTINGS`: one replica, ours or naive, that reads and judges itself."""

import asyncio
import contextlib
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final, Protocol

import msgspec
from cachetools import TTLCache
from tests.faults.child_side import answer
from tests.faults.ledger import KEYS, NAMESPACE, Ledger, change_id_of, key_of, tag_of
from tests.faults.messages import BrokenRead, Command, ReplicaSettings, Report
from tests.faults.naive import listening
from tests.faults.raising import MappingBroke, RaisingTTLCache

from broadcache.shared.invalidation import Keys
from broadcache.shared.transport.redis.names import names_of
from broadcache.subscriber import LocalCache, Subscriber

TTL_SECONDS: Final = 3_600
# Between two rounds the event loop looks at its sockets; the pause leaves some of the machine to the other processes.
PAUSE_SECONDS: Final = 0.002
LOADS_MAX: Final = 32
BROKEN_KEPT_MAX: Final = 20
CONNECT_TIMEOUT_SECONDS: Final = 2.0


class Subject(Protocol):
    """The cache of a replica, as the reader sees it. `get` is the read that the promise is about."""

    def get(self, key: str, /) -> int | None: ...

    @property
    def is_coherent(self) -> bool: ...

    async def load(self, number: int, from_source: Callable[[], int], seconds: float) -> None: ...

    def post(self, body: bytes) -> None: ...

    async def invalidate(self, key: str) -> None: ...

    def counted(self) -> Report: ...


class Ours:
    """A LocalCache that a Subscriber keeps coherent."""

    def __init__(self, cache: LocalCache, subscriber: Subscriber) -> None:
        self.get: Callable[[str], int | None] = cache.get
        self._cache = cache
        self._subscriber = subscriber

    def post(self, body: bytes) -> None:
        self._subscriber.apply(body)

    async def invalidate(self, key: str) -> None:
        await self._subscriber.invalidate(Keys(key), namespace=NAMESPACE)

    @property
    def is_coherent(self) -> bool:
        return self._cache.is_coherent

    async def load(self, number: int, from_source: Callable[[], int], seconds: float) -> None:
        async def loader() -> int:
            version = from_source()
            await asyncio.sleep(seconds)
            return version

        await self._cache.get_or_load(key_of(number), loader, tags=(tag_of(number),))

    def counted(self) -> Report:
        subscriber, cache = self._subscriber.stats(), self._cache.stats()
        return Report(
            bypassed=cache.bypassed,
            replayed=subscriber.received.get("replayed", 0),
            gaps=subscriber.gaps,
            echoes=subscriber.echoes,
            subscriptions=subscriber.subscriptions,
            clears=cache.clears,
        )


class OursThatRaises(Ours):
    """The same over a mapping that raises at random. A read that raises has served nothing."""

    def __init__(self, cache: LocalCache, subscriber: Subscriber) -> None:
        super().__init__(cache, subscriber)
        get = self.get

        def get_or_nothing(key: str) -> int | None:
            try:
                return get(key)
            except MappingBroke:
                return None

        self.get = get_or_nothing

    async def load(self, number: int, from_source: Callable[[], int], seconds: float) -> None:
        with contextlib.suppress(MappingBroke):
            await super().load(number, from_source, seconds)

    def counted(self) -> Report:
        # What the subscriber has counted is the first cache's to report.
        return Report(bypassed=self._cache.stats().bypassed)


class Naive:
    """A TTLCache beside a PubSub. Its loads are stored whatever has happened since they began."""

    is_coherent = True  # it does not know better

    def __init__(self, cache: TTLCache[str, int]) -> None:
        self.get: Callable[[str], int | None] = cache.get
        self._cache = cache

    async def load(self, number: int, from_source: Callable[[], int], seconds: float) -> None:
        version = from_source()
        if seconds:
            await asyncio.sleep(seconds)
        self._cache[key_of(number)] = version

    def post(self, body: bytes) -> None:
        pass

    async def invalidate(self, key: str) -> None:
        pass

    def counted(self) -> Report:
        return Report()


class Reader:
    """Reads every key again and again, loads what is missing, and judges each read that was served."""

    def __init__(self, subject: Subject, ledger: Ledger, settings: ReplicaSettings) -> None:
        self._subject = subject
        self._ledger = ledger
        self._bound_seconds = settings.bound_seconds
        self._load_seconds_max = settings.load_seconds_max
        self._random = random.Random(settings.seed)
        self._keys = [(number, key_of(number)) for number in range(KEYS)]
        self._loads: dict[int, asyncio.Task[None]] = {}
        self._block_seconds = 0.0
        self._healed_at: float | None = None
        self._recovered_seconds = 0.0
        self._reads = self._checked = self._cached = self._broken = self._misconfirmed = 0
        self._longest_seconds = 0.0
        self._first_broken: list[BrokenRead] = []

    async def read_for_ever(self) -> None:
        while True:
            self.read_all()
            if self._healed_at is not None and self._subject.is_coherent:
                self._recovered_seconds = max(self._recovered_seconds, time.monotonic() - self._healed_at)
                self._healed_at = None
            await asyncio.sleep(PAUSE_SECONDS)

    def read_all(self) -> None:
        """Read every key once, without yielding to other tasks."""
        if self._block_seconds:
            # The task that blocks the loop also reads before any other task runs.
            time.sleep(self._block_seconds)
            self._block_seconds = 0.0
        monotonic, get, superseded_at = time.monotonic, self._subject.get, self._ledger.superseded_at
        served = 0
        for number, key in self._keys:
            at = monotonic()
            version = get(key)
            if version is None:
                self._load_soon(number)
                continue
            served += 1
            staleness_seconds = at - superseded_at[version]
            if staleness_seconds > 0:
                self._judge(number, version, at, staleness_seconds)
        self._reads += KEYS
        self._checked += served
        self._cached = served

    def _judge(self, number: int, version: int, at: float, staleness_seconds: float) -> None:
        self._longest_seconds = max(self._longest_seconds, staleness_seconds)
        if self._ledger.confirmed_at[version] < at:
            self._misconfirmed += 1
        if staleness_seconds <= self._bound_seconds:
            return
        self._broken += 1
        if len(self._first_broken) < BROKEN_KEPT_MAX:
            self._first_broken.append(
                BrokenRead(
                    at=at,
                    key=number,
                    served_version=version,
                    superseded_at=at - staleness_seconds,
                    source_version=self._ledger.source[number],
                    state=repr(self._subject.counted()),
                )
            )

    def _load_soon(self, number: int) -> None:
        if number in self._loads or len(self._loads) >= LOADS_MAX:
            return
        seconds = self._random.uniform(0, self._load_seconds_max)
        task = asyncio.create_task(self._subject.load(number, lambda: self._ledger.source[number], seconds))
        self._loads[number] = task
        task.add_done_callback(lambda _: self._loads.pop(number, None))

    async def handle(self, command: Command) -> Report:
        """Do what the stage says, and tell what was counted."""
        if command.do == "heal":
            self._healed_at = command.amount
        elif command.do == "block":
            self._block_seconds = command.amount
        elif command.do == "wall":
            _move_wall_clock(command.amount)
        elif command.do == "post":
            self._post(int(command.amount))
        elif command.do == "invalidate":
            for number in range(int(command.amount)):
                await self._subject.invalidate(f"own:{number}")
        return self.report()

    def _post(self, count: int) -> None:
        """Post what names a key, with the id that the next change of this key will have, and without a time."""
        for number in range(count):
            id, key = change_id_of(self._ledger.source[number]), key_of(number)
            self._subject.post(msgspec.json.encode({"v": 1, "id": id, "namespace": NAMESPACE, "keys": [key]}))

    def report(self) -> Report:
        """Return what was counted."""
        return msgspec.structs.replace(
            self._subject.counted(),
            reads=self._reads,
            checked=self._checked,
            cached=self._cached,
            misconfirmed=self._misconfirmed,
            broken=self._broken,
            longest_seconds=self._longest_seconds,
            first_broken=self._first_broken,
            is_coherent=self._subject.is_coherent and self._healed_at is None,
            recovered_seconds=self._recovered_seconds,
        )

    async def close(self) -> None:
        """End the loads that are under way."""
        loads = list(self._loads.values())
        for load in loads:
            load.cancel()
        await asyncio.gather(*loads, return_exceptions=True)


_wall_clock: Final = time.time


def _move_wall_clock(seconds: float) -> None:
    """Move this process's wall clock. The machine's clock is not changed."""
    time.time = lambda: _wall_clock() + seconds
    time.time_ns = lambda: int((_wall_clock() + seconds) * 1e9)


def _subjects(settings: ReplicaSettings) -> AbstractAsyncContextManager[Sequence[Subject]]:
    return _ours(settings) if settings.kind == "ours" else _naive(settings)


@asynccontextmanager
async def _ours(settings: ReplicaSettings) -> AsyncIterator[Sequence[Subject]]:
    bound_seconds = settings.bound_seconds
    is_one_server = settings.url.startswith("redis://")
    caches = [LocalCache(TTLCache(maxsize=2 * KEYS, ttl=TTL_SECONDS), max_staleness_seconds=bound_seconds)]
    if settings.has_raising_mapping:
        mapping = RaisingTTLCache(maxsize=2 * KEYS, ttl=TTL_SECONDS, chance=random.Random(settings.seed))
        # The first one to be told of an invalidation, so that the healthy one suffers if one stops the other.
        caches.insert(0, LocalCache(mapping, max_staleness_seconds=bound_seconds))
    subscriber = Subscriber(
        settings.url,
        caches={NAMESPACE: caches},
        echo_interval_seconds=bound_seconds * 0.15,
        echo_timeout_seconds=bound_seconds * 0.5,
        # To find the primary among several, one that is frozen has to be waited for.
        connect_timeout_seconds=bound_seconds * 0.5 if is_one_server else CONNECT_TIMEOUT_SECONDS,
        backoff_seconds_max=0.5,
    )
    async with subscriber:
        healthy = Ours(caches[-1], subscriber)
        yield [healthy, OursThatRaises(caches[0], subscriber)] if settings.has_raising_mapping else [healthy]


@asynccontextmanager
async def _naive(settings: ReplicaSettings) -> AsyncIterator[Sequence[Subject]]:
    cache: TTLCache[str, int] = TTLCache(maxsize=2 * KEYS, ttl=TTL_SECONDS)
    channel = names_of(NAMESPACE).channel
    clears = settings.kind == "clearing"
    async with listening(settings.url, channel, NAMESPACE, cache, clears_on_reconnect=clears):
        yield [Naive(cache)]


class Readers:
    """One reader for each cache of this replica, which reports as one."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self._readers = readers

    async def handle(self, command: Command) -> Report:
        first, *others = [await reader.handle(command) for reader in self._readers]
        for other in others:
            first = _sum(first, other)
        return first


def _sum(one: Report, other: Report) -> Report:
    """Both together. `cached` is of the first alone: a mapping that raises is never full."""
    return msgspec.structs.replace(
        one,
        reads=one.reads + other.reads,
        checked=one.checked + other.checked,
        broken=one.broken + other.broken,
        misconfirmed=one.misconfirmed + other.misconfirmed,
        longest_seconds=max(one.longest_seconds, other.longest_seconds),
        first_broken=one.first_broken + other.first_broken,
        is_coherent=one.is_coherent and other.is_coherent,
        recovered_seconds=max(one.recovered_seconds, other.recovered_seconds),
        bypassed=one.bypassed + other.bypassed,
    )


async def _main(settings: ReplicaSettings) -> None:
    ledger = Ledger(Path(settings.ledger_path))
    async with _subjects(settings) as subjects:
        readers = [Reader(subject, ledger, settings) for subject in subjects]
        tasks = [asyncio.create_task(reader.read_for_ever()) for reader in readers]
        tasks.append(asyncio.create_task(answer(Readers(readers).handle)))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks)
            for reader in readers:
                await reader.close()


if __name__ == "__main__":
    asyncio.run(_main(msgspec.json.decode(sys.argv[1], type=ReplicaSettings)))
