"""The promise, against a model: random schedules of what may happen, and replicas that are broken on purpose.

`PROMISE_MODEL_RUNS` is how many schedules are run, `PROMISE_MODEL_SEED` where their seeds begin. A schedule that fails
is made smaller and printed, ready to be run again: `promise_model.run([…])`.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from tests.support import promise_model
from tests.support.promise_model import PromiseBroken, Schedule

from broadcache.shared import Invalidation, Position, log
from broadcache.shared.link import Link
from broadcache.shared.log import Entry, Heads, Identity
from broadcache.subscriber import LocalCache
from broadcache.subscriber import follower as follower_module
from broadcache.subscriber.follower import Follower
from broadcache.subscriber.sequencer import Sequencer

RUNS = int(os.environ.get("PROMISE_MODEL_RUNS", "400"))
FIRST_SEED = int(os.environ.get("PROMISE_MODEL_SEED", "0"))
# Parts, so that long runs spread over the cores.
PARTS = 8
MUTANT_RUNS_MAX = 2_000


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Faults are what these tests are made of: each would write a warning."""
    logger = logging.getLogger("broadcache")
    level, propagates = logger.level, logger.propagate
    logger.propagate = False
    logger.setLevel(logging.ERROR)
    yield
    logger.propagate = propagates
    # Not by the attribute: each logger below remembers what is not logged until it is told.
    logger.setLevel(level)


def run_schedules(count: int) -> None:
    for seed in range(count):
        promise_model.run(promise_model.schedule_of(seed))


def failure_of(schedule: Schedule) -> str | None:
    try:
        promise_model.run(schedule)
    except AssertionError as failure:
        return str(failure)
    return None


def test_a_schedule_is_the_same_each_time_it_is_drawn() -> None:
    assert promise_model.schedule_of(7) == promise_model.schedule_of(7) != promise_model.schedule_of(8)


@pytest.mark.timeout(60 + RUNS // PARTS // 10)
@pytest.mark.parametrize("part", range(PARTS))
def test_no_schedule_breaks_the_promise(part: int) -> None:
    for seed in range(FIRST_SEED + part, FIRST_SEED + RUNS, PARTS):
        schedule = promise_model.schedule_of(seed)
        if failure_of(schedule):
            smallest = promise_model.shrunk(schedule, lambda shorter: failure_of(shorter) is not None)
            pytest.fail(f"seed {seed}: {failure_of(smallest)}\nafter the schedule {smallest}")


# What the model has found, as small as it made it.
FOUND: dict[str, Schedule] = {
    "a demoted server was taken for a primary": [
        ("fail_over", 99),
        ("stall", 146),
        ("refuse", 165),
        ("publish", 56),
        ("exchange", 136),
        ("refuse", 30),
        ("tick", 160),
        ("exchange", 57),
    ],
    "positions of a demoted server were taken for those of the primary": [
        ("detour", 97),
        ("fill", 135),
        ("publish", 237),
    ],
    "an unreadable entry took the place of the real one": [
        ("tick", 20),
        ("publish", 8),
        ("scribble", 4),
        ("tick", 174),
        ("tick", 80),
        ("exchange", 54),
        ("publish_many", 28),
    ],
    "a message beside the head was taken for a log that went back": [
        ("cut", 113),
        ("tick", 72),
        ("serve", 10),
        ("step", 22),
        ("step", 141),
        ("step", 78),
    ],
    "a probe was awaited on a link that was lost": [
        ("tick", 223),
        ("publish_own", 52),
        ("serve", 100),
        ("drop", 110),
        ("cut", 103),
    ],
    "a loss just before the pause was forgotten in it": [
        ("answer_late", 37),
        ("drop", 21),
        ("answer_late", 40),
        ("serve", 36),
        ("cut", 90),
        ("publish_own", 187),
    ],
}


@pytest.mark.parametrize("found", FOUND)
def test_what_the_model_once_found_is_mended(found: str) -> None:
    promise_model.run(FOUND[found])


# --- broken on purpose -----------------------------------------------------------------------------------------------


def no_gap_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Sequencer._place

    def go_on(self: Sequencer, position: Position) -> bool:
        if position.epoch == self._epoch and position.sequence > self._sequence:
            self._sequence = position.sequence
            return True
        return place(self, position)

    monkeypatch.setattr(Sequencer, "_place", go_on)


def another_epoch_is_taken_for_the_same_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Sequencer._place

    def adopt(self: Sequencer, position: Position) -> bool:
        if self._epoch is not None and position.epoch != self._epoch:
            self._epoch, self._sequence = position
            return True
        return place(self, position)

    monkeypatch.setattr(Sequencer, "_place", adopt)


def an_echo_compares_no_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sequencer, "check", lambda *_: None)


def an_echo_counts_from_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    confirm = Follower._confirm
    monkeypatch.setattr(Follower, "_confirm", lambda self, _: confirm(self, self._clock()))


def an_echo_believes_any_history(monkeypatch: pytest.MonkeyPatch) -> None:
    class Same(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

    async def same(link: Link, namespaces: Sequence[str], **settings: Any) -> Heads:
        return (await log.echo(link, namespaces, **settings))._replace(replication_id=Same())

    monkeypatch.setattr(follower_module, "echo", same)


def a_replay_skips_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    def replay(self: Sequencer, entries: Sequence[Entry]) -> bool:
        for entry in entries:
            if entry.invalidation is not None and entry.sequence > self._sequence:
                self._apply(entry.invalidation)
                self._sequence = entry.sequence
        self._ahead = self._sequence
        return True

    monkeypatch.setattr(Sequencer, "replay", replay)


def a_duplicate_is_applied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Sequencer._place

    def again(self: Sequencer, position: Position) -> bool:
        return place(self, position) or (position.epoch == self._epoch and position.sequence <= self._sequence)

    monkeypatch.setattr(Sequencer, "_place", again)


def a_replay_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: object) -> None:
        pass

    monkeypatch.setattr(Follower, "_catch_up", nothing)


def any_server_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    resume = Sequencer.resume
    monkeypatch.setattr(Sequencer, "resume", lambda self, head, **_: resume(self, head, is_same_server=True))


def a_subscription_is_taken_for_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that was demoted lets everybody subscribe, and its heads stand still."""
    recover, echo = Follower._recover, Follower._echo
    known: list[Link] = []

    async def recover_and_claim(self: Follower, link: Link) -> Identity:
        server = await recover(self, link)
        self._confirm(self._clock())
        return server

    async def later(self: Follower, link: Link, server: Identity) -> None:
        if known == [link]:
            await echo(self, link, server)
        known[:] = [link]

    monkeypatch.setattr(Follower, "_recover", recover_and_claim)
    monkeypatch.setattr(Follower, "_echo", later)


def a_new_beginning_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def restart(self: Sequencer, head: Position | None, reason: str) -> None:
        self._epoch, self._sequence = head or ("", 0)
        self._ahead = 0
        if reason == "subscribed":
            self.clear(reason)

    monkeypatch.setattr(Sequencer, "restart", restart)


def a_lost_link_goes_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalCache, "disconnect", lambda _: None)


def a_lease_has_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    renew = LocalCache._renew

    def for_ever(self: LocalCache) -> None:
        renew(self)
        self._serve_until = math.inf if self._is_connected else self._serve_until
        self._refresh()

    monkeypatch.setattr(LocalCache, "_renew", for_ever)


def a_load_outlives_what_it_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalCache, "is_void", lambda *_: False)


def what_is_posted_is_noted_and_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    def note(self: Sequencer, invalidation: Invalidation) -> int:
        self._heard.note_posted(invalidation)
        return 0

    monkeypatch.setattr(Sequencer, "apply_posted", note)


def what_is_posted_moves_the_position(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = Sequencer.apply_posted

    def apply_and_move(self: Sequencer, invalidation: Invalidation) -> int | None:
        self._sequence += 1
        return apply(self, invalidation)

    monkeypatch.setattr(Sequencer, "apply_posted", apply_and_move)


MUTANTS = (
    no_gap_is_seen,
    another_epoch_is_taken_for_the_same_cache,
    an_echo_compares_no_heads,
    an_echo_counts_from_its_answer,
    an_echo_believes_any_history,
    a_replay_skips_holes,
    a_duplicate_is_applied_again,
    a_replay_is_not_asked_for,
    any_server_is_the_same,
    a_subscription_is_taken_for_a_proof,
    a_new_beginning_drops_nothing,
    a_lost_link_goes_unnoticed,
    a_lease_has_no_end,
    a_load_outlives_what_it_missed,
    what_is_posted_is_noted_and_not_applied,
    what_is_posted_moves_the_position,
)


@pytest.mark.parametrize("break_it", MUTANTS)
def test_the_model_catches_a_replica_that_is_broken_on_purpose(
    break_it: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(monkeypatch)
    with pytest.raises(PromiseBroken):
        run_schedules(MUTANT_RUNS_MAX)
