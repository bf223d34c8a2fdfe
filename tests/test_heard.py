"""What comes over Redis and over HTTP is applied once, and what was not done is never skipped."""

import random
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broadcache.shared import Invalidation, Position
from broadcache.shared.log import Entry
from broadcache.shared.wire import decode, encode
from broadcache.subscriber import LocalCache
from broadcache.subscriber.heard import SHORT_BYTES_MAX
from broadcache.subscriber.sequencer import Sequencer

NAMESPACE = "products"
EPOCH = "01JDCM00000000000000000000"
OTHER_EPOCH = "01JDCM00000000000000000001"
REPRODUCIBLE = settings(derandomize=True, database=None, deadline=None, max_examples=600)
KEYS = ("a:1", "a:2", "b:1", "b:2")

INVALIDATIONS = {
    "keys": Invalidation(id="one", keys=("a:1", "b:1"), sent_at_ms=5),
    "tags": Invalidation(id="one", tags=("a",)),
    "prefixes": Invalidation(id="one", prefixes=("a:",)),
    "everything": Invalidation(id="one", everything=True),
    "long": Invalidation(id="one", keys=("a:1", *(f"k{number}" for number in range(200)))),
    "an id that JSON escapes": Invalidation(id='"\\é', keys=("a:1",)),
}


class Replica:
    """A sequencer that has subscribed at sequence 10, and its cache."""

    def __init__(self, cache: LocalCache | None = None) -> None:
        self.cache = LocalCache({}) if cache is None else cache
        self.cache.confirm_coherent(self.cache.clock() + 3_600)
        self.sequencer = Sequencer(NAMESPACE, [self.cache])
        self.sequencer.restart(Position(EPOCH, 10), "subscribed")
        self.refill()

    def refill(self) -> None:
        for key in KEYS:
            if key not in self.cache:
                assert self.cache.store(self.cache.begin_load(key), key, tags=(key[0],))

    @property
    def held(self) -> set[str]:
        return set(self.cache)

    def publish(self, invalidation: Invalidation) -> None:
        """It comes over the channel, in order."""
        self.sequencer.receive(encode(self._next(invalidation)))

    def replay(self, invalidation: Invalidation) -> None:
        """It comes from the log."""
        entry = self._next(invalidation)
        assert self.sequencer.check(Position(EPOCH, self.sequencer.sequence + 1), None) is None
        assert self.sequencer.replay([Entry(self.sequencer.sequence + 1, decode(encode(entry), NAMESPACE))])

    def post(self, invalidation: Invalidation) -> None:
        """It comes over HTTP."""
        self.sequencer.apply_posted(decode(encode(invalidation), None))

    def _next(self, invalidation: Invalidation) -> Invalidation:
        return msgspec.structs.replace(invalidation, epoch=EPOCH, seq=self.sequencer.sequence + 1)


Way = Callable[[Replica, Invalidation], None]
BOTH_WAYS: list[tuple[Way, Way]] = [
    (Replica.publish, Replica.post),
    (Replica.replay, Replica.post),
    (Replica.post, Replica.publish),
    (Replica.post, Replica.replay),
    (Replica.post, Replica.post),
]
both_ways = pytest.mark.parametrize(("first", "second"), BOTH_WAYS, ids=lambda way: getattr(way, "__name__", None))


@both_ways
@pytest.mark.parametrize("kind", INVALIDATIONS)
def test_what_comes_twice_is_applied_the_first_time_and_not_the_second(first: Way, second: Way, kind: str) -> None:
    assert len(encode(INVALIDATIONS["long"])) > SHORT_BYTES_MAX
    replica = Replica()
    first(replica, INVALIDATIONS[kind])
    assert "a:1" not in replica.held
    replica.refill()
    second(replica, INVALIDATIONS[kind])
    assert replica.held == set(KEYS)


@both_ways
@pytest.mark.parametrize(
    "other",
    [
        Invalidation(id="one", keys=("a:1", "b:2"), sent_at_ms=5),
        Invalidation(id="one", keys=("a:1",), sent_at_ms=5),
        Invalidation(id="one", tags=("a:1", "b:1", "a"), sent_at_ms=5),
        Invalidation(id="one", prefixes=("a:1", "b:1"), sent_at_ms=5),
        Invalidation(id="one", everything=True, sent_at_ms=5),
        Invalidation(id="one", keys=("a:1", "b:1"), sent_at_ms=6),
        Invalidation(id="another", keys=("a:1", "b:1"), sent_at_ms=5),
        Invalidation(id="one.1", keys=("a:1", "b:1"), sent_at_ms=5),
        Invalidation(id="", keys=("a:1", "b:1"), sent_at_ms=5),
    ],
    ids=["other keys", "fewer keys", "tags", "prefixes", "everything", "another time", "another id", "a part", "no id"],
)
def test_what_has_another_id_other_targets_or_another_time_is_applied(
    first: Way, second: Way, other: Invalidation
) -> None:
    for one, two in ((INVALIDATIONS["keys"], other), (other, INVALIDATIONS["keys"])):
        replica = Replica()
        first(replica, one)
        replica.refill()
        second(replica, two)
        assert "a:1" not in replica.held


@both_ways
def test_an_empty_id_tells_nothing(first: Way, second: Way) -> None:
    replica, nameless = Replica(), Invalidation(keys=("a:1",))
    first(replica, nameless)
    replica.refill()
    second(replica, nameless)
    assert "a:1" not in replica.held


@both_ways
def test_one_that_does_not_say_when_it_was_sent_is_told_by_its_id_and_targets(first: Way, second: Way) -> None:
    timeless = msgspec.structs.replace(INVALIDATIONS["keys"], sent_at_ms=None)
    for one, two in ((INVALIDATIONS["keys"], timeless), (timeless, INVALIDATIONS["keys"])):
        replica = Replica()
        first(replica, one)
        replica.refill()
        second(replica, two)
        assert replica.held == set(KEYS)


def test_one_that_was_posted_spares_one_that_is_published_and_no_later_one() -> None:
    """Somebody publishes under one id every night, and says no time."""
    replica, nightly = Replica(), Invalidation(id="nightly", keys=("a:1",))
    replica.post(nightly)
    replica.publish(nightly)
    replica.refill()
    replica.publish(nightly)
    assert "a:1" not in replica.held


def test_what_was_posted_is_counted_as_a_repeat_when_it_comes_over_the_channel_and_moves_the_position_then() -> None:
    replica = Replica()
    replica.post(INVALIDATIONS["keys"])
    assert (replica.sequencer.position, replica.sequencer.counts) == (Position(EPOCH, 10), {})
    replica.publish(INVALIDATIONS["keys"])
    assert (replica.sequencer.position, replica.sequencer.counts) == (Position(EPOCH, 11), {"repeat": 1})


def test_a_position_that_is_posted_hides_no_gap() -> None:
    replica = Replica()
    for sequence, epoch in ((11, EPOCH), (12, EPOCH), (1, OTHER_EPOCH)):
        replica.post(Invalidation(keys=("x",), epoch=epoch, seq=sequence))
    replica.sequencer.receive(encode(Invalidation(keys=("a:1",), epoch=EPOCH, seq=12)))
    assert (replica.sequencer.position, replica.sequencer.is_behind, replica.held) == (
        Position(EPOCH, 10),
        True,
        set(KEYS),
    )


def test_its_own_invalidation_that_is_posted_back_to_it_is_not_applied_again() -> None:
    replica = Replica()
    replica.sequencer.apply_own(INVALIDATIONS["keys"])
    replica.refill()
    replica.post(INVALIDATIONS["keys"])
    assert replica.held == set(KEYS)


def test_a_load_that_was_under_way_when_it_was_posted_is_not_stored() -> None:
    replica = Replica()
    token = replica.cache.begin_load("a:1")
    replica.post(INVALIDATIONS["keys"])
    assert replica.cache.store(token, "old") is False


@pytest.mark.parametrize("reason", ["server changed", "log lost"])
def test_a_clear_forgets_nothing_of_what_was_heard(reason: str) -> None:
    replica = Replica()
    replica.post(INVALIDATIONS["keys"])
    replica.sequencer.restart(Position(OTHER_EPOCH, 3), reason)
    replica.refill()
    replica.sequencer.receive(encode(msgspec.structs.replace(INVALIDATIONS["keys"], epoch=OTHER_EPOCH, seq=4)))
    assert replica.held == set(KEYS)


def test_it_remembers_a_bounded_number_and_applies_again_what_it_has_forgotten() -> None:
    replica = Replica()
    replica.publish(INVALIDATIONS["keys"])
    for number in range(1_024):
        replica.publish(Invalidation(id=str(number), keys=("x",)))
    for number in range(10_001):
        replica.post(Invalidation(id=f"posted-{number}", keys=("b:2",)))
    assert (len(replica.sequencer._heard.short), len(replica.sequencer._heard.posted)) == (1_024, 10_000)
    replica.refill()
    replica.post(INVALIDATIONS["keys"])
    replica.publish(Invalidation(id="posted-0", keys=("b:2",)))
    assert replica.held == {"a:2"}


def test_long_messages_are_remembered_in_little_memory() -> None:
    replica = Replica()
    for way in (replica.publish, replica.replay, replica.post):
        way(Invalidation(id=way.__name__, keys=tuple(f"{way.__name__}-{number}" for number in range(2_000))))
    heard = replica.sequencer._heard
    remembered = (*heard.short, *heard._long, *heard.posted.values())
    assert len(remembered) == 3
    assert all(len(repr(each)) <= SHORT_BYTES_MAX for each in remembered)


class SlowCache(LocalCache):
    """Has something else happen before it applies an invalidation."""

    def __init__(self) -> None:
        super().__init__({})
        self.meanwhile: Callable[[], None] | None = None

    def apply_invalidation(self, invalidation: Invalidation, *, reason: str = "invalidation") -> None:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        super().apply_invalidation(invalidation, reason=reason)


@pytest.mark.parametrize("second", [Replica.publish, Replica.replay, Replica.post], ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", INVALIDATIONS)
def test_nobody_skips_what_another_thread_is_still_posting(second: Way, kind: str) -> None:
    cache = SlowCache()
    replica = Replica(cache)
    held_after_the_second: list[set[str]] = []

    def meanwhile() -> None:
        second(replica, INVALIDATIONS[kind])
        held_after_the_second.append(replica.held)

    cache.meanwhile = meanwhile
    replica.post(INVALIDATIONS[kind])
    [held] = held_after_the_second
    assert "a:1" not in held


@pytest.mark.parametrize("first", [Replica.publish, Replica.replay], ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", INVALIDATIONS)
def test_nobody_skips_what_the_event_loop_is_still_doing(first: Way, kind: str) -> None:
    cache = SlowCache()
    replica = Replica(cache)
    held_after_the_post: list[set[str]] = []

    def meanwhile() -> None:
        replica.post(INVALIDATIONS[kind])
        held_after_the_post.append(replica.held)

    cache.meanwhile = meanwhile
    first(replica, INVALIDATIONS[kind])
    [held] = held_after_the_post
    assert "a:1" not in held


def test_threads_that_post_and_one_that_listens_do_not_disturb_each_other() -> None:
    replica = Replica()
    keys = [f"k{number}" for number in range(500)]
    for key in keys:
        replica.cache[key] = key
    left: list[str] = []
    done: list[Callable[[Invalidation], None]] = []

    def deliver(way: Callable[[Invalidation], None]) -> None:
        for key in keys:
            way(Invalidation(id=key, keys=(key,)))
            if key in replica.cache:
                left.append(key)
        done.append(way)

    interval_seconds = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        ways = (replica.publish, replica.post, replica.post)
        threads = [threading.Thread(target=deliver, args=[way]) for way in ways]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval_seconds)
    assert (len(done), left, replica.held) == (3, [], set(KEYS))
    assert replica.sequencer.sequence == 10 + len(keys)


# --- any interleaving ------------------------------------------------------------------------------------------------


class Logged(NamedTuple):
    sequence: int
    invalidation: Invalidation


CHOICES = [
    *INVALIDATIONS.values(),
    Invalidation(id="two", keys=("a:2",), sent_at_ms=1),
    Invalidation(id="two", keys=("b:2",), sent_at_ms=1),
    Invalidation(id="three", tags=("b",), prefixes=("a:1",), sent_at_ms=2),
    Invalidation(id="four", keys=("b:1", "b:2")),
]


def named_by(invalidation: Invalidation) -> set[str]:
    return {
        key
        for key in KEYS
        if invalidation.everything
        or key in invalidation.keys
        or key[0] in invalidation.tags
        or key.startswith(invalidation.prefixes or "no key")
    }


class World:
    """A replica, the log, and what a replica that applies everything the first time, and only then, would hold."""

    def __init__(self) -> None:
        self.replica = Replica()
        self.epoch = EPOCH
        self.log: list[Logged] = []
        self.known: list[Invalidation] = []
        self.seen: set[Invalidation] = set()
        self.expected = set(KEYS)

    @property
    def head(self) -> Position:
        return Position(self.epoch, self.log[-1].sequence if self.log else 10 if self.epoch == EPOCH else 0)

    def act(self, name: str, number: int) -> None:
        getattr(self, name)(number)
        assert self.replica.held == self.expected, (name, number)

    def begin(self, number: int) -> None:
        """Somebody invalidates; the log has it, or has it later, or never."""
        left = [each for each in CHOICES if each not in self.known]
        if left:
            self.known.append(left[number % len(left)])
            if number % 3:
                self.append(-1)

    def append(self, number: int) -> None:
        logged = {each.invalidation for each in self.log}
        if left := [each for each in self.known if each not in logged]:
            self.log.append(Logged(self.head.sequence + 1, left[number % len(left)]))

    def post(self, number: int) -> None:
        if self.known:
            posted = self.known[number % len(self.known)]
            before = self.replica.sequencer.position
            self.replica.post(posted)
            assert self.replica.sequencer.position == before
            self.hear(posted)

    def publish(self, number: int) -> None:
        """Some message of the log comes over the channel: the next, an old one again, or one too early."""
        if self.log:
            logged = self.log[number % len(self.log)]
            before = self.replica.sequencer.position
            frame = msgspec.structs.replace(logged.invalidation, epoch=self.epoch, seq=logged.sequence)
            is_news = before is None or before.epoch != self.epoch
            self.replica.sequencer.receive(encode(frame))
            if self.replica.sequencer.position != before:
                self.hear(logged.invalidation)
                if is_news:
                    self.expected = set()

    def next(self, number: int) -> None:
        position = self.replica.sequencer.position
        if position is None or position.epoch == self.epoch:
            for place, logged in enumerate(self.log):
                if position is None or logged.sequence == position.sequence + 1:
                    self.publish(place)
                    return

    def catch_up(self, number: int) -> None:
        sequencer = self.replica.sequencer
        if sequencer.position is not None and sequencer.position.epoch == self.epoch:
            sequencer.check(self.head, sequencer.position)
            entries = [
                Entry(each.sequence, msgspec.structs.replace(each.invalidation, epoch=self.epoch, seq=each.sequence))
                for each in self.log
                if each.sequence > sequencer.sequence
            ]
            if sequencer.is_behind:
                assert sequencer.replay(entries)
                for entry in entries:
                    assert entry.invalidation is not None
                    self.hear(msgspec.structs.replace(entry.invalidation, epoch=None, seq=None))

    def lose_log(self, number: int) -> None:
        """The log begins again, in another epoch; some of what it had is logged again."""
        self.epoch = OTHER_EPOCH if self.epoch == EPOCH else f"{EPOCH}-{number}-{len(self.seen)}"
        self.log = []

    def restart(self, number: int) -> None:
        self.replica.sequencer.restart(self.head, "server changed")
        self.expected = set()

    def refill(self, number: int) -> None:
        self.replica.refill()
        self.expected = set(KEYS)

    def hear(self, invalidation: Invalidation) -> None:
        """The first time drops. Where an id is used for several things, any time may."""
        if invalidation not in self.seen:
            self.expected -= named_by(invalidation)
        elif sum(each.id == invalidation.id for each in self.known) > 1:
            assert self.expected - named_by(invalidation) <= self.replica.held
            self.expected &= self.replica.held
        self.seen.add(invalidation)


NAMES = ("begin", "append", "post", "publish", "next", "catch_up", "lose_log", "restart", "refill")
WEIGHTED = (
    "begin",
    "begin",
    "post",
    "post",
    "post",
    "next",
    "next",
    "publish",
    "catch_up",
    "refill",
    "refill",
    "append",
)


def run(schedule: list[tuple[str, int]]) -> None:
    world = World()
    for name, number in schedule:
        world.act(name, number)


@REPRODUCIBLE
@given(st.lists(st.tuples(st.sampled_from(WEIGHTED + NAMES), st.integers(0, 60)), max_size=40))
def test_any_interleaving_drops_at_the_first_delivery_and_only_then(schedule: list[tuple[str, int]]) -> None:
    run(schedule)


def run_many(count: int) -> None:
    for seed in range(count):
        choice = random.Random(seed)
        run([(choice.choice(WEIGHTED), choice.randrange(60)) for _ in range(40)])


@pytest.mark.parametrize("broken", ["skips by id alone", "never skips", "notes before it applies"])
def test_the_model_catches_a_memory_that_is_broken_on_purpose(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    match broken:
        case "skips by id alone":
            monkeypatch.setattr("broadcache.subscriber.heard._is_same", lambda one, other: one.id == other.id)
        case "never skips":
            monkeypatch.setattr("broadcache.subscriber.heard._is_same", lambda *_: False)
        case _:
            apply_posted = Sequencer.apply_posted

            def note_first(self: Sequencer, invalidation: Invalidation) -> int | None:
                self._heard.note_posted(invalidation)
                return apply_posted(self, invalidation)

            monkeypatch.setattr(Sequencer, "apply_posted", note_first)
    with pytest.raises(AssertionError):
        run_many(500)
