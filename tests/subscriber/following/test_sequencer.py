"""The sequencer: everything that arrives is applied, numbers decide about the position, and doubt drops everything."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from broadcache.shared import Everything, Invalidation, Keys, Prefixes, Tags, Target
from broadcache.shared.invalidation import Anchor, invalidation_of
from broadcache.shared.transport.redis.log import Entry
from broadcache.shared.wire import decode, digest_of, encode
from broadcache.subscriber import LocalCache
from broadcache.subscriber.following.sequencer import Mark, Sequencer

NAMESPACE = "products"
EPOCH = "01JDCM00000000000000000000"
OTHER_EPOCH = "01JDCM00000000000000000001"


def frame(sequence: int | None, *keys: str, epoch: str = EPOCH, id: str = "", **fields: Any) -> bytes:
    position = {} if sequence is None else {"seq": sequence, "epoch": epoch}
    return encode(Invalidation(keys=keys or ("x",), id=id, namespace=NAMESPACE, **position, **fields))  # type: ignore[arg-type]


def entry(sequence: int, *keys: str, epoch: str = EPOCH, id: str = "") -> Entry:
    """What is read from the log: the same as comes over the channel."""
    bytes_ = frame(sequence, *keys, epoch=epoch, id=id)
    return Entry(sequence, decode(bytes_, NAMESPACE), bytes_)


def anchor(sequence: int, *keys: str, epoch: str = EPOCH) -> Anchor:
    return Anchor(epoch, sequence, digest_of(frame(sequence, *keys, epoch=epoch)) if sequence else "")


HEAD = anchor(10)


def filled_cache() -> LocalCache:
    cache = LocalCache({})
    cache.confirm_coherent(cache.clock() + 3_600)
    refill(cache)
    return cache


def refill(cache: LocalCache) -> None:
    for key in ("a", "b", "c"):
        cache.store(cache.begin_load(key), key, tags=(f"tag-{key}",))


def live(*caches: LocalCache, head: Anchor | None = HEAD) -> Sequencer:
    """A sequencer that has subscribed at `head`, and has been proven there; the caches are filled afterwards."""
    sequencer = Sequencer(NAMESPACE, caches)
    assert sequencer.resume(head, is_same_server=False) == "subscribed"
    sequencer.restart(head, "subscribed")
    for cache in caches:
        refill(cache)
    return sequencer


def echo(sequencer: Sequencer, head: Anchor, mark: Mark | None = None) -> str | None:
    """Do what an echo does that finds nothing to read from the log."""
    mark = mark or sequencer.mark()
    reason = sequencer.compare(mark, head)
    if reason is None and not sequencer.is_behind:
        sequencer.prove(mark, head)
    return reason


def replay(sequencer: Sequencer, entries: Sequence[Entry], *, is_end: bool = True) -> bool:
    return sequencer.replay(entries, claimed=sequencer.claimed, is_end=is_end)


def clears_of(cache: LocalCache) -> dict[str, int]:
    """How often everything was dropped after the first subscription, by reason."""
    return {reason: count for reason, count in cache.stats().clears.items() if reason != "subscribed"}


def held(cache: LocalCache) -> str:
    return "".join(sorted(cache))


# --- whatever arrives is applied -------------------------------------------------------------------------------------


def test_messages_in_order_are_applied_and_move_the_position() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.receive(frame(11, "a"))
    assert (held(cache), sequencer.position) == ("bc", (EPOCH, 11))
    sequencer.receive(frame(12, "b"))
    assert (held(cache), sequencer.position) == ("c", (EPOCH, 12))
    assert sequencer.counts == {"applied": 2}


@pytest.mark.parametrize("sequence", [0, 1, 9, 10])
def test_a_message_from_before_the_position_is_applied_and_moves_nothing(sequence: int) -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.receive(frame(sequence, "a"))
    assert (held(cache), sequencer.position) == ("bc", (EPOCH, 10))
    assert sequencer.counts == {"applied": 1, "duplicate": 1}


def test_a_forged_next_position_hides_nothing() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.receive(frame(11, "x", id="forged"))
    sequencer.receive(frame(11, "a"))
    assert (held(cache), sequencer.position) == ("bc", (EPOCH, 11))


@pytest.mark.parametrize("sequence", [12, 13, 10**9, 2**53 - 1])
def test_a_message_beyond_a_gap_is_applied_at_once_and_the_log_is_looked_into(sequence: int) -> None:
    cache = filled_cache()
    sequencer = live(cache)
    assert sequencer.receive(frame(sequence, "a")) is True
    assert (held(cache), sequencer.position, sequencer.is_behind) == ("bc", (EPOCH, 10), True)
    assert sequencer.counts == {"applied": 1, "gaps": 1}


def test_a_message_of_another_epoch_is_applied_and_moves_nothing() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    for sequence in (1, 11, 12):
        sequencer.receive(frame(sequence, "a", epoch=OTHER_EPOCH))
    assert (held(cache), sequencer.position, sequencer.is_behind) == ("bc", (EPOCH, 10), False)
    assert sequencer.counts == {"applied": 3, "foreign": 3}
    assert clears_of(cache) == {}


def test_a_message_without_a_position_is_applied_and_counted() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.receive(b'{"keys":["a"]}')
    assert (held(cache), sequencer.position) == ("bc", (EPOCH, 10))
    assert sequencer.counts == {"applied": 1, "unsequenced": 1}


def test_what_arrives_before_any_log_is_known_is_applied_and_decides_nothing() -> None:
    cache = filled_cache()
    sequencer = Sequencer(NAMESPACE, [cache])
    for sequence in (13, 11, 12):
        sequencer.receive(frame(sequence, "a"))
    assert (held(cache), sequencer.position, sequencer.is_behind) == ("bc", None, False)


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


def test_every_cache_of_the_namespace_is_told() -> None:
    one, other = filled_cache(), filled_cache()
    sequencer = live(one, other)
    sequencer.receive(frame(11, "a"))
    assert (held(one), held(other)) == ("bc", "bc")


class AskingCache(LocalCache):
    """Notes the position of its sequencer whenever an invalidation is applied to it."""

    def __init__(self) -> None:
        super().__init__({})
        self.sequencer: Sequencer | None = None
        self.seen: list[int] = []

    def apply_invalidation(self, invalidation: Invalidation, *, reason: str = "invalidation") -> None:
        super().apply_invalidation(invalidation, reason=reason)
        if self.sequencer is not None:
            self.seen.append(self.sequencer.sequence)


@pytest.mark.parametrize("way", ["channel", "log"])
def test_the_position_moves_when_every_cache_has_applied_it(way: str) -> None:
    one, other = AskingCache(), AskingCache()
    sequencer = live(one, other)
    one.sequencer = other.sequencer = sequencer
    if way == "channel":
        sequencer.receive(frame(11, "a"))
    else:
        assert sequencer.compare(sequencer.mark(), anchor(11, "a")) is None
        assert replay(sequencer, [entry(10), entry(11, "a")])
    assert (one.seen, other.seen, sequencer.sequence) == ([10], [10], 11)


# --- its own ---------------------------------------------------------------------------------------------------------


def test_its_own_invalidation_is_applied_before_it_is_published_and_when_it_comes_back() -> None:
    """What was loaded in between may have been read before it was accepted, from a source that lags."""
    cache = filled_cache()
    sequencer = live(cache)
    own = invalidation_of([Keys("a")], namespace=NAMESPACE)
    sequencer.apply_own(own)
    assert held(cache) == "bc"
    cache["a"] = "read from a replica of the database that lags"
    sequencer.receive(frame(11, "a", id=own.id))
    assert (held(cache), sequencer.position) == ("bc", (EPOCH, 11))
    assert sequencer.counts == {"applied": 1}


# --- what is posted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent_at_ms", [None, 1_700_000_000_000])
def test_what_was_posted_in_advance_spares_nothing_that_is_logged(sent_at_ms: int | None) -> None:
    cache = filled_cache()
    sequencer = live(cache)
    posted = Invalidation(keys=("a",), id="foreseen", namespace=NAMESPACE, sent_at_ms=sent_at_ms)
    assert sequencer.apply_posted(posted) == 1
    cache["a"] = "old"  # the source has not changed yet
    sequencer.receive(frame(11, "a", id="foreseen", sent_at_ms=sent_at_ms))
    assert (held(cache), sequencer.position) == ("bc", (EPOCH, 11))


def test_what_was_published_spares_nothing_that_is_posted() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.receive(frame(11, "a", id="one"))
    cache["a"] = "loaded since"
    assert sequencer.apply_posted(Invalidation(keys=("a",), id="one", namespace=NAMESPACE)) == 1
    assert held(cache) == "bc"


def test_what_is_posted_moves_no_position() -> None:
    sequencer = live(filled_cache())
    sequencer.apply_posted(Invalidation(keys=("a",), id="one", epoch=EPOCH, seq=11))
    assert (sequencer.position, sequencer.is_behind) == ((EPOCH, 10), False)


# --- beginning, and beginning again ----------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [HEAD, anchor(0), None])
def test_beginning_clears_and_takes_the_head_as_the_position(head: Anchor | None) -> None:
    cache = filled_cache()
    sequencer = Sequencer(NAMESPACE, [cache])
    assert (sequencer.position, sequencer.is_behind) == (None, False)
    assert sequencer.resume(head, is_same_server=True) == "subscribed"
    sequencer.restart(head, "subscribed")
    assert (held(cache), sequencer.position, sequencer.proven) == ("", head and head.position, head)
    assert cache.stats().clears == {"subscribed": 1}


def test_the_log_that_the_first_echo_begins_is_taken_without_another_clear() -> None:
    cache = filled_cache()
    sequencer = live(cache, head=None)
    assert echo(sequencer, anchor(0)) is None
    assert (held(cache), sequencer.position, sequencer.proven) == ("abc", (EPOCH, 0), anchor(0))
    sequencer.receive(frame(1, "a"))
    assert (held(cache), sequencer.position) == ("bc", (EPOCH, 1))


def test_the_first_subscription_is_no_warning_and_every_other_clear_is(caplog: pytest.LogCaptureFixture) -> None:
    sequencer = Sequencer(NAMESPACE, [filled_cache()])
    with caplog.at_level(logging.INFO):
        sequencer.restart(HEAD, "subscribed")
        sequencer.restart(HEAD, "server changed")
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


def test_a_cut_in_which_nothing_was_published_costs_nothing() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.rewind()
    assert sequencer.resume(HEAD, is_same_server=True) is None
    assert replay(sequencer, [entry(10)])
    assert (held(cache), sequencer.position, sequencer.is_behind) == ("abc", HEAD.position, False)
    assert sequencer.counts["gaps"] == 0


def test_a_head_that_was_counted_back_does_not_hide_what_the_log_has() -> None:
    """A foreign hand takes one off, and an older publisher adds one: the digest beside the head is an old one."""
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.rewind()
    assert sequencer.resume(HEAD, is_same_server=True) is None
    assert sequencer.is_behind
    assert replay(sequencer, [entry(10, "a")]) is False


def test_a_cut_in_which_something_was_published_leaves_it_behind() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.rewind()
    assert sequencer.resume(anchor(12, "b"), is_same_server=True) is None
    assert (held(cache), sequencer.is_behind, sequencer.counts) == ("abc", True, {"gaps": 1})
    assert replay(sequencer, [entry(10), entry(11, "a"), entry(12, "b")])
    assert (held(cache), sequencer.position, sequencer.is_behind) == ("c", (EPOCH, 12), False)


def test_after_a_cut_it_goes_on_from_what_was_proven_and_not_from_what_was_heard() -> None:
    """A forged 11, a cut, and the real 11 and 12 accepted meanwhile do not add up."""
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.receive(frame(11, "x", id="forged"))
    sequencer.rewind()
    assert sequencer.position == HEAD.position
    assert sequencer.resume(anchor(12, "b"), is_same_server=True) is None
    assert replay(sequencer, [entry(10), entry(11, "a"), entry(12, "b")])
    assert held(cache) == "c"


def test_what_is_forged_between_the_subscription_and_the_head_fills_no_gap() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.rewind()
    sequencer.receive(frame(11, "x", id="forged"))
    sequencer.receive(frame(12, "b"))
    assert sequencer.resume(anchor(12, "b"), is_same_server=True) is None
    assert (sequencer.position, sequencer.is_behind) == (HEAD.position, True)
    assert replay(sequencer, [entry(10), entry(11, "a"), entry(12, "b")])
    assert held(cache) == "c"


def test_a_message_that_comes_between_the_head_and_its_reader_is_no_log_that_went_back() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.rewind()
    sequencer.receive(frame(11, "a"))
    assert sequencer.resume(HEAD, is_same_server=True) is None
    assert replay(sequencer, [entry(10), entry(11, "a")])
    assert (held(cache), sequencer.position) == ("bc", (EPOCH, 11))


@pytest.mark.parametrize(
    ("head", "is_same_server", "reason"),
    [
        (HEAD, False, "server changed"),
        (anchor(12), False, "server changed"),
        (None, False, "server changed"),
        (None, True, "log lost"),
        (anchor(10, epoch=OTHER_EPOCH), True, "epoch changed"),
        (anchor(9), True, "log went back"),
        (anchor(10, "another"), True, "another history"),
    ],
)
def test_what_cannot_be_gone_on_from_is_told(head: Anchor | None, is_same_server: bool, reason: str) -> None:
    sequencer = live(filled_cache())
    sequencer.rewind()
    assert sequencer.resume(head, is_same_server=is_same_server) == reason


def test_beginning_again_drops_what_it_was_behind_with() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.receive(frame(10**9, "x"))
    sequencer.restart(anchor(11), "log trimmed")
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
    ("head", "reason"),
    [
        (HEAD, None),
        (anchor(13), None),
        (anchor(9), "log went back"),
        (anchor(10, "another"), "another history"),
        (anchor(10, epoch=OTHER_EPOCH), "epoch changed"),
        (anchor(0, epoch=OTHER_EPOCH), "epoch changed"),
    ],
)
def test_an_echo_finds_what_no_message_told(head: Anchor, reason: str | None) -> None:
    cache = filled_cache()
    sequencer = live(cache)
    assert sequencer.compare(sequencer.mark(), head) == reason
    assert (held(cache), sequencer.position) == ("abc", HEAD.position)
    assert sequencer.is_behind is (head == anchor(13))


def test_a_frame_that_the_log_does_not_have_is_another_history() -> None:
    sequencer = live(filled_cache())
    sequencer.receive(frame(11, "x", id="forged"))
    assert echo(sequencer, HEAD) == "log went back"
    assert echo(sequencer, anchor(11, "a")) == "another history"


def test_what_an_echo_has_proven_is_what_recovery_goes_on_from() -> None:
    sequencer = live(filled_cache())
    sequencer.receive(frame(11, "a"))
    assert sequencer.proven == HEAD
    assert echo(sequencer, anchor(11, "a")) is None
    assert sequencer.proven == anchor(11, "a")


def test_what_came_after_the_probe_does_not_make_its_head_an_old_one() -> None:
    sequencer = live(filled_cache())
    mark = sequencer.mark()
    sequencer.receive(frame(11, "a"))
    assert echo(sequencer, HEAD, mark) is None
    assert (sequencer.is_behind, sequencer.position, sequencer.proven) == (False, (EPOCH, 11), HEAD)


def test_what_is_forged_after_the_probe_fills_no_gap() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    mark = sequencer.mark()
    sequencer.receive(frame(11, "x", id="forged"))
    assert sequencer.compare(mark, anchor(11, "a")) is None
    assert sequencer.is_behind
    assert replay(sequencer, [entry(10), entry(11, "a")])
    assert held(cache) == "bc"


def test_a_head_that_an_older_publisher_moved_is_compared_by_its_number_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sequencer = live(filled_cache())
    with caplog.at_level(logging.WARNING):
        for sequence in (11, 12):
            sequencer.receive(frame(sequence, "a"))
            assert echo(sequencer, Anchor(EPOCH, sequence, None)) is None
            # What came over the channel is what will be looked for there.
            assert sequencer.proven == anchor(sequence, "a")
        assert echo(sequencer, Anchor(EPOCH, 9, None)) == "log went back"
    assert caplog.text.count("keeps no digest") == 1


# --- replaying -------------------------------------------------------------------------------------------------------


def behind(cache: LocalCache, *, head: int) -> Sequencer:
    sequencer = live(cache)
    assert sequencer.compare(sequencer.mark(), anchor(head)) is None
    return sequencer


def test_a_replay_in_pages_applies_each_entry_in_order() -> None:
    cache = filled_cache()
    sequencer = behind(cache, head=13)
    assert replay(sequencer, [entry(10), entry(11, "a"), entry(12, "b")], is_end=False)
    assert (held(cache), sequencer.sequence, sequencer.is_behind) == ("c", 12, True)
    assert replay(sequencer, [entry(12, "b"), entry(13, "c")])
    assert (held(cache), sequencer.sequence, sequencer.is_behind) == ("", 13, False)
    assert sequencer.counts == {"applied": 3, "replayed": 3, "gaps": 1}
    assert clears_of(cache) == {}


def test_what_was_read_behind_what_was_proven_need_not_be_read_again() -> None:
    sequencer = behind(filled_cache(), head=13)
    assert replay(sequencer, [entry(10), entry(11, "a"), entry(12, "b")], is_end=False)
    sequencer.rewind()
    assert sequencer.proven == anchor(12, "b") == sequencer.mark().anchor


def test_what_was_read_behind_what_was_only_heard_proves_nothing() -> None:
    sequencer = live(filled_cache())
    sequencer.receive(frame(11, "x"))
    assert sequencer.compare(sequencer.mark(), anchor(12)) is None
    assert replay(sequencer, [entry(11, "x"), entry(12)])
    assert sequencer.proven == HEAD


def test_a_replay_applies_also_what_came_over_the_channel_meanwhile() -> None:
    """It may have been forged."""
    cache = filled_cache()
    sequencer = behind(cache, head=12)
    sequencer.receive(frame(11, "x", id="forged"))
    assert replay(sequencer, [entry(10), entry(11, "a"), entry(12, "b")])
    assert (held(cache), sequencer.position) == ("c", (EPOCH, 12))


def test_when_the_gap_is_closed_it_goes_on_behind_what_came_beyond_it() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    for sequence in (12, 13):
        sequencer.receive(frame(sequence, "b"))
    assert sequencer.backlog == 1
    assert replay(sequencer, [entry(10), entry(11, "a")], is_end=False)
    assert (held(cache), sequencer.position, sequencer.is_behind) == ("c", (EPOCH, 13), False)
    assert sequencer.mark().anchor == anchor(13, "b")


def test_what_fills_a_gap_over_the_channel_may_be_forged_and_closes_none() -> None:
    """A cut, in which the real 11 was accepted; a real 12 and a forged 11 behind the new subscription."""
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.rewind()
    sequencer.receive(frame(12, "b"))
    sequencer.receive(frame(11, "x", id="forged"))
    assert (held(cache), sequencer.position, sequencer.is_behind) == ("ac", HEAD.position, True)
    assert sequencer.resume(anchor(12, "b"), is_same_server=True) is None
    assert replay(sequencer, [entry(10), entry(11, "a"), entry(12, "b")])
    assert (held(cache), sequencer.position, sequencer.is_behind) == ("c", (EPOCH, 12), False)


def test_between_two_pages_the_channel_moves_nothing() -> None:
    cache = filled_cache()
    sequencer = behind(cache, head=13)
    assert replay(sequencer, [entry(10), entry(11)], is_end=False)
    for sequence in (12, 13, 14):
        sequencer.receive(frame(sequence, "x", id="forged"))
    assert (sequencer.position, sequencer.is_behind) == ((EPOCH, 11), True)
    assert replay(sequencer, [entry(11), entry(12, "a"), entry(13, "b")])
    assert (held(cache), sequencer.is_behind) == ("c", False)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [entry(11, "x")],
        [entry(12, "x")],
        [entry(10), entry(12, "x")],
        [entry(10), entry(11, "x"), entry(13, "x")],
        [entry(10), Entry(11, None, b"scribble")],
        [entry(10), entry(11, "x", epoch=OTHER_EPOCH)],
        [entry(10), Entry(11, entry(12, "x").invalidation, frame(12, "x"))],
        [entry(10), Entry(11, decode(b'{"keys":["x"]}', NAMESPACE), b'{"keys":["x"]}')],
        [entry(10, "another"), entry(11), entry(12), entry(13)],
        [entry(10)],
        [entry(10), entry(11), entry(12)],
    ],
    ids=[
        *("nothing", "own place trimmed", "trimmed", "a hole", "a later hole", "unreadable", "another epoch"),
        *("another sequence", "no position", "another history", "less than the head told", "less by one"),
    ],
)
def test_a_log_that_does_not_continue_what_was_applied_is_told(entries: list[Entry]) -> None:
    sequencer = behind(filled_cache(), head=13)
    assert replay(sequencer, entries) is False


def test_a_log_that_begins_at_its_first_entry_continues_what_was_never_published_to() -> None:
    cache = filled_cache()
    sequencer = live(cache, head=anchor(0))
    assert sequencer.compare(sequencer.mark(), anchor(2)) is None
    assert replay(sequencer, [entry(1, "a"), entry(2, "b")])
    assert (held(cache), sequencer.position) == ("c", (EPOCH, 2))


def test_a_place_that_a_frame_claims_and_the_log_does_not_have_is_forgotten() -> None:
    cache = filled_cache()
    sequencer = live(cache)
    sequencer.receive(frame(10**9, "x", id="forged"))
    assert replay(sequencer, [entry(10)])
    assert (held(cache), sequencer.position, sequencer.is_behind) == ("abc", (EPOCH, 10), False)
    assert sequencer.counts["unlogged"] == 1
    sequencer.receive(frame(11, "a"))
    assert (held(cache), sequencer.position) == ("bc", (EPOCH, 11))


def test_what_is_claimed_after_the_log_was_asked_is_looked_for_again() -> None:
    sequencer = live(filled_cache())
    sequencer.receive(frame(12, "x"))
    claimed = sequencer.claimed
    sequencer.receive(frame(20, "x"))
    assert sequencer.replay([entry(10)], claimed=claimed, is_end=True)
    assert sequencer.is_behind


def test_an_unreadable_entry_does_not_take_the_place_of_the_real_one() -> None:
    """Another writer puts something where the next entry belongs; the log's script then begins the log again."""
    cache = filled_cache()
    sequencer = behind(cache, head=11)
    assert replay(sequencer, [entry(10), entry(11, "x"), Entry(12, None, b"scribble")]) is False
    sequencer.restart(anchor(11, "x"), "log trimmed")
    refill(cache)
    sequencer.receive(frame(12, "a"))
    assert (held(cache), sequencer.position) == ("bc", (EPOCH, 12))


# --- what is reported ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence", [9, 11, 15])
def test_a_report_has_the_digest_of_the_frame_that_was_applied(sequence: int) -> None:
    sequencer = live(filled_cache())
    sent = frame(sequence, "a", id="one", confirm=True)
    assert sequencer.receive(sent) is True
    [(report, _)] = sequencer.reports
    assert (report.id, report.epoch, report.seq) == ("one", EPOCH, sequence)
    assert (report.digest, report.outcome, report.dropped) == (digest_of(sent), "applied", 1)


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
