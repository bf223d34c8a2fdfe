"""The promise, against a model: random schedules of what may happen, and replicas that are broken on purpose.

`PROMISE_MODEL_RUNS` is how many schedules are run, `PROMISE_MODEL_SEED` where their seeds begin. A schedule that fails
is made smaller and printed, ready to be run again: `promise_model.run([…])`.
"""

import logging
import os
from collections.abc import Iterator, Sequence

import pytest
from tests.support import promise_model
from tests.support import promise_model_mutants as mutants
from tests.support.promise_model import PromiseBroken, Schedule
from tests.support.promise_model_mutants import MUTANTS, Mutant

from broadcache.subscriber.following import follower as follower_module

RUNS = int(os.environ.get("PROMISE_MODEL_RUNS", "400"))
FIRST_SEED = int(os.environ.get("PROMISE_MODEL_SEED", "0"))
# Parts, so that long runs spread over the cores.
PARTS = 8
HITS_RUNS, HITS_MIN = 8, 20
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


def run_schedules(count: int, *, focus: Sequence[str]) -> None:
    for seed in range(count):
        promise_model.run(promise_model.schedule_of(seed, focus=focus))


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


@pytest.mark.timeout(60 + RUNS // PARTS // 10)
@pytest.mark.parametrize("part", range(2))
def test_no_schedule_breaks_the_promise_when_each_namespace_has_an_echo_of_its_own(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with more than 64 namespaces: messages, faults and positions that move come between the echoes of a proof."""
    assert len(promise_model.NAMESPACES) > 1
    monkeypatch.setattr(follower_module, "_ECHO_NAMESPACES_MAX", 1)
    for seed in range(FIRST_SEED + part, FIRST_SEED + RUNS // 4, 2):
        schedule = promise_model.schedule_of(seed)
        if failure_of(schedule):
            smallest = promise_model.shrunk(schedule, lambda shorter: failure_of(shorter) is not None)
            pytest.fail(f"seed {seed}: {failure_of(smallest)}\nafter the schedule {smallest}")


def test_an_echo_that_compares_what_came_after_its_probe_is_caught_among_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(follower_module, "_ECHO_NAMESPACES_MAX", 1)
    mutants.an_echo_compares_the_position_of_later(monkeypatch)
    focus = MUTANTS[mutants.an_echo_compares_the_position_of_later]
    assert focus is not None
    with pytest.raises(PromiseBroken):
        run_schedules(MUTANT_RUNS_MAX, focus=focus)


@pytest.mark.parametrize("name", promise_model.OPERATIONS)
def test_hits_are_served_after_every_kind_of_fault(name: str) -> None:
    """Also while the faults last. A replica that always went to the source would break no promise."""
    hits = 0
    for seed in range(HITS_RUNS):
        hits += promise_model.run(promise_model.schedule_of(seed, focus=(name,)))[name]
    assert hits >= HITS_MIN


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
    "a head that was counted back was taken for the same position": [
        ("black_hole", 4042),
        ("move_head", 2947),
        ("publish", 3029),
        ("publish", 4358),
        ("move_head", 523),
    ],
    "a head that was counted back hid what the log still had": [
        ("cut", 3514),
        ("publish_large", 1648),
        ("move_head", 3884),
    ],
    "a position without a digest was taken for the same": [
        ("tick", 2119),
        ("move_head", 375),
        ("exchange", 4802),
        ("fill", 4987),
        ("cut", 1270),
        ("move_head", 4882),
        ("publish", 3950),
    ],
    "another publisher's message was taken for an own one": [
        ("publish_own", 9),
        ("turn", 0),
        ("serve", 0),
        ("restart", 0),
        ("tick", 3),
        ("exchange", 3),
        ("fill", 9),
        ("publish_with_own_id", 3),
        ("deliver", 0),
        *[("exchange", 15), ("tick", 3)] * 3,
    ],
    "a probe that came twice was compared with the head of the first": [
        ("tick", 5001),
        ("serve", 4492),
        ("publish", 2499),
        ("duplicate", 118),
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

# What an adversary once broke the promise with, and what the rules that came of it are for: each schedule breaks a
# replica that follows the old rule.
OLD_RULES: dict[str, tuple[Mutant, Schedule]] = {
    "a thawed primary steals sequences": (
        mutants.a_number_that_was_reached_is_skipped,
        [
            ("freeze", 9),
            ("tick", 3),
            ("exchange", 15),
            ("fill", 1),
            ("fill", 9),
            ("thaw", 7),
            ("carry", 2),
            ("deliver", 2),
            ("publish", 1),
            ("publish", 9),
            *[("exchange", 15), ("tick", 3)] * 3,
        ],
    ),
    "a forged next position hides an invalidation": (
        mutants.a_number_that_was_reached_is_skipped,
        [("forge_next", 3628), ("publish_many", 1684)],
    ),
    "an id posted in advance voids the real invalidation": (
        mutants.what_was_posted_is_skipped_when_it_comes,
        [("post_in_advance", 1720), ("publish", 2524)],
    ),
    "a forged position and a copy of a real one add up over a cut": (
        mutants.a_replica_goes_on_from_its_live_position,
        [
            ("forge_next", 1),
            ("deliver", 0),
            ("cut", 0),
            ("publish", 1),
            ("publish", 9),
            ("turn", 0),
            ("tick", 3),
            *[("serve", 0), ("serve", 0), ("deliver", 2), ("turn", 0)] * 2,
            ("forge_copy", 1),
            *[("exchange", 15), ("tick", 3)] * 3,
        ],
    ),
    "a server that hides its identity loses its tail": (
        mutants.unknown_servers_are_the_same,
        [
            ("hide_identity", 978),
            ("restart", 813),
            ("tick", 3341),
            ("exchange", 3097),
            ("fill", 5031),
            ("publish_large", 2387),
            ("restart", 3461),
        ],
    ),
    # Beyond what is assumed: a single message is lost on a link that lives. The digest at the head finds it here.
    "a message is lost, and a forged one takes its place": (
        mutants.no_digests_are_compared_at_the_head,
        [("publish", 1093), ("drop", 2599), ("forge_next", 3953), ("publish", 3403)],
    ),
    "a head is counted back, and on again by an older publisher": (
        mutants.a_replay_compares_no_digest_at_its_own_position,
        [("cut", 337), ("move_head", 964), ("publish_older", 1036)],
    ),
    "a head that was counted back is believed": (
        mutants.a_head_without_digest_is_believed,
        [("move_head", 3082), ("tick", 4933), ("tick", 3884), ("publish_older", 3998)],
    ),
    "a head is counted back where its digest was never known": (
        mutants.a_proven_position_without_digest_is_believed,
        FOUND["a position without a digest was taken for the same"],
    ),
    "a head is counted up": (mutants.a_claim_of_the_head_is_dropped, [("move_head", 4096)]),
    "another publisher has the id of an own invalidation": (
        mutants.own_messages_are_known_by_the_stem_of_their_id,
        [("publish_own", 4003), ("publish_with_own_id", 3737)],
    ),
    "a mapping that raises loses the rest of the message": (
        mutants.what_a_mapping_raises_ends_the_apply,
        [("break_mapping", 1910), ("publish", 1217), ("cut", 1851)],
    ),
}


@pytest.mark.parametrize("rule", OLD_RULES)
def test_an_old_rule_breaks_the_promise(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, schedule = OLD_RULES[rule]
    promise_model.run(schedule)
    break_it(monkeypatch)
    with pytest.raises(PromiseBroken):
        promise_model.run(schedule)


# Those that a search finds within some hundred schedules at most; the others have a schedule of their own above.
SEARCHED = [mutant for mutant in MUTANTS if MUTANTS[mutant] is not None]


@pytest.mark.parametrize("break_it", SEARCHED)
def test_the_model_catches_a_replica_that_is_broken_on_purpose(
    break_it: Mutant, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(monkeypatch)
    with pytest.raises(PromiseBroken):
        run_schedules(MUTANT_RUNS_MAX, focus=MUTANTS[break_it] or ())
