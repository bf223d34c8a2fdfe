"""The sequencer: in order, once, and everything dropped when in doubt."""

import logging

import pytest

from broadcache.shared import Everything, Invalidation, Keys, Position, Prefixes, Tags, Target
from broadcache.shared.invalidation import invalidation_of
from broadcache.shared.log import Entry
from broadcache.shared.wire import decode, encode, encode_tails
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
    """A sequencer that has subscribed at `head`; the cache is filled afterwards."""
    sequencer = Sequencer(NAMESPACE, [cache])
    assert sequencer.resume(head, is_same_server=False) == "subscribed"
    sequencer.restart(head, "subscribed")
    for key in ("a", "b", "c"):
        cache.store(cache.begin_load(key), key, tags=(f"tag-{key}",))
    return sequencer


def frame(sequence: int | None, *keys: str, epoch: str = EPOCH, id: str = "") -> bytes:
    position = {} if sequence is None else {"seq": sequence, "epoch": epoch}
    return encode(Invalidation(keys=keys or ("x",), id=id, namespace=NAMESPACE, **position))  # type: ignore[arg-type]


def entry(sequence: int, *keys: str, epoch: str = EPOCH, id: str = "") -> Entry:
    """What is read from the log: the same as comes over the channel."""
    return Entry(sequence, decode(frame(sequence, *keys, epoch=epoch, id=id), NAMESPACE))


def clears_of(cache: LocalCache) -> dict[str, int]:
    """How often everything was dropped after the first subscription, by reason."""
    return {reason: count for reason, count in cache.stats().clears.items() if reason != "subscribed"}


def held(cache: LocalCache) -> str:
    return "".join(sorted(cache))


def test_messages_in_order_are_applied_one_by_one() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.receive(frame(11, "a"))
    assert (held(cache), sequencer.position) == ("bc", (EPOCH, 11))
    sequencer.receive(frame(12, "b"))
    assert (held(cache), sequencer.position) == ("c", (EPOCH, 12))
    assert sequencer.counts == {"applied": 2}


@pytest.mark.parametrize("sequence", [0, 1, 9, 10])
def test_a_message_from_before_the_position_is_skipped(sequence: int) -> None:
    cache = filled_cache()
    sequencer = live(cache)
    assert sequencer.receive(frame(sequence, "a")) is False
    assert (held(cache), sequencer.position) == ("abc", (EPOCH, 10))
    assert sequencer.counts == {"duplicate": 1}


def test_a_gap_drops_nothing_and_waits_for_what_was_missed() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    assert sequencer.receive(frame(13, "a")) is True
    assert sequencer.is_behind
    assert (held(cache), sequencer.position) == ("abc", (EPOCH, 10))
    assert sequencer.counts == {"gaps": 1}


def test_while_behind_nothing_is_applied_out_of_order_and_it_is_one_gap() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    for sequence in (13, 14, 12, 14):
        assert sequencer.receive(frame(sequence, "a")) is True
    assert (held(cache), sequencer.position, sequencer.counts["gaps"]) == ("abc", (EPOCH, 10), 1)


def test_what_was_missed_and_comes_late_over_the_channel_is_applied() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.receive(frame(12, "b"))
    sequencer.receive(frame(11, "a"))
    assert (held(cache), sequencer.position, sequencer.is_behind) == ("bc", (EPOCH, 11), True)


def test_another_epoch_clears_and_goes_on_in_it(caplog: pytest.LogCaptureFixture) -> None:
    cache = filled_cache()
    sequencer = live(cache)
    with caplog.at_level(logging.WARNING):
        sequencer.receive(frame(11, "x", epoch=OTHER_EPOCH))
    assert (held(cache), sequencer.position) == ("", (OTHER_EPOCH, 11))
    assert cache.stats().clears["epoch changed"] == 1
    assert "cleared namespace products: epoch changed" in caplog.text


def test_another_epoch_ends_what_it_was_behind_with() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.receive(frame(13, "x"))
    sequencer.receive(frame(1, "x", epoch=OTHER_EPOCH))
    assert (held(cache), sequencer.position, sequencer.is_behind) == ("", (OTHER_EPOCH, 1), False)


def test_the_first_message_of_a_log_that_was_empty_is_no_gap() -> None:
    cache = filled_cache()
    sequencer = live(cache, head=None)
    sequencer.receive(frame(1, "a"))
    assert (held(cache), sequencer.position) == ("bc", (EPOCH, 1))


def test_any_but_the_first_message_of_a_log_that_was_empty_clears() -> None:
    cache = filled_cache()
    sequencer = live(cache, head=None)
    sequencer.receive(frame(2, "a"))
    assert (held(cache), sequencer.position) == ("", (EPOCH, 2))
    assert clears_of(cache) == {"epoch changed": 1}


def test_a_made_up_position_without_an_epoch_does_not_hide_the_first_message() -> None:
    cache = filled_cache()
    sequencer = live(cache, head=None)
    sequencer.receive(frame(1, "x", epoch=""))
    sequencer.receive(frame(1, "a"))
    assert (held(cache), sequencer.position) == ("bc", (EPOCH, 1))


@pytest.mark.parametrize("bad", [b"now", b"", b"\xff", b'{"v":2,"keys":["a"]}', b'{"keys":[]}'], ids=repr)
def test_an_unreadable_message_clears_the_namespace(bad: bytes, caplog: pytest.LogCaptureFixture) -> None:
    cache = filled_cache()
    sequencer = live(cache)
    with caplog.at_level(logging.WARNING):
        assert sequencer.receive(bad) is True
    assert (held(cache), sequencer.position) == ("", (EPOCH, 10))
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
    assert (held(cache), sequencer.position) == ("bc", (EPOCH, 10))
    assert sequencer.counts == {"applied": 1, "unsequenced": 1}


def test_every_cache_of_the_namespace_is_told() -> None:
    one, other = filled_cache(), filled_cache()
    sequencer = Sequencer(NAMESPACE, [one, other])
    sequencer.restart(None, "subscribed")
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
    assert (held(cache), sequencer.position) == ("abc", (EPOCH, 11))
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


def test_its_own_invalidation_that_is_read_from_the_log_is_not_applied_again() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    own = invalidation_of([Keys("a")], namespace=NAMESPACE)
    sequencer.apply_own(own)
    cache["a"] = "new"
    assert sequencer.receive(frame(12, "a", id=own.id)) is True
    assert sequencer.replay([entry(11, "b"), entry(12, "a", id=own.id)])
    assert (held(cache), sequencer.position) == ("ac", (EPOCH, 12))
    assert sequencer.counts == {"applied": 1, "own": 1, "replayed": 2, "gaps": 1}


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


# --- beginning, and beginning again ----------------------------------------------------------------------------------


def test_before_anything_is_known_it_has_no_position() -> None:
    sequencer = Sequencer(NAMESPACE, [filled_cache()])
    assert (sequencer.position, sequencer.is_behind) == (None, False)


@pytest.mark.parametrize("head", [HEAD, None])
def test_beginning_clears_and_takes_the_head_as_the_position(head: Position | None) -> None:
    cache = filled_cache()
    sequencer = Sequencer(NAMESPACE, [cache])
    assert sequencer.resume(head, is_same_server=True) == "subscribed"
    sequencer.restart(head, "subscribed")
    assert (held(cache), sequencer.position, sequencer.is_behind) == ("", head, False)
    assert cache.stats().clears == {"subscribed": 1}


def test_the_first_subscription_is_no_warning_and_every_other_clear_is(caplog: pytest.LogCaptureFixture) -> None:
    sequencer = Sequencer(NAMESPACE, [filled_cache()])
    with caplog.at_level(logging.INFO):
        sequencer.restart(HEAD, "subscribed")
        sequencer.restart(HEAD, "server changed")
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


def test_what_arrives_before_the_first_head_is_known_is_applied_and_decides_nothing() -> None:
    cache = filled_cache()
    sequencer = Sequencer(NAMESPACE, [cache])
    for sequence in (13, 11, 12):
        sequencer.receive(frame(sequence, "a"))
    assert (held(cache), sequencer.position, sequencer.counts) == ("bc", None, {"applied": 3})
    sequencer.restart(Position(EPOCH, 12), "subscribed")
    cache["a"] = "new"
    sequencer.receive(frame(13, "b"))
    assert (held(cache), sequencer.position) == ("a", (EPOCH, 13))


def test_a_cut_in_which_nothing_was_published_costs_nothing() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    assert sequencer.resume(HEAD, is_same_server=True) is None
    assert (held(cache), sequencer.position, sequencer.is_behind) == ("abc", HEAD, False)


def test_a_cut_in_which_something_was_published_leaves_it_behind() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    assert sequencer.resume(Position(EPOCH, 12), is_same_server=True) is None
    assert (held(cache), sequencer.is_behind, sequencer.counts) == ("abc", True, {"gaps": 1})
    assert sequencer.replay([entry(11, "a"), entry(12, "b")])
    assert (held(cache), sequencer.position, sequencer.is_behind) == ("c", (EPOCH, 12), False)


def test_a_message_that_comes_between_the_head_and_its_reader_is_no_log_that_went_back() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.receive(frame(11, "a"))
    assert sequencer.resume(HEAD, is_same_server=True) is None
    assert (held(cache), sequencer.position) == ("bc", (EPOCH, 11))


@pytest.mark.parametrize("head", [HEAD, Position(EPOCH, 12), Position(OTHER_EPOCH, 10), None])
def test_another_server_may_have_lost_what_was_accepted(head: Position | None) -> None:
    assert live(filled_cache()).resume(head, is_same_server=False) == "server changed"


@pytest.mark.parametrize("position", [HEAD, None])
def test_a_log_that_is_not_there_after_a_cut_may_have_come_and_gone(position: Position | None) -> None:
    assert live(filled_cache(), head=position).resume(None, is_same_server=True) == "log lost"


@pytest.mark.parametrize("position", [HEAD, None])
def test_a_log_that_began_anew_during_a_cut_is_told(position: Position | None) -> None:
    resumed = live(filled_cache(), head=position).resume(Position(OTHER_EPOCH, 10), is_same_server=True)
    assert resumed == "epoch changed"


def test_beginning_again_drops_what_it_was_behind_with() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.receive(frame(10**9, "x"))
    sequencer.restart(Position(EPOCH, 11), "log trimmed")
    assert (held(cache), sequencer.position, sequencer.is_behind) == ("", (EPOCH, 11), False)
    cache["a"] = "new"
    sequencer.receive(frame(12, "a"))
    assert (held(cache), sequencer.position) == ("", (EPOCH, 12))


def test_a_load_from_before_a_new_beginning_is_not_stored_after_it() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    token = cache.begin_load("a")
    sequencer.restart(HEAD, "server changed")
    assert cache.store(token, "old") is False


# --- comparing with a head -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "head", "reason"),
    [
        (HEAD, HEAD, None),
        (HEAD, Position(EPOCH, 13), None),
        (HEAD, Position(EPOCH, 9), "log went back"),
        (HEAD, Position(OTHER_EPOCH, 10), "epoch changed"),
        (HEAD, None, "log lost"),
        (None, None, None),
        (None, Position(EPOCH, 1), "epoch changed"),
    ],
)
def test_an_echo_finds_what_no_message_told(
    position: Position | None, head: Position | None, reason: str | None
) -> None:
    cache = filled_cache()
    sequencer = live(cache, head=position)
    assert sequencer.check(head, sequencer.position) == reason
    assert (held(cache), sequencer.position) == ("abc", position)
    assert sequencer.is_behind is (head == Position(EPOCH, 13))


def test_what_came_after_the_echo_was_asked_does_not_make_its_head_an_old_one() -> None:
    sequencer = live(filled_cache())
    before = sequencer.position
    sequencer.receive(frame(11, "a"))
    assert sequencer.check(HEAD, before) is None
    assert not sequencer.is_behind


def test_the_first_message_of_all_after_the_echo_was_asked_is_no_lost_log() -> None:
    sequencer = live(filled_cache(), head=None)
    before = sequencer.position
    sequencer.receive(frame(1, "a"))
    assert sequencer.check(None, before) is None


def test_another_epoch_that_came_after_the_echo_was_asked_clears_once() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    before = sequencer.position
    sequencer.receive(frame(3, "a", epoch=OTHER_EPOCH))
    assert sequencer.check(HEAD, before) is None
    assert cache.stats().clears == {"subscribed": 1, "epoch changed": 1}
    assert sequencer.position == (OTHER_EPOCH, 3)


# --- replaying -------------------------------------------------------------------------------------------------------


def behind(cache: LocalCache, *, head: int) -> Sequencer:
    sequencer = live(cache)
    assert sequencer.check(Position(EPOCH, head), HEAD) is None
    return sequencer


def test_a_replay_in_pages_applies_each_entry_once_and_in_order() -> None:
    cache = filled_cache()
    sequencer = behind(cache, head=13)
    assert sequencer.replay([entry(11, "a"), entry(12, "b")])
    assert (held(cache), sequencer.sequence, sequencer.is_behind) == ("c", 12, True)
    assert sequencer.replay([entry(13, "c")])
    assert (held(cache), sequencer.sequence, sequencer.is_behind) == ("", 13, False)
    assert sequencer.counts == {"applied": 3, "replayed": 3, "gaps": 1}
    assert clears_of(cache) == {}


def test_a_replay_skips_what_came_over_the_channel_meanwhile() -> None:
    cache = filled_cache()
    sequencer = behind(cache, head=12)
    sequencer.receive(frame(11, "a"))
    cache["a"] = "new"
    assert sequencer.replay([entry(11, "a"), entry(12, "b")])
    assert (held(cache), sequencer.position) == ("ac", (EPOCH, 12))


def test_a_replay_may_reach_further_than_was_known_and_the_channel_repeats_it() -> None:
    cache = filled_cache()
    sequencer = behind(cache, head=11)
    assert sequencer.replay([entry(11, "a"), entry(12, "b")])
    cache["b"] = "new"
    assert sequencer.receive(frame(12, "b")) is False
    assert (held(cache), sequencer.position, sequencer.counts["duplicate"]) == ("bc", (EPOCH, 12), 1)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [entry(12, "x")],
        [entry(11, "x"), entry(13, "x")],
        [Entry(11, None)],
        [entry(11, "x", epoch=OTHER_EPOCH)],
        [Entry(11, entry(12, "x").invalidation)],
        [Entry(11, decode(b'{"keys":["x"]}', NAMESPACE))],
    ],
    ids=["nothing", "trimmed", "a hole", "unreadable", "another epoch", "another sequence", "no position"],
)
def test_a_log_that_does_not_hold_what_was_missed_is_told(entries: list[Entry]) -> None:
    sequencer = behind(filled_cache(), head=13)
    assert sequencer.replay(entries) is False


def test_an_unreadable_entry_does_not_take_the_place_of_the_real_one() -> None:
    """Somebody writes to the log where the next entry belongs; the log's script then begins the log again."""
    cache = filled_cache()
    sequencer = behind(cache, head=11)
    assert sequencer.replay([entry(11, "x"), Entry(12, None)]) is False
    sequencer.receive(frame(12, "a"))
    assert (held(cache), sequencer.position) == ("bc", (EPOCH, 12))


def test_an_empty_page_is_no_hole_when_the_channel_has_brought_the_rest() -> None:
    sequencer = behind(filled_cache(), head=11)
    sequencer.receive(frame(11, "a"))
    assert sequencer.replay([]) is True


def test_a_replay_for_an_epoch_that_has_ended_meanwhile_is_refused() -> None:
    cache = filled_cache()
    sequencer = behind(cache, head=12)
    sequencer.receive(frame(10, "x", epoch=OTHER_EPOCH))
    assert sequencer.replay([entry(11, "a"), entry(12, "b")]) is False
    assert sequencer.position == (OTHER_EPOCH, 10)


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


def test_a_clear_leaves_dead_entries_whatever_the_message_names() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    assert sequencer.receive(frame(1, "x", epoch=OTHER_EPOCH)) is True
    assert cache.has_sweep_work
