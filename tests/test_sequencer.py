"""The sequencer: in order, once, and everything dropped when in doubt."""

import itertools
import logging
from collections.abc import Sequence

import pytest

from broadcache.shared import Everything, Invalidation, Keys, Position, Prefixes, Tags, Target
from broadcache.shared.invalidation import invalidation_of
from broadcache.shared.wire import encode, encode_tails
from broadcache.subscriber import LocalCache
from broadcache.subscriber.sequencer import Sequencer

NAMESPACE = "products"
EPOCH = "01JDCM00000000000000000000"
OTHER_EPOCH = "01JDCM00000000000000000001"
HEAD = Position(EPOCH, 10)


def filled_cache() -> LocalCache:
    cache = LocalCache({})
    cache.confirm_coherent(cache.clock() + 3_600)
    for key in ("a", "b", "c"):
        cache.store(cache.begin_load(key), key, tags=(f"tag-{key}",))
    return cache


def live(cache: LocalCache, *, head: Position | None = HEAD) -> Sequencer:
    """A sequencer that has recovered at `head`; the cache is filled afterwards."""
    sequencer = Sequencer(NAMESPACE, [cache])
    assert sequencer.recover(head)
    for key in ("a", "b", "c"):
        cache.store(cache.begin_load(key), key, tags=(f"tag-{key}",))
    return sequencer


def position_of(sequencer: Sequencer) -> Position | None:
    return sequencer.position


def frame(sequence: int | None, *keys: str, epoch: str = EPOCH, id: str = "") -> bytes:
    position = {} if sequence is None else {"seq": sequence, "epoch": epoch}
    return encode(Invalidation(keys=keys or ("x",), id=id, namespace=NAMESPACE, **position))  # type: ignore[arg-type]


def held(cache: LocalCache) -> str:
    return "".join(sorted(cache))


def test_messages_in_order_are_applied_one_by_one() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.receive(frame(11, "a"))
    assert (held(cache), position_of(sequencer)) == ("bc", (EPOCH, 11))
    sequencer.receive(frame(12, "b"))
    assert (held(cache), position_of(sequencer)) == ("c", (EPOCH, 12))
    assert sequencer.counts == {"applied": 2}


@pytest.mark.parametrize("sequence", [0, 1, 9, 10])
def test_a_message_from_before_the_position_is_skipped(sequence: int) -> None:
    cache = filled_cache()
    sequencer = live(cache)
    assert sequencer.receive(frame(sequence, "a")) is False
    assert (held(cache), position_of(sequencer)) == ("abc", (EPOCH, 10))
    assert sequencer.counts == {"duplicate": 1}


def test_a_gap_clears_and_goes_on_behind_it(caplog: pytest.LogCaptureFixture) -> None:
    cache = filled_cache()
    sequencer = live(cache)
    with caplog.at_level(logging.WARNING):
        sequencer.receive(frame(13, "x"))
    assert (held(cache), position_of(sequencer)) == ("", (EPOCH, 13))
    assert cache.stats().clears["gap"] == 1
    assert "cleared namespace products: expected sequence 11, got 13" in caplog.text
    cache["a"] = "new"
    sequencer.receive(frame(14, "x"))
    assert held(cache) == "a"


def test_another_epoch_clears_and_goes_on_in_it(caplog: pytest.LogCaptureFixture) -> None:
    cache = filled_cache()
    sequencer = live(cache)
    with caplog.at_level(logging.WARNING):
        sequencer.receive(frame(11, "x", epoch=OTHER_EPOCH))
    assert (held(cache), position_of(sequencer)) == ("", (OTHER_EPOCH, 11))
    assert cache.stats().clears["epoch changed"] == 1
    assert f"expected epoch {EPOCH}, got {OTHER_EPOCH}" in caplog.text


def test_the_first_message_of_a_log_that_was_empty_is_no_gap() -> None:
    cache = filled_cache()
    sequencer = live(cache, head=None)
    assert position_of(sequencer) is None
    sequencer.receive(frame(1, "a"))
    assert (held(cache), position_of(sequencer)) == ("bc", (EPOCH, 1))


def test_any_but_the_first_message_of_a_log_that_was_empty_is_a_gap() -> None:
    cache = filled_cache()
    sequencer = live(cache, head=None)
    sequencer.receive(frame(2, "a"))
    assert held(cache) == ""


@pytest.mark.parametrize("bad", [b"now", b"", b"\xff", b'{"v":2,"keys":["a"]}', b'{"keys":[]}'], ids=repr)
def test_an_unreadable_message_clears_the_namespace(bad: bytes, caplog: pytest.LogCaptureFixture) -> None:
    cache = filled_cache()
    sequencer = live(cache)
    with caplog.at_level(logging.WARNING):
        assert sequencer.receive(bad) is True
    assert (held(cache), position_of(sequencer)) == ("", (EPOCH, 10))
    assert sequencer.counts == {"malformed": 1}
    assert cache.stats().clears["malformed"] == 1
    assert "cleared namespace products: invalid frame" in caplog.text


def test_a_message_of_another_namespace_clears() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.receive(b'{"keys":["a"],"namespace":"orders"}')
    assert (held(cache), sequencer.counts["malformed"]) == ("", 1)


def test_a_message_without_a_position_is_applied_and_counted() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.receive(b'{"keys":["a"]}')
    assert (held(cache), position_of(sequencer)) == ("bc", (EPOCH, 10))
    assert sequencer.counts == {"applied": 1, "unsequenced": 1}


def test_every_cache_of_the_namespace_is_told() -> None:
    one, other = filled_cache(), filled_cache()
    sequencer = Sequencer(NAMESPACE, [one, other])
    sequencer.recover(None)
    one["a"] = other["a"] = "value"
    sequencer.receive(frame(1, "a"))
    assert (held(one), held(other)) == ("", "")


# --- what it has said itself -----------------------------------------------------------------------------------------


def test_its_own_invalidation_is_applied_before_it_is_published_and_not_again() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    own = invalidation_of([Keys("a")], namespace=NAMESPACE)
    sequencer.apply_own(own)
    assert held(cache) == "bc"
    cache["a"] = "new"
    sequencer.receive(frame(11, "a", id=own.id))
    assert (held(cache), position_of(sequencer)) == ("abc", (EPOCH, 11))
    assert sequencer.counts == {"own": 1}


def test_the_parts_of_its_own_split_invalidation_are_not_applied_again() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    own = invalidation_of([Keys("a", *(f"k{number}" * 20 for number in range(2_000)))], namespace=NAMESPACE)
    sequencer.apply_own(own)
    cache["a"] = "new"
    tails = encode_tails(own)
    assert len(tails) > 1
    for sequence, tail in enumerate(tails, start=11):
        sequencer.receive(b'{"v":1,"epoch":"%s","seq":%d,' % (EPOCH.encode(), sequence) + tail)
    assert "a" in cache
    assert sequencer.counts == {"own": len(tails)}


def test_a_gap_before_its_own_invalidation_clears_all_the_same() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    own = invalidation_of([Keys("a")], namespace=NAMESPACE)
    sequencer.apply_own(own)
    assert sequencer.receive(frame(12, "a", id=own.id)) is True
    assert held(cache) == ""


def test_others_invalidations_are_applied_although_it_has_said_something() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.apply_own(invalidation_of([Keys("a")], namespace=NAMESPACE))
    sequencer.receive(frame(11, "b", id="somebody-else's"))
    assert held(cache) == "c"


def test_it_remembers_a_bounded_number_of_its_own() -> None:
    sequencer = live(LocalCache({}))
    for number in range(10_001):
        sequencer.apply_own(Invalidation(keys=("a",), id=str(number)))
    assert len(sequencer._own_ids) == 10_000
    sequencer.receive(frame(11, "a", id="0"))
    assert sequencer.counts == {"applied": 1}


# --- recovering ------------------------------------------------------------------------------------------------------


def test_recovering_clears_and_begins_at_the_head() -> None:
    cache = filled_cache()
    sequencer = Sequencer(NAMESPACE, [cache])
    assert position_of(sequencer) is None
    assert sequencer.recover(Position(EPOCH, 10)) is True
    assert (held(cache), position_of(sequencer)) == ("", (EPOCH, 10))
    assert cache.stats().clears == {"subscribed": 1}


def arrivals() -> list[tuple[Sequence[int], int]]:
    """Messages that arrive before the head is read: none, some, or all of those up to a head that is read then."""
    return [(range(first, head + 1), head) for head, first in itertools.product([12], [10, 11, 12, 13])]


@pytest.mark.parametrize(("arrived", "head"), arrivals())
def test_messages_that_arrive_before_the_head_is_read_are_not_taken_for_gaps(arrived: Sequence[int], head: int) -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.begin_recovery()
    assert position_of(sequencer) is None
    for sequence in arrived:
        sequencer.receive(frame(sequence, "a"))
    assert sequencer.recover(Position(EPOCH, head)) is True
    assert (held(cache), position_of(sequencer)) == ("", (EPOCH, head))
    cache["b"] = "new"
    sequencer.receive(frame(head, "b"))
    sequencer.receive(frame(head + 1, "c"))
    assert (held(cache), position_of(sequencer)) == ("b", (EPOCH, head + 1))
    assert "gap" not in cache.stats().clears


def test_messages_newer_than_the_head_that_was_read_are_not_forgotten() -> None:
    """Another connection could read the head: then messages beyond it may have arrived already."""
    cache = filled_cache()
    sequencer = Sequencer(NAMESPACE, [cache])
    sequencer.receive(frame(13, "a"))
    sequencer.recover(Position(EPOCH, 12))
    assert position_of(sequencer) == (EPOCH, 13)


@pytest.mark.parametrize("head", [None, Position(OTHER_EPOCH, 3)])
def test_a_head_of_another_epoch_than_what_arrived_is_read_again(head: Position | None) -> None:
    cache = filled_cache()
    sequencer = Sequencer(NAMESPACE, [cache])
    sequencer.receive(frame(11, "x"))
    assert sequencer.recover(head) is False
    assert sequencer.recover(head) is True
    assert position_of(sequencer) == head


def test_a_load_from_before_the_recovery_is_not_stored_after_it() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    token = cache.begin_load("a")
    sequencer.begin_recovery()
    sequencer.recover(Position(EPOCH, 10))
    assert cache.store(token, "old") is False


# --- what is left to sweep -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "has_left"),
    [(Keys("a"), False), (Tags("tag-a"), True), (Prefixes("a"), True), (Everything(), True)],
    ids=lambda value: type(value).__name__,
)
def test_it_tells_whether_dead_entries_may_be_left(target: Target, has_left: bool) -> None:
    sequencer = live(filled_cache())
    sent = invalidation_of([target], namespace=NAMESPACE)
    assert sequencer.receive(encode(sent)) is has_left


def test_a_clear_for_a_gap_leaves_dead_entries_whatever_the_message_names() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    assert sequencer.receive(frame(13, "x")) is True
    assert cache.has_sweep_work
