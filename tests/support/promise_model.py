"""The promise as a model: one replica, real but for its network, under a schedule, watched by an oracle.

The replica is the real `Subscriber` with its `Follower`, `Sequencer`s and `LocalCache`s. Its network is in memory, its
clock and its event loop stand still between two operations: a schedule is nothing but a list of operations with a
number each, so that it can be drawn from a seed, run again, and made smaller.

Each namespace has two caches: one of a plain dict, and one of a mapping that raises where the schedule wants it to.

The oracle knows the source, and when which invalidation was accepted. After each operation it reads every key.

What the protocol assumes, and the schedules therefore leave out:

- A link that loses a single message is lost as a whole. The numbers find such a loss all the same (`drop`), but not
  when other messages with numbers of the log can take the lost one's place: `drop` meets no forger, no second primary.
- There is one primary that answers its clients. A second one, frozen and thawed, has lost its clients; it carries out
  the commands that they had sent, and its messages reach the clients of the first.
- A server that hides its identity is not demoted and promoted again within one link: nothing tells of it. One that
  shows its identity is.
"""

import asyncio
import contextlib
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias
from unittest import mock

import msgspec
from tests.support.fake_clock import FakeClock
from tests.support.promise_model_loop import ScheduledLoop
from tests.support.promise_model_mapping import MappingBroken, RaisingMapping
from tests.support.promise_model_server import Accepted, ModelLink, Network, Push

from broadcache.shared import (
    Everything,
    Invalidation,
    Keys,
    LinkLost,
    LogRefused,
    MalformedFrame,
    Position,
    Prefixes,
    Tags,
    Target,
    wire,
)
from broadcache.shared.invalidation import invalidation_of
from broadcache.shared.transport.redis.names import names_of
from broadcache.shared.wire import decode, encode, encode_tails, encode_unsequenced, parts_of
from broadcache.subscriber import Loaded, LoadToken, LocalCache, Subscriber
from broadcache.subscriber.following import follower as follower_module
from broadcache.subscriber.following import log_reader
from broadcache.subscriber.following.sequencer import Sequencer

MAX_STALENESS_SECONDS = 3.0
NAMESPACES = ("products", "orders")
TAGS_OF_KEY: dict[str, tuple[str, ...]] = {"a:1": ("red",), "a:2": ("red", "blue"), "b:1": ()}
TARGETS: tuple[Target, ...] = (
    *[Keys(key) for key in TAGS_OF_KEY] * 3,
    Keys("a:1", "b:1"),
    Tags("red"),
    Tags("blue"),
    Prefixes("a:"),
    Everything(),
)
REPLICA_ID = "replica"
# So small that a few keys with long names are split.
FRAME_BYTES_MAX = 700
PADDING = tuple(f"{'p' * 180}{number}" for number in range(6))

Operation: TypeAlias = tuple[str, int]
Schedule: TypeAlias = list[Operation]


class PromiseBroken(AssertionError):
    """A schedule after which a replica did not keep its word."""


# --- the oracle ------------------------------------------------------------------------------------------------------


def keys_of(target: Target) -> list[str]:
    match target:
        case Keys(names):
            return [key for key in TAGS_OF_KEY if key in names]
        case Tags(names):
            return [key for key, tags in TAGS_OF_KEY.items() if set(tags) & set(names)]
        case Prefixes(names):
            return [key for key in TAGS_OF_KEY if key.startswith(names)]
        case Everything():
            return list(TAGS_OF_KEY)


class Oracle:
    """The source of one namespace: the version of each key, and since when older ones are void."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.versions = dict.fromkeys(TAGS_OF_KEY, 0)
        # What may not be served any more: versions below these, as of now, and as of the times when they were accepted.
        self.oldest = dict.fromkeys(TAGS_OF_KEY, 0)
        self._accepted: dict[str, list[tuple[float, int]]] = {key: [] for key in TAGS_OF_KEY}

    def write(self, target: Target) -> dict[str, int]:
        for key in keys_of(target):
            self.versions[key] += 1
        return {key: self.versions[key] for key in keys_of(target)}

    def accept(self, versions: dict[str, int]) -> None:
        for key, version in versions.items():
            self._accepted[key].append((self._clock.now, version))

    def void_now(self, versions: dict[str, int]) -> None:
        for key, version in versions.items():
            self.oldest[key] = max(self.oldest[key], version)

    def oldest_now(self, key: str) -> int:
        """The version that a read which begins now may return at the oldest."""
        self.check(key, self.versions[key])
        return self.oldest[key]

    def check(self, key: str, version: int, *, max_staleness_seconds: float = MAX_STALENESS_SECONDS) -> None:
        accepted = self._accepted[key]
        while accepted and accepted[0][0] <= self._clock.now - max_staleness_seconds:
            _, void = accepted.pop(0)
            self.oldest[key] = max(self.oldest[key], void)
        if version < self.oldest[key]:
            raise PromiseBroken(
                f"expected version {self.oldest[key]} of {key} or a newer one at {self._clock.now:g}, got {version}"
            )


Targets: TypeAlias = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], bool]


def targets_of(invalidation: Invalidation) -> Targets:
    return invalidation.keys, invalidation.tags, invalidation.prefixes, invalidation.everything


class WatchedCache(LocalCache):
    """Writes down what it is told: when which invalidation came last, and when it was cleared."""

    def __init__(self, mapping: dict[str, Any], clock: FakeClock, count: Callable[[], int]) -> None:
        super().__init__(mapping, clock=clock, max_staleness_seconds=MAX_STALENESS_SECONDS)
        self.applied_at: dict[tuple[str, Targets], int] = {}
        self.cleared_at = 0
        self.reasons: list[str] = []
        self._count = count

    def apply_invalidation(self, invalidation: Invalidation, *, reason: str = "invalidation") -> None:
        self.applied_at[invalidation.id, targets_of(invalidation)] = self._count()
        if invalidation.everything:
            self.cleared_at = self._count()
        super().apply_invalidation(invalidation, reason=reason)

    def apply(self, target: Target, *, reason: str = "invalidation") -> None:
        assert target == Everything()
        self.reasons.append(reason)
        super().apply(target, reason=reason)


# --- the run ---------------------------------------------------------------------------------------------------------


class OwnErrors(logging.Handler):
    """Notes what the replica reports as a mistake of its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if RaisingMapping.__qualname__ in record.getMessage():
            return  # what a user's mapping raises is no mistake of the replica's
        self.texts.append(f"{record.getMessage()}: {record.exc_info and record.exc_info[1]!r}")


class Load(NamedTuple):
    namespace: str
    key: str
    tokens: list[LoadToken]
    version: int


class Logged(NamedTuple):
    """An invalidation, or a part of one, that the log has accepted, and when."""

    at: int
    namespace: str
    invalidation: Invalidation


class Replica:
    """One replica and its world. Each operation is a method with a number, which it takes its choices from."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.loop = ScheduledLoop(self.clock)
        self.oracles = {namespace: Oracle(self.clock) for namespace in NAMESPACES}
        self.count = itertools.count(1).__next__
        self.logged: list[Logged] = []
        # What was published, with the versions that it made void.
        self.published: list[tuple[Invalidation, dict[str, int]]] = []
        # What has been posted under the id that a later publish will have.
        self.foretold: dict[str, tuple[Invalidation, Target]] = {}
        # How many hits were served after the first operation of each kind.
        self.hits_after: Counter[str] = Counter()
        self.network = Network(NAMESPACES, self._note_accepted, self.clock)
        self._patches = contextlib.ExitStack()
        for module, name, value in (
            (follower_module, "Link", self.network),
            # Pages of few entries, so that a replay has several.
            (log_reader, "_PAGE_ENTRIES_FIRST", 2),
            (log_reader, "_PAGE_ENTRIES_MAX", 5),
            (wire, "FRAME_BYTES_MAX", FRAME_BYTES_MAX),
        ):
            self._patches.enter_context(mock.patch.object(module, name, value))
        self.own_errors = OwnErrors()
        logging.getLogger("broadcache").addHandler(self.own_errors)
        self.loads: list[Load] = []
        self.own: list[asyncio.Task[Any]] = []
        self.reading: list[asyncio.Task[None]] = []
        self.gates: list[asyncio.Future[None]] = []
        self.broken: list[str] = []
        self.own_parts: dict[str, list[Invalidation]] = {namespace: [] for namespace in NAMESPACES}
        self.names = itertools.count(1)
        # Whether everything that was missed can be learned from the log, so that nothing has to be cleared.
        self.is_log_intact = True
        for namespace in NAMESPACES:
            self.publish_to(namespace, Everything())
        self.mappings = {namespace: RaisingMapping() for namespace in NAMESPACES}
        self.caches = {
            namespace: [
                # The one that raises comes first: the other one has to be told all the same.
                WatchedCache(self.mappings[namespace], self.clock, self.count),
                WatchedCache({}, self.clock, self.count),
            ]
            for namespace in NAMESPACES
        }
        self.subscriber = Subscriber(
            "redis://127.0.0.1:1",
            caches=self.caches,
            replica_id=REPLICA_ID,
            echo_interval_seconds=1.0,
            echo_timeout_seconds=2.0,
            backoff_seconds_max=1.0,
            clock=self.clock,
            uniform=lambda: 0.5,
        )
        for namespace, sequencer in self.subscriber.sequencers.items():
            self._note_own_parts(namespace, sequencer)
        self.entering = self.loop.create_task(self.subscriber.__aenter__())
        self.exchange(15)
        assert self.subscriber.state == "coherent"
        self.fill_all()

    def _note_accepted(self, accepted: Accepted) -> None:
        invalidation = decode(accepted.frame, accepted.namespace)
        self.logged.append(Logged(self.count(), accepted.namespace, invalidation))

    def close(self) -> None:
        closing = self.loop.create_task(self.subscriber.close())
        for task in (*self.own, *self.reading):
            task.cancel()
        self.loop.turn()
        # No server answers any more: it stops trying to deregister.
        self.clock.now += 1.0
        self.loop.turn()
        self._patches.close()
        logging.getLogger("broadcache").removeHandler(self.own_errors)
        assert closing.done()
        self.loop.close()

    def run(self, schedule: Schedule) -> None:
        """Carry out a schedule, then let the faults end. Raises: PromiseBroken."""
        try:
            kinds: set[str] = set()
            for name, number in schedule:
                getattr(self, name)(number)
                kinds.add(name)
                self.hits_after.update(dict.fromkeys(kinds, self.check_reads()))
            self.heal()
            self.check_healed()
            self.check_served()
        finally:
            self.close()
        # A future that no task awaits any more is no error.
        errors = [error for error in self.loop.errors if "never retrieved" not in error] + self.own_errors.texts
        if errors:
            raise PromiseBroken(f"expected no error of our own, got {errors}")

    # --- what time does ----------------------------------------------------------------------------------------------

    def tick(self, number: int) -> None:
        """Time passes, and the event loop sees it."""
        self.stall(number)
        self.loop.turn()

    def stall(self, number: int) -> None:
        """Time passes while the event loop is stalled."""
        self.clock.now += (0.25, 0.25, 0.5, 1.0, 1.0, 2.5, 5.0)[number % 7]

    def turn(self, number: int) -> None:
        self.loop.turn()

    def turn_a_little(self, number: int) -> None:
        self.loop.turn(callbacks_max=1 + number % 3)

    def exchange(self, number: int) -> None:
        """Everything on its way arrives, and the replica answers, a few times."""
        for _ in range(1 + number % 16):
            self.loop.turn()
            if (link := self.network.link) is None:
                return
            if self.network.bytes_per_second is not None:
                self.clock.now += 0.1
            while link.serve():
                pass
            while link.deliver():
                pass
            self.loop.turn()

    def recover(self, number: int) -> None:
        """Time passes as it does between faults, until the replica is coherent or for some seconds, and it is used."""
        for _ in range(8 + number % 8):
            if self.subscriber.state == "coherent":
                break
            self.tick(0)
            self.exchange(3)
            self.check_reads()
        if number % 3:
            self.fill_all()

    def step(self, number: int) -> None:
        """The server answers one request, and its answer arrives together with what is published right after it."""
        self.loop.turn()
        if link := self.network.link:
            link.serve()
            if number % 3 == 0:
                self.publish(number // 3)
            while link.deliver():
                pass
            self.loop.turn()

    def answer_late(self, number: int) -> None:
        """What was asked is answered, and the answer takes a while: what is accepted meanwhile comes behind it."""
        self.loop.turn()
        if link := self.network.link:
            while link.serve():
                pass
            answers = len(link.incoming)
            self.publish(number)
            self.clock.now += (0.5, 1.0, 1.5)[number % 3]
            for _ in range(answers):
                link.deliver()
            self.loop.turn()

    def serve(self, number: int) -> None:
        if link := self.network.link:
            link.serve()

    def deliver(self, number: int) -> None:
        """Some of what is on its way arrives; the event loop has not run in between."""
        if link := self.network.link:
            for _ in range(1 + number % 3):
                link.deliver()

    def stray(self, number: int) -> None:
        """A server carries out what a lost link had still sent it."""
        strays = self.network.strays
        for _ in range(len(strays)):
            server, command = strays.popleft()
            if server.is_frozen:
                strays.append((server, command))
            elif server in self.network.servers:
                command()
                return

    # --- what the service does ---------------------------------------------------------------------------------------

    def _namespace(self, number: int) -> str:
        return NAMESPACES[0] if number % 4 else NAMESPACES[1]

    def _key(self, number: int) -> str:
        return list(TAGS_OF_KEY)[number // 4 % len(TAGS_OF_KEY)]

    def begin(self, number: int) -> None:
        namespace, key = self._namespace(number), self._key(number)
        tokens = [cache.begin_load(key) for cache in self.caches[namespace]]
        self.loads.append(Load(namespace, key, tokens, self.oracles[namespace].versions[key]))

    def store(self, number: int) -> None:
        if self.loads:
            load = self.loads.pop(number % len(self.loads))
            for cache, token in zip(self.caches[load.namespace], load.tokens, strict=True):
                with contextlib.suppress(MappingBroken):
                    cache.store(token, load.version, tags=TAGS_OF_KEY[load.key])

    def fill(self, number: int) -> None:
        self.begin(number)
        self.store(-1)

    def fill_all(self) -> None:
        for number in range(4 * len(TAGS_OF_KEY)):
            self.fill(number)

    def load(self, number: int) -> None:
        """Callers load a key, or all keys, with a loader that reads the source now and returns the tags later."""
        namespace = self._namespace(number)
        keys = [self._key(number)] if number % 3 else list(TAGS_OF_KEY)
        for cache in self.caches[namespace]:
            self.reading.append(self.loop.create_task(self._load(self.oracles[namespace], cache, keys)))
        self.loop.turn()

    def answer_load(self, number: int) -> None:
        """The source answers one of the loaders, or all of them."""
        for _ in range(len(self.gates) if number % 2 else min(1, len(self.gates))):
            gate = self.gates.pop(number % len(self.gates))
            if not gate.done():
                gate.set_result(None)
        self.loop.turn()

    async def _load(self, oracle: Oracle, cache: LocalCache, keys: list[str]) -> None:
        async def rows(missing: list[str]) -> dict[str, Loaded[int]]:
            versions = {key: oracle.versions[key] for key in missing}
            gate = self.loop.create_future()
            self.gates.append(gate)
            await gate
            return {key: Loaded(version, tags=TAGS_OF_KEY[key]) for key, version in versions.items()}

        async def row() -> Loaded[int]:
            return (await rows(keys))[keys[0]]

        oldest = {key: oracle.oldest_now(key) for key in keys}
        with contextlib.suppress(MappingBroken):
            if len(keys) > 1:
                found: dict[str, int] = await cache.get_or_load_many(keys, rows)
            else:
                found = {keys[0]: await cache.get_or_load(keys[0], row)}
            self.broken += [
                f"expected version {oldest[key]} of {key} or a newer one for a caller, got {version}"
                for key, version in found.items()
                if version < oldest[key]
            ]

    def check_reads(self) -> int:
        """Read every key of every cache; return how many reads were served. Raises: PromiseBroken."""
        if self.broken:
            raise PromiseBroken(self.broken[0])
        hits = 0
        for namespace, caches in self.caches.items():
            for cache, key in itertools.product(caches, TAGS_OF_KEY):
                try:
                    version = cache.get(key)
                except MappingBroken:
                    continue
                if version is None:
                    continue
                hits += 1
                self.oracles[namespace].check(key, version)
                if self.subscriber.state != "coherent":
                    raise PromiseBroken(f"expected {key} to be bypassed without a link, got version {version}")
        return hits

    # --- what is published -------------------------------------------------------------------------------------------

    def publish_to(self, namespace: str, target: Target, **settings: Any) -> None:
        oracle = self.oracles[namespace]
        foretold, foretold_target = self.foretold.pop(namespace, (None, target))
        versions = oracle.write(foretold_target)
        invalidation = foretold or invalidation_of([target], namespace=namespace, **settings)
        self._append(invalidation, versions)

    def _append(self, invalidation: Invalidation, versions: dict[str, int]) -> None:
        namespace = invalidation.namespace
        self.published.append((invalidation, versions))
        self.network.append(namespace, _receipt_of(invalidation), encode_tails(invalidation))
        self.oracles[namespace].accept(versions)

    def _target(self, number: int) -> Target:
        return TARGETS[number // 4 % len(TARGETS)]

    def publish(self, number: int) -> None:
        self.publish_to(self._namespace(number), self._target(number))

    def publish_many(self, number: int) -> None:
        for place in range(number % 5):
            self.publish(number + 4 * place)

    def publish_large(self, number: int) -> None:
        """An invalidation that is split into several messages, of which each names other keys."""
        first, second = (("a:1", "b:1"), ("b:1", "a:2"), ("a:2", "a:1"))[number // 4 % 3]
        self.publish_to(self._namespace(number), Keys(first, *PADDING[: 3 + number // 12 % 4], second))

    def publish_older(self, number: int) -> None:
        """A publisher of an older version, which keeps no digest with the head.

        Where a message of it is missed, its digest may not be learned, and the next subscription drops everything.
        """
        self.is_log_intact = False
        namespace, target = self._namespace(number), self._target(number)
        versions = self.oracles[namespace].write(target)
        self.network.append_without_digest(namespace, encode_tails(invalidation_of([target], namespace=namespace)))
        self.oracles[namespace].accept(versions)

    def publish_with_own_id(self, number: int) -> None:
        """Another publisher publishes with an id of the replica's own, or one that begins with it."""
        namespace, target = self._namespace(number), self._target(number)
        if own := self._own_parts(namespace):
            part = own[number % len(own)]
            id = part.id + ("", ".1", ".evil")[number % 3]
            if number // 3 % 2:
                target = _target_of(part)
            self._append(
                invalidation_of([target], namespace=namespace, id=id, source=f"another-{next(self.names)}"),
                self.oracles[namespace].write(target),
            )

    def _note_own_parts(self, namespace: str, sequencer: Sequencer) -> None:
        apply_own = sequencer.apply_own

        def apply_and_note(invalidation: Invalidation) -> None:
            self.own_parts[namespace] += parts_of(invalidation)
            apply_own(invalidation)

        sequencer.apply_own = apply_and_note  # type: ignore[method-assign]

    def _own_parts(self, namespace: str) -> list[Invalidation]:
        """What the replica is publishing, or has published."""
        return self.own_parts[namespace]

    def post(self, number: int) -> None:
        """What was published lately comes over HTTP too, before or after it comes over Redis."""
        self._post(*self.published[-1 - number % min(5, len(self.published))])

    def post_first(self, number: int) -> None:
        """The log cannot take an invalidation: it is posted, and logged later, or never."""
        namespace, target = self._namespace(number), self._target(number)
        invalidation = invalidation_of([target], namespace=namespace)
        versions = self.oracles[namespace].write(target)
        self._post(invalidation, versions)
        if number % 3:
            self.network.append(namespace, _receipt_of(invalidation), encode_tails(invalidation))

    def post_in_advance(self, number: int) -> None:
        """A client posts an invalidation with the id, and all that it likes of the rest, that a later publish has."""
        namespace, target = self._namespace(number), self._target(number)
        later = self.foretold.get(namespace, (invalidation_of([target], namespace=namespace), target))
        self.foretold[namespace] = later
        posted = later[0]
        if number % 3 == 0:
            posted = msgspec.structs.replace(posted, sent_at_ms=None)
        if number % 5 == 0:
            posted = msgspec.structs.replace(posted, keys=("x",), tags=(), prefixes=(), everything=False)
        self._post(posted, {})

    def _post(self, invalidation: Invalidation, versions: dict[str, int]) -> None:
        for body in encode_unsequenced(invalidation):
            applied = self.subscriber.apply(body)
            if (applied.outcome, applied.namespace) != ("applied", invalidation.namespace):
                raise PromiseBroken(f"expected {invalidation} to be applied, got {applied}")
        # Whatever the link does: nothing older may be served any more.
        self.oracles[invalidation.namespace].void_now(versions)

    def publish_own(self, number: int) -> None:
        """The replica itself invalidates: it forgets at once, and for good."""
        namespace, target = self._namespace(number), self._target(number)
        if number // 4 % 5 == 0:
            target = Keys("a:1", *PADDING[:4], "b:1")
        oracle = self.oracles[namespace]
        versions = oracle.write(target)

        async def invalidate() -> None:
            with contextlib.suppress(LinkLost, LogRefused):
                await self.subscriber.invalidate(target, namespace=namespace, timeout_seconds=5)

        self.own.append(self.loop.create_task(invalidate()))
        self.loop.turn()
        oracle.void_now(versions)

    def publish_unsequenced(self, number: int) -> None:
        """A foreign publisher, past the log: promised to no reader, and it must not disturb the others."""
        namespace, target = self._namespace(number), self._target(number)
        foreign = invalidation_of([target], namespace=namespace, id=f"foreign-{number}")
        self.network.publish(namespace, encode(foreign))

    def publish_garbage(self, number: int) -> None:
        self.is_log_intact = False
        self.network.publish(self._namespace(number), b"now")

    # --- the forger, which may publish on the channel, and write nothing ---------------------------------------------

    def forge(self, number: int) -> None:
        """A position out of thin air: too low, or of no epoch that ever was."""
        namespace = self._namespace(number)
        applied = self.subscriber.position(namespace) or Position("X0", 0)
        forged = (
            Position(f"X{next(self.names)}", 1 + number % 3),
            Position(f"X{next(self.names)}", applied.sequence + number % 3),
            Position(applied.epoch, max(0, applied.sequence - number % 3)),
            Position("", number % 3),
        )[number // 4 % 4]
        self._publish_forged(namespace, forged)

    def forge_next(self, number: int) -> None:
        """The very next positions after the one that the replica is at."""
        namespace = self._namespace(number)
        if applied := self.subscriber.position(namespace):
            for place in range(1 + number // 4 % 3):
                self._publish_forged(namespace, Position(applied.epoch, applied.sequence + 1 + place))

    def forge_ahead(self, number: int) -> None:
        """Positions after the head of the log, near and far."""
        namespace = self._namespace(number)
        if head := self.network.primary.logs[namespace].head:
            ahead = (0, 1, 2, 3, 1_000, 2**52)[number // 4 % 6]
            self._publish_forged(namespace, Position(head[0], head[1] + ahead))

    def forge_copy(self, number: int) -> None:
        """An exact copy of a message that the log has, or of one that has come."""
        namespace = self._namespace(number)
        if frames := self._frames_seen(namespace):
            self._publish_as_forger(namespace, frames[-1 - number // 4 % min(5, len(frames))])

    def forge_altered(self, number: int) -> None:
        """A copy of such a message that names other keys."""
        namespace = self._namespace(number)
        if frames := self._frames_seen(namespace):
            with contextlib.suppress(MalformedFrame):
                seen = decode(frames[-1 - number // 4 % min(5, len(frames))], namespace)
                altered = msgspec.structs.replace(seen, keys=("x",), tags=(), prefixes=(), everything=False)
                self._publish_as_forger(namespace, encode(altered))

    def forge_own(self, number: int) -> None:
        """The id of an invalidation of the replica's own, with its targets or with others, at the next position."""
        namespace = self._namespace(number)
        applied, own = self.subscriber.position(namespace), self._own_parts(namespace)
        if applied and own:
            part = own[number % len(own)]
            if number // 4 % 2:
                part = msgspec.structs.replace(part, keys=("x",), tags=(), prefixes=(), everything=False)
            if number // 8 % 3 == 0:
                part = msgspec.structs.replace(part, id=f"{part.id}.evil")
            sequence = applied.sequence + number // 24 % 3
            frame = encode(msgspec.structs.replace(part, epoch=applied.epoch, seq=sequence, namespace=namespace))
            self._publish_as_forger(namespace, frame)

    def _frames_seen(self, namespace: str) -> list[bytes]:
        link, channel = self.network.link, names_of(namespace).channel.encode()
        delivered = [push.frame for push in (link.delivered if link else ()) if push.channel == channel]
        return [*delivered, *[frame for _, frame in self.network.primary.logs[namespace].entries]]

    def _publish_forged(self, namespace: str, forged: Position) -> None:
        forged_invalidation = Invalidation(keys=("x",), epoch=forged.epoch, seq=forged.sequence, id="forged")
        self._publish_as_forger(namespace, encode(forged_invalidation))

    def _publish_as_forger(self, namespace: str, frame: bytes) -> None:
        self.is_log_intact = False
        self.network.publish(namespace, frame)

    # --- what happens to messages and links --------------------------------------------------------------------------

    def _pushes(self, link: ModelLink) -> list[Push]:
        return [item for item in link.incoming if isinstance(item, Push)]

    def drop(self, number: int) -> None:
        """A message is lost on its way, and the link lives on.

        A replica that knows of no log at all has nothing to compare with: a whole log that comes, is not received and
        goes again between two echoes is not noticed. No link of Redis loses a message and lives; so it is left out.
        """
        is_log_known = all(self.subscriber.position(namespace) for namespace in NAMESPACES)
        if is_log_known and (link := self.network.link) and (pushes := self._pushes(link)):
            link.incoming.remove(pushes[number % len(pushes)])

    def duplicate(self, number: int) -> None:
        """A message comes once more; probes too."""
        if (link := self.network.link) and (known := [*link.delivered, *self._pushes(link)]):
            push = known[number % len(known)]
            if b"forged" in push.frame:
                self.is_log_intact = False
            link.incoming.append(push)

    def cut(self, number: int) -> None:
        """The connection ends, after some of what was on its way."""
        if link := self.network.link:
            for _ in range(number % 4):
                link.deliver()
            link.lose("it was cut")
            if number % 3:
                self.loop.turn()

    def black_hole(self, number: int) -> None:
        """Nothing arrives any more, without an error; what was sent may still be executed."""
        if link := self.network.link:
            for _ in range(number % 3):
                link.serve()
            link.is_black_hole = True

    def slow_down(self, number: int) -> None:
        """Links carry little from now on: pages take several operations, and come in parts. Or they are fast again."""
        # A replica that cannot keep up may clear.
        self.is_log_intact = False
        self.network.bytes_per_second = (400, 400, 1_500, None)[number % 4]

    def refuse(self, number: int) -> None:
        self.network.is_refusing = not self.network.is_refusing

    # --- what happens to the caches ----------------------------------------------------------------------------------

    def break_mapping(self, number: int) -> None:
        """The first cache's mapping raises, some operations later, once or from then on."""
        mapping = self.mappings[self._namespace(number)]
        mapping.blow(("__delitem__", "__setitem__", "__getitem__")[number // 4 % 3], number // 12 % 3, number // 36 % 2)

    # --- what happens to servers -------------------------------------------------------------------------------------

    def flush(self, number: int) -> None:
        self.is_log_intact = False
        self.network.primary.logs.clear()

    def lose_head(self, number: int) -> None:
        """The head is evicted, the log stays."""
        self.is_log_intact = False
        self.network.primary.logs[self._namespace(number)].epoch = None

    def move_head(self, number: int) -> None:
        """A foreign hand counts the head up or down."""
        self.is_log_intact = False
        log = self.network.primary.logs[self._namespace(number)]
        if log.epoch is not None:
            log.sequence = max(0, log.sequence + (-1, -2, -3, 1, 3)[number // 4 % 5])

    def replace_log(self, number: int) -> None:
        """A foreign hand puts a value of another type in the place of the log, or deletes it."""
        self.is_log_intact = False
        log = self.network.primary.logs[self._namespace(number)]
        log.entries, log.is_other_type = [], bool(number // 4 % 3)

    def hide_identity(self, number: int) -> None:
        """The servers no longer tell this user who they are; or they do again."""
        self.is_log_intact = False
        self.network.is_identity_hidden = not self.network.is_identity_hidden

    def freeze(self, number: int) -> None:
        """The primary freezes while publishers send to it, and another one is promoted."""
        self.is_log_intact = False
        if not any(server.is_frozen for server in self.network.servers):
            for place in range(number % 4):
                namespace, target = self._namespace(number), self._target(number + 4 * place)
                invalidation = invalidation_of([target], namespace=namespace)
                self.network.append_later(namespace, _receipt_of(invalidation), encode_tails(invalidation))
            frozen = self.network.primary
            self.network.freeze(lost_count=number // 4 % 2)
            if number // 8 % 2:
                for link in list(frozen.links):
                    link.lose("the server is frozen")
                self.loop.turn()

    def thaw(self, number: int) -> None:
        """The frozen server goes on, as a primary of its own history, and carries out what it was sent."""
        self.network.thaw()
        for _ in range(number % 8):
            self.stray(0)
        if number % 2:
            self.carry(number // 8)

    def carry(self, number: int) -> None:
        """Some of what the thawed server has published comes over the bus of the cluster."""
        for _ in range(1 + number % 3):
            self.network.carry(number // 4)

    def demote(self, number: int) -> None:
        """The thawed server learns that it was replaced."""
        self.network.demote()

    def trim(self, number: int) -> None:
        self.is_log_intact = False
        log = self.network.primary.logs[self._namespace(number)]
        log.entries = log.entries[len(log.entries) - number // 4 % 3 :]

    def scribble(self, number: int) -> None:
        """A foreign hand writes to the log what is not a frame."""
        self.is_log_intact = False
        log = self.network.primary.logs[self._namespace(number)]
        newest = log.entries[-1][0] if log.entries else 0
        log.entries.append((newest + (1, 1, 2, 1_700_000_000_000)[number // 4 % 4], b"scribble"))

    def restart(self, number: int) -> None:
        self.is_log_intact = False
        self.network.restart(lost_count=number % 4)
        self.loop.turn()

    def fail_over(self, number: int) -> None:
        """Another server is promoted. New links go to it, or to the old one still."""
        self.is_log_intact = False
        old = self.network.primary
        self.network.fail_over(lost_count=number % 4)
        if number // 4 % 2:
            self.network.addressed = self.network.primary
        if number // 8 % 2:
            for link in list(old.links):
                link.lose("the server was demoted")
        self.publish_many(number // 16)

    def fail_back(self, number: int) -> None:
        """Another server is the primary for a moment: what it accepts is lost, and no link has ended."""
        self.is_log_intact = False
        if self.network.addressed is self.network.primary:
            self.network.fail_over(lost_count=0)
            self.publish(number)
            self.network.promote_addressed()

    def promote(self, number: int) -> None:
        self.is_log_intact = False
        self.network.promote_addressed()

    def detour(self, number: int) -> None:
        """The replica is led to a server that was demoted, with writes of its own that were lost, and back again."""
        self.is_log_intact = False
        others = [server for server in self.network.servers if not server.is_primary]
        if not others:
            others = [self.network.primary]
            self.network.fail_over(lost_count=number % 4)
        for server in (self.network.primary, others[number % len(others)]):
            self.network.addressed = server
            if link := self.network.link:
                link.lose("it was led elsewhere")
            self.loop.turn()
            self.clock.now += 1.0
            self.exchange(15)
        self.network.addressed = self.network.primary

    def replicate(self, number: int) -> None:
        self.network.replicate()

    def part(self, number: int) -> None:
        self.network.part()

    def move(self, number: int) -> None:
        """The address leads to another server: those who are connected stay where they are."""
        self.is_log_intact = False
        servers = self.network.addressable
        self.network.addressed = servers[number % len(servers)]

    # --- the end -----------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """No more faults: everything that is sent arrives, and time passes until coherence has been proven anew.

        A slow link stays slow.
        """
        self.network.is_refusing = False
        for mapping in self.mappings.values():
            mapping.mend()
        self.network.thaw()
        while self.network.strays:
            self.stray(0)
        while self.network.bus:
            self.network.carry(0)
        self.network.addressed = self.network.primary
        self.network.replicate()
        heal_at, echoes = self.clock.now, self.subscriber.stats().echoes
        heal_seconds = 30 if self.network.bytes_per_second is None else 300
        while self.subscriber.state != "coherent" or self.subscriber.stats().echoes < echoes + 2:
            self.exchange(15)
            self.check_reads()
            if self.clock.now > heal_at + heal_seconds:
                raise PromiseBroken(
                    f"expected to be coherent {heal_seconds} s after the last fault, got {self.subscriber.state}"
                )
            self.clock.now = max(self.clock.now, min(self.loop.next_timer() or 0.0, self.clock.now + 1))

    def check_healed(self) -> None:
        for namespace, caches in self.caches.items():
            head = self.network.primary.logs[namespace].head
            sequencer = self.subscriber.sequencers[namespace]
            proven = sequencer.proven
            if not sequencer.position == head == (proven and proven.position):
                raise PromiseBroken(f"expected the position {head} at last, got {sequencer.position}, proven {proven}")
            for cache in caches:
                for key in TAGS_OF_KEY:
                    if (version := cache.get(key)) is not None:
                        self.oracles[namespace].check(key, version, max_staleness_seconds=0)
                self._check_applied(namespace, cache)
                clears = [reason for reason in cache.reasons if reason != "invalidation"]
                if self.is_log_intact and len(clears) > 1:
                    raise PromiseBroken(f"expected no clear while the log was whole, got {clears}")

    def _check_applied(self, namespace: str, cache: WatchedCache) -> None:
        """Everything that was accepted has been applied or cleared since; but for what the replica has said itself."""
        for accepted_at, logged_namespace, accepted in self.logged:
            applied_at = cache.applied_at.get((accepted.id, targets_of(accepted)), 0)
            if (
                logged_namespace == namespace
                and accepted.source != REPLICA_ID
                and max(applied_at, cache.cleared_at) <= accepted_at
            ):
                raise PromiseBroken(f"expected {accepted} to be applied in {namespace} since it was logged, it was not")

    def check_served(self) -> None:
        """A replica that has been healed serves what is loaded now."""
        self.fill_all()
        hits = self.check_reads()
        expected = sum(len(caches) for caches in self.caches.values()) * len(TAGS_OF_KEY)
        if hits != expected:
            raise PromiseBroken(f"expected {expected} reads to be served after the faults, got {hits}")


def _target_of(invalidation: Invalidation) -> Target:
    """Return the target of an invalidation that has one."""
    if invalidation.keys:
        return Keys(*invalidation.keys)
    if invalidation.tags:
        return Tags(*invalidation.tags)
    return Prefixes(*invalidation.prefixes) if invalidation.prefixes else Everything()


def _receipt_of(invalidation: Invalidation) -> str:
    """Return where the log keeps the receipt: an id is scoped to its source."""
    return f"{invalidation.source}:{invalidation.id}"


# --- schedules -------------------------------------------------------------------------------------------------------

ALWAYS = {
    "publish": 4,
    "exchange": 4,
    "step": 4,
    "tick": 4,
    "fill": 6,
    "deliver": 3,
    "serve": 3,
    "turn": 2,
    "recover": 4,
}
HARMLESS = (
    "begin",
    "store",
    "load",
    "answer_load",
    "stall",
    "turn_a_little",
    "answer_late",
    "stray",
    "publish_many",
    "publish_large",
    "publish_own",
    "publish_with_own_id",
    "publish_unsequenced",
    "post",
    "post_first",
    "post_in_advance",
    "drop",
    "duplicate",
    "cut",
    "black_hole",
    "refuse",
)
FORGERIES = ("forge", "forge_next", "forge_ahead", "forge_copy", "forge_altered", "forge_own")
SECOND_PRIMARY = ("freeze", "thaw", "carry", "demote")
FAULTS = (
    "flush",
    "lose_head",
    "trim",
    "scribble",
    "move_head",
    "replace_log",
    "hide_identity",
    "restart",
    "fail_over",
    "fail_back",
    "detour",
    "promote",
    "replicate",
    "part",
    "move",
    "publish_older",
    "publish_garbage",
    "slow_down",
    "break_mapping",
    *FORGERIES,
)
OPERATIONS = (*ALWAYS, *HARMLESS, *FAULTS, *SECOND_PRIMARY)
# What the protocol assumes never to meet: see above.
APART: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("drop", (*FORGERIES, *SECOND_PRIMARY, "duplicate", "move_head")),
    ("hide_identity", ("fail_back", "promote")),
)


def schedule_of(seed: int, length: int = 40, focus: Sequence[str] = ()) -> Schedule:
    """Draw a schedule. Each has operations of few kinds, so that they meet each other more often.

    `focus` names operations that it has in any case.
    """
    choice = random.Random(seed)
    weights = dict(ALWAYS)
    for name in choice.sample(HARMLESS, choice.randint(1, 7)):
        weights[name] = 3
    for name in choice.sample(FAULTS, choice.choice((0, 0, 1, 2, 3, 5))):
        weights[name] = 2
    if choice.random() < 0.15:
        weights.update(dict.fromkeys(SECOND_PRIMARY, 2))
    weights.update(dict.fromkeys(focus, 3))
    for name, others in APART:
        if name in weights:
            apart = [other for other in others if other in weights]
            for left_out in apart if name in focus or not apart or choice.random() < 0.5 else [name]:
                weights.pop(left_out, None)
    names = choice.choices(list(weights), list(weights.values()), k=choice.randint(length // 2, length))
    return [(name, choice.randrange(5_040)) for name in names]


def run(schedule: Schedule) -> Counter[str]:
    """Run one schedule on a new replica; return the hits after each kind of operation. Raises: PromiseBroken."""
    replica = Replica()
    replica.run(schedule)
    return replica.hits_after


def shrunk(schedule: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    """Leave out of a schedule that fails whatever it does not need to fail."""
    size = len(schedule) // 2
    while size:
        place = 0
        while place < len(schedule):
            shorter = schedule[:place] + schedule[place + size :]
            if fails(shorter):
                schedule = shorter
            else:
                place += size
        size //= 2
    return schedule
