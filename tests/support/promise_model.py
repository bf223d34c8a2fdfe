"""The promise as a model: one replica, real but for its network, under a schedule, watched by an oracle.

The replica is the real `Subscriber` with its `Follower`, `Sequencer`s and `LocalCache`s. Its network is in memory, its
clock and its event loop stand still between two operations: a schedule is nothing but a list of operations with a
number each, so that it can be drawn from a seed, run again, and made smaller.

The oracle knows the source, and when which invalidation was accepted. After each operation it reads every key.
"""

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias
from unittest import mock

from tests.support.promise_model_loop import FakeClock, ScheduledLoop
from tests.support.promise_model_server import Accepted, ModelLink, Network, Push

from broadcache.shared import Everything, Invalidation, Keys, LinkLost, LogRefused, Position, Prefixes, Tags, Target
from broadcache.shared.invalidation import invalidation_of
from broadcache.shared.wire import encode, encode_tails
from broadcache.subscriber import LoadToken, LocalCache, Subscriber
from broadcache.subscriber import follower as follower_module

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

    def check(self, key: str, version: int, *, max_staleness_seconds: float = MAX_STALENESS_SECONDS) -> None:
        accepted = self._accepted[key]
        while accepted and accepted[0][0] <= self._clock.now - max_staleness_seconds:
            _, void = accepted.pop(0)
            self.oldest[key] = max(self.oldest[key], void)
        if version < self.oldest[key]:
            raise PromiseBroken(
                f"expected version {self.oldest[key]} of {key} or a newer one at {self._clock.now:g}, got {version}"
            )


class Cleared(NamedTuple):
    reason: str
    at: Position


class WatchedCache(LocalCache):
    """Writes down what it is told: the positions it applied, and where it was cleared."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__({}, clock=clock, max_staleness_seconds=MAX_STALENESS_SECONDS)
        self.story: list[Position | Cleared] = []
        self.position: Callable[[], Position | None] = lambda: None

    def apply_invalidation(self, invalidation: Invalidation, *, reason: str = "invalidation") -> None:
        if invalidation.position is not None:
            self.story.append(invalidation.position)
        super().apply_invalidation(invalidation, reason=reason)

    def apply(self, target: Target, *, reason: str = "invalidation") -> None:
        assert target == Everything()
        self.story.append(Cleared(reason, self.position() or Position("", 0)))
        super().apply(target, reason=reason)


# --- the run ---------------------------------------------------------------------------------------------------------


class OwnErrors(logging.Handler):
    """Notes what the replica reports as a mistake of its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(f"{record.getMessage()}: {record.exc_info and record.exc_info[1]!r}")


class Load(NamedTuple):
    namespace: str
    token: LoadToken
    version: int


class Replica:
    """One replica and its world. Each operation is a method with a number, which it takes its choices from."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.loop = ScheduledLoop(self.clock)
        self.oracles = {namespace: Oracle(self.clock) for namespace in NAMESPACES}
        self.accepted: list[Accepted] = []
        # The ids of what others have published: the rest is what the replica has said itself.
        self.ids_of_others: set[str] = set()
        # What was published, with the versions that it made void, and the ids of what was posted as well.
        self.published: list[tuple[Invalidation, dict[str, int]]] = []
        self.posted_ids: set[str] = set()
        self.network = Network(NAMESPACES, self.accepted.append)
        self._patch = mock.patch.object(follower_module, "Link", self.network)
        self._patch.start()
        self.own_errors = OwnErrors()
        logging.getLogger("broadcache").addHandler(self.own_errors)
        self.loads: list[Load] = []
        self.own: list[asyncio.Task[Any]] = []
        self.names = itertools.count(1)
        # Whether everything that was missed can be learned from the log, so that nothing has to be cleared.
        self.is_log_intact = True
        # Whether only the log has told the replica of epochs, and whether somebody has made up a sequence ahead of it.
        self.is_epoch_sure = True
        self.is_forged_ahead = False
        for namespace in NAMESPACES:
            self.publish_to(namespace, Everything())
        self.caches = {namespace: WatchedCache(self.clock) for namespace in NAMESPACES}
        self.subscriber = Subscriber(
            "redis://127.0.0.1:1",
            caches=self.caches,
            replica_id="replica",
            echo_interval_seconds=1.0,
            echo_timeout_seconds=2.0,
            backoff_seconds_max=1.0,
            clock=self.clock,
            uniform=lambda: 0.5,
        )
        for namespace, cache in self.caches.items():
            cache.position = partial(self.subscriber.position, namespace)
        self.entering = self.loop.create_task(self.subscriber.__aenter__())
        self.exchange(15)
        assert self.subscriber.state == "coherent"
        for number in range(len(NAMESPACES) * len(TAGS_OF_KEY)):
            self.fill(number)

    def close(self) -> None:
        closing = self.loop.create_task(self.subscriber.close())
        for task in self.own:
            task.cancel()
        self.loop.turn()
        # Nobody answers any more: it stops trying to say that it leaves.
        self.clock.now += 1.0
        self.loop.turn()
        self._patch.stop()
        logging.getLogger("broadcache").removeHandler(self.own_errors)
        assert closing.done()
        self.loop.close()

    def run(self, schedule: Schedule) -> None:
        """Carry out a schedule, then let the faults end. Raises: PromiseBroken."""
        try:
            for name, number in schedule:
                getattr(self, name)(number)
                self.check_reads()
            self.heal()
            self.check_healed()
        finally:
            self.close()
        # A future that nobody waited for any more is no mistake.
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
            while link.serve():
                pass
            while link.deliver():
                pass
            self.loop.turn()

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
        if self.network.strays:
            link, command = self.network.strays.popleft()
            if link.server in self.network.servers:
                self.network.execute(link, command)

    # --- what the service does ---------------------------------------------------------------------------------------

    def _namespace(self, number: int) -> str:
        return NAMESPACES[0] if number % 4 else NAMESPACES[1]

    def _key(self, number: int) -> str:
        return list(TAGS_OF_KEY)[number // 4 % len(TAGS_OF_KEY)]

    def begin(self, number: int) -> None:
        namespace, key = self._namespace(number), self._key(number)
        self.loads.append(
            Load(namespace, self.caches[namespace].begin_load(key), self.oracles[namespace].versions[key])
        )

    def store(self, number: int) -> None:
        if self.loads:
            namespace, token, version = self.loads.pop(number % len(self.loads))
            self.caches[namespace].store(token, version, tags=TAGS_OF_KEY[token.key])

    def fill(self, number: int) -> None:
        self.begin(number)
        self.store(-1)

    def check_reads(self) -> None:
        for namespace, cache in self.caches.items():
            for key in TAGS_OF_KEY:
                version = cache.get(key)
                if version is None:
                    continue
                self.oracles[namespace].check(key, version)
                if self.subscriber.state != "coherent":
                    raise PromiseBroken(f"expected {key} to be bypassed without a link, got version {version}")

    # --- what is published -------------------------------------------------------------------------------------------

    def publish_to(self, namespace: str, target: Target) -> None:
        oracle = self.oracles[namespace]
        versions = oracle.write(target)
        invalidation = invalidation_of([target], namespace=namespace)
        self.ids_of_others.add(invalidation.id)
        self.published.append((invalidation, versions))
        self.network.append(namespace, invalidation.id, encode_tails(invalidation))
        oracle.accept(versions)

    def publish(self, number: int) -> None:
        self.publish_to(self._namespace(number), TARGETS[number // 4 % len(TARGETS)])

    def publish_many(self, number: int) -> None:
        for place in range(number % 5):
            self.publish(number + 4 * place)

    def post(self, number: int) -> None:
        """What was published lately comes over HTTP too, before or after it comes over Redis."""
        self._post(*self.published[-1 - number % min(5, len(self.published))])

    def post_first(self, number: int) -> None:
        """The log cannot take an invalidation: it is posted, and logged later, or never."""
        namespace, target = self._namespace(number), TARGETS[number // 4 % len(TARGETS)]
        invalidation = invalidation_of([target], namespace=namespace)
        versions = self.oracles[namespace].write(target)
        self.ids_of_others.add(invalidation.id)
        self._post(invalidation, versions)
        if number % 3:
            self.network.append(namespace, invalidation.id, encode_tails(invalidation))

    def _post(self, invalidation: Invalidation, versions: dict[str, int]) -> None:
        self.posted_ids.add(invalidation.id)
        applied = self.subscriber.apply(encode(invalidation))
        if (applied.outcome, applied.namespace) not in {
            (each, invalidation.namespace) for each in ("applied", "repeat")
        }:
            raise PromiseBroken(f"expected {invalidation} to be applied, got {applied}")
        # Whatever the link does: nothing older may be served any more.
        self.oracles[invalidation.namespace].void_now(versions)

    def publish_own(self, number: int) -> None:
        """The replica itself invalidates: it forgets at once, and for good."""
        namespace, target = self._namespace(number), TARGETS[number // 4 % len(TARGETS)]
        oracle = self.oracles[namespace]
        versions = oracle.write(target)

        async def invalidate() -> None:
            with contextlib.suppress(LinkLost, LogRefused):
                await self.subscriber.invalidate(target, namespace=namespace, timeout_seconds=5)

        self.own.append(self.loop.create_task(invalidate()))
        self.loop.turn()
        oracle.void_now(versions)

    def publish_unsequenced(self, number: int) -> None:
        """A foreign publisher, past the log: promised to nobody, and it must not disturb the others."""
        namespace, target = self._namespace(number), TARGETS[number // 4 % len(TARGETS)]
        foreign = invalidation_of([target], namespace=namespace, id=f"foreign-{number}")
        self.network.publish(namespace, encode(foreign))

    def publish_garbage(self, number: int) -> None:
        self.is_log_intact = False
        self.network.publish(self._namespace(number), b"now")

    def forge(self, number: int) -> None:
        """A position out of thin air: too low, or of no epoch that ever was."""
        self.is_log_intact = False
        self.is_epoch_sure = False
        namespace = self._namespace(number)
        applied = self.subscriber.position(namespace) or Position("X0", 0)
        forged = (
            Position(f"X{next(self.names)}", 1 + number % 3),
            Position(f"X{next(self.names)}", applied.sequence + number % 3),
            Position(applied.epoch, max(0, applied.sequence - number % 3)),
            Position("", number % 3),
        )[number // 4 % 4]
        self._publish_forged(namespace, forged)

    def forge_ahead(self, number: int) -> None:
        """A position out of thin air that is too high, in the epoch that the replica is in.

        Not the very next one, nor in an epoch that it is yet to hear of: those take the place of the real ones, and so
        nobody may make them up.
        """
        self.is_log_intact = False
        namespace = self._namespace(number)
        applied, head = self.subscriber.position(namespace), self.network.primary.logs[namespace].head
        if self.is_epoch_sure and applied and head and applied.epoch == head[0]:
            self.is_forged_ahead = True
            self._publish_forged(namespace, Position(head[0], head[1] + 2 + number % 3))

    def _publish_forged(self, namespace: str, forged: Position) -> None:
        if not (self.is_forged_ahead and forged.epoch.startswith("X")):
            frame = encode(Invalidation(keys=("x",), epoch=forged.epoch, seq=forged.sequence, id="forged"))
            self.network.publish(namespace, frame)

    # --- what happens to messages and links --------------------------------------------------------------------------

    def _pushes(self, link: ModelLink) -> list[Push]:
        return [item for item in link.incoming if isinstance(item, Push)]

    def drop(self, number: int) -> None:
        """A message is lost on its way, and nobody is told.

        A replica that knows of no log at all has nothing to compare with: a whole log that comes, is not heard of and
        goes again between two echoes is not noticed. No link of Redis loses a message and lives; so it is left out.
        """
        is_log_known = all(self.subscriber.position(namespace) for namespace in NAMESPACES)
        if is_log_known and (link := self.network.link) and (pushes := self._pushes(link)):
            link.incoming.remove(pushes[number % len(pushes)])

    def duplicate(self, number: int) -> None:
        if not self.is_forged_ahead and (link := self.network.link):
            self.is_epoch_sure = False
            known = [push for push in (*link.delivered, *self._pushes(link)) if b'"forged"' not in push.frame]
            if known:
                link.incoming.append(known[number % len(known)])

    def cut(self, number: int) -> None:
        """The connection ends, after some of what was on its way."""
        if link := self.network.link:
            for _ in range(number % 4):
                link.deliver()
            link.lose("it was cut")
            if number % 3:
                self.loop.turn()

    def black_hole(self, number: int) -> None:
        """Nothing comes any more, and nobody is told; what was asked may still be done."""
        if link := self.network.link:
            for _ in range(number % 3):
                link.serve()
            link.is_black_hole = True

    def refuse(self, number: int) -> None:
        self.network.is_refusing = not self.network.is_refusing

    # --- what happens to servers -------------------------------------------------------------------------------------

    def flush(self, number: int) -> None:
        self.is_log_intact = False
        self.network.primary.logs.clear()

    def lose_head(self, number: int) -> None:
        """The head is evicted, the log stays."""
        self.is_log_intact = False
        self.network.primary.logs[self._namespace(number)].epoch = None

    def trim(self, number: int) -> None:
        self.is_log_intact = False
        log = self.network.primary.logs[self._namespace(number)]
        log.entries = log.entries[len(log.entries) - number // 4 % 3 :]

    def scribble(self, number: int) -> None:
        """Somebody writes to the log what is not a frame."""
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
        self.network.addressed = self.network.servers[number % len(self.network.servers)]

    # --- the end -----------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """No more faults: everything that is sent arrives, and time passes until coherence has been proven anew."""
        self.network.is_refusing = False
        self.network.addressed = self.network.primary
        self.network.replicate()
        while self.network.strays:
            self.stray(0)
        heal_at, echoes = self.clock.now, self.subscriber.stats().echoes
        while self.subscriber.state != "coherent" or self.subscriber.stats().echoes < echoes + 2:
            self.exchange(15)
            self.check_reads()
            if self.clock.now > heal_at + 30:
                raise PromiseBroken(f"expected to be coherent 30 s after the last fault, got {self.subscriber.state}")
            self.clock.now = max(self.clock.now, min(self.loop.next_timer() or 0.0, self.clock.now + 1))

    def check_healed(self) -> None:
        for namespace, cache in self.caches.items():
            head = self.network.primary.logs[namespace].head
            position = self.subscriber.position(namespace)
            if position != head:
                raise PromiseBroken(f"expected the position {head} at last, got {position}")
            for key in TAGS_OF_KEY:
                if (version := cache.get(key)) is not None:
                    self.oracles[namespace].check(key, version, max_staleness_seconds=0)
            self._check_story(namespace, cache.story, head)
            clears = [event for event in cache.story if isinstance(event, Cleared)]
            if self.is_log_intact and len(clears) > 1:
                raise PromiseBroken(f"expected no clear while the log was whole, got {clears}")

    def _check_story(self, namespace: str, story: list[Position | Cleared], head: tuple[str, int] | None) -> None:
        """Everything that was logged after the last clear has been applied once, in order; but for what it had said
        itself, and for what was posted, which need not have been applied again."""
        last = max((place for place, event in enumerate(story) if isinstance(event, Cleared)), default=0)
        cleared = story[last]
        assert isinstance(cleared, Cleared)
        if head is None:
            return
        epoch, sequence = head
        since = cleared.at.sequence if cleared.at.epoch == epoch else 0
        expected = range(since + 1, sequence + 1)
        # The last one of each: a server that had lost its tail gives out sequences again.
        ids = {each.sequence: each.id for each in self.accepted if (each.namespace, each.epoch) == (namespace, epoch)}
        own = {sequence for sequence, id in ids.items() if id not in self.ids_of_others}
        posted = {sequence for sequence, id in ids.items() if id in self.posted_ids}
        applied = [event.sequence for event in story[last:] if isinstance(event, Position) and event.epoch == epoch]
        got = [each for each in applied if each > since]
        if got != [each for each in expected if each not in own and (each not in posted or each in got)]:
            raise PromiseBroken(f"expected {list(expected)} but for {own} to be applied after {cleared}, got {got}")


# --- schedules -------------------------------------------------------------------------------------------------------

ALWAYS = {"publish": 4, "exchange": 4, "step": 4, "tick": 4, "fill": 6, "deliver": 3, "serve": 3, "turn": 2}
HARMLESS = (
    "begin",
    "store",
    "stall",
    "turn_a_little",
    "answer_late",
    "stray",
    "publish_many",
    "publish_own",
    "publish_unsequenced",
    "post",
    "post_first",
    "drop",
    "duplicate",
    "cut",
    "black_hole",
    "refuse",
)
FAULTS = (
    "flush",
    "lose_head",
    "trim",
    "scribble",
    "restart",
    "fail_over",
    "fail_back",
    "detour",
    "promote",
    "replicate",
    "part",
    "move",
    "publish_garbage",
    "forge",
    "forge_ahead",
)


def schedule_of(seed: int, length: int = 40) -> Schedule:
    """Draw a schedule. Each has operations of few kinds, so that they meet each other more often."""
    choice = random.Random(seed)
    weights = dict(ALWAYS)
    for name in choice.sample(HARMLESS, choice.randint(1, 7)):
        weights[name] = 3
    for name in choice.sample(FAULTS, choice.choice((0, 0, 1, 2, 3, 5))):
        weights[name] = 2
    names = choice.choices(list(weights), list(weights.values()), k=choice.randint(length // 2, length))
    return [(name, choice.randrange(240)) for name in names]


def run(schedule: Schedule) -> None:
    """Run one schedule on a new replica. Raises: PromiseBroken."""
    Replica().run(schedule)


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
