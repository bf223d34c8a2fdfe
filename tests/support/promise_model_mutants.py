"""Replicas that are broken on purpose: each rule of the protocol left out, or an old one put back.

Each is a function that breaks the real classes for the length of a test.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeAlias

import pytest
from tests.support.promise_model import targets_of
from tests.support.promise_model_mapping import MappingBroken

from broadcache.shared import Invalidation, LinkLost, MalformedFrame
from broadcache.shared.invalidation import Anchor
from broadcache.shared.transport.redis import log
from broadcache.shared.transport.redis.link import Link
from broadcache.shared.transport.redis.log import Entry, Heads, Identity
from broadcache.shared.wire import decode
from broadcache.subscriber import LocalCache
from broadcache.subscriber.cache.loading.load import Load
from broadcache.subscriber.cache.loading.loads import Loads
from broadcache.subscriber.cache.loading.many import LoadsOfMany
from broadcache.subscriber.following import follower as follower_module
from broadcache.subscriber.following import log_reader as log_reader_module
from broadcache.subscriber.following.follower import Follower
from broadcache.subscriber.following.log_reader import LogReader
from broadcache.subscriber.following.sequencer import Mark, Sequencer

Mutant: TypeAlias = Callable[[pytest.MonkeyPatch], None]
Skips: TypeAlias = Callable[[Sequencer, Invalidation], bool]


# --- what arrives ----------------------------------------------------------------------------------------------------


def _have_skipped(monkeypatch: pytest.MonkeyPatch, skips: Skips) -> None:
    """Have sequencers move the position for some messages, and apply nothing of them."""
    receive, apply = Sequencer.receive, Sequencer._apply

    def receive_some(self: Sequencer, frame: bytes) -> bool:
        try:
            is_skipped = skips(self, decode(frame, self.namespace))
        except MalformedFrame:
            is_skipped = False
        caches = self.caches
        self.caches = () if is_skipped else caches
        try:
            return receive(self, frame)
        finally:
            self.caches = caches

    def apply_some(self: Sequencer, invalidation: Invalidation, frame: bytes) -> None:
        if not skips(self, invalidation):
            apply(self, invalidation, frame)

    monkeypatch.setattr(Sequencer, "receive", receive_some)
    monkeypatch.setattr(Sequencer, "_apply", apply_some)


def a_number_that_was_reached_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def skips(self: Sequencer, invalidation: Invalidation) -> bool:
        return invalidation.epoch == self._epoch and (invalidation.seq or math.inf) <= self.sequence

    _have_skipped(monkeypatch, skips)


def a_frame_beyond_a_gap_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def skips(self: Sequencer, invalidation: Invalidation) -> bool:
        return invalidation.epoch == self._epoch and (invalidation.seq or 0) > self.sequence + 1

    _have_skipped(monkeypatch, skips)


def what_was_posted_is_skipped_when_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    apply_posted = Sequencer.apply_posted
    posted: set[str] = set()

    def note(self: Sequencer, invalidation: Invalidation) -> int:
        posted.add(invalidation.id)
        return apply_posted(self, invalidation)

    monkeypatch.setattr(Sequencer, "apply_posted", note)
    _have_skipped(monkeypatch, lambda _, invalidation: invalidation.id in posted)


def what_was_posted_with_equal_targets_is_skipped_when_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    apply_posted = Sequencer.apply_posted
    posted: set[tuple[object, ...]] = set()

    def note(self: Sequencer, invalidation: Invalidation) -> int:
        posted.add((invalidation.id, targets_of(invalidation), invalidation.sent_at_ms))
        return apply_posted(self, invalidation)

    monkeypatch.setattr(Sequencer, "apply_posted", note)
    _have_skipped(monkeypatch, lambda _, each: (each.id, targets_of(each), each.sent_at_ms) in posted)


def own_messages_are_known_by_the_stem_of_their_id(monkeypatch: pytest.MonkeyPatch) -> None:
    apply_own = Sequencer.apply_own
    own: set[str] = set()

    def note(self: Sequencer, invalidation: Invalidation) -> None:
        own.add(invalidation.id)
        apply_own(self, invalidation)

    monkeypatch.setattr(Sequencer, "apply_own", note)
    _have_skipped(monkeypatch, lambda _, invalidation: invalidation.id.partition(".")[0] in own)


def what_is_posted_is_noted_and_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sequencer, "apply_posted", lambda *_: 0)


def what_is_posted_moves_the_position(monkeypatch: pytest.MonkeyPatch) -> None:
    apply_posted = Sequencer.apply_posted

    def apply_and_move(self: Sequencer, invalidation: Invalidation) -> int:
        self._sequence = self.sequence + 1
        return apply_posted(self, invalidation)

    monkeypatch.setattr(Sequencer, "apply_posted", apply_and_move)


def no_gap_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Sequencer._place

    def go_on(self: Sequencer, epoch: str | None, sequence: int, frame: bytes) -> None:
        if epoch == self._epoch and sequence > self.sequence:
            self._sequence, self._content = sequence, frame
        else:
            place(self, epoch, sequence, frame)

    monkeypatch.setattr(Sequencer, "_place", go_on)


def an_epoch_is_adopted_from_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Sequencer._place

    def adopt(self: Sequencer, epoch: str | None, sequence: int, frame: bytes) -> None:
        if self._epoch is not None and epoch != self._epoch:
            self._epoch, self._sequence, self._content = epoch, sequence, frame
        else:
            place(self, epoch, sequence, frame)

    monkeypatch.setattr(Sequencer, "_place", adopt)


# --- echoes ----------------------------------------------------------------------------------------------------------


def an_echo_compares_no_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sequencer, "compare", lambda *_: None)


def an_echo_compares_the_position_of_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one of the moment when its probe was handled: what came behind the probe counts as before the head."""
    compare = Sequencer.compare
    monkeypatch.setattr(Sequencer, "compare", lambda self, _, head: compare(self, self.mark(), head))


def an_echo_counts_from_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    confirm = Follower._confirm
    monkeypatch.setattr(Follower, "_confirm", lambda self, _, caches: confirm(self, self._clock(), caches))


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


def no_digests_are_compared_at_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Anchor, "contradicts", lambda *_: False)


def a_head_without_digest_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    resume = Sequencer.resume

    def believe(self: Sequencer, head: Anchor | None, *, is_same_server: bool) -> str | None:
        reason = resume(self, head, is_same_server=is_same_server)
        if reason is None and head is not None and self._proven is not None and head.sequence == self._proven.sequence:
            self._is_behind = False
        return reason

    monkeypatch.setattr(Sequencer, "resume", believe)


def a_proven_position_without_digest_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    resume = Sequencer.resume

    def believe(self: Sequencer, head: Anchor | None, *, is_same_server: bool) -> str | None:
        reason = resume(self, head, is_same_server=is_same_server)
        if reason == "digest unknown" and head is not None and self._proven is not None:
            self._go_back(Mark(*self._proven), head)
            return None
        return reason

    monkeypatch.setattr(Sequencer, "resume", believe)


# --- the log ---------------------------------------------------------------------------------------------------------


def a_replay_skips_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    def replay(self: Sequencer, entries: Sequence[Entry], **_: object) -> bool:
        for entry in entries:
            if entry.invalidation is not None and entry.sequence > self.sequence:
                self._apply(entry.invalidation, entry.frame)
                self._sequence, self._content = entry.sequence, entry.frame
        self._head_sequence, self._run, self._is_behind = 0, None, False
        return True

    monkeypatch.setattr(Sequencer, "replay", replay)


def a_replay_compares_no_digest_at_its_own_position(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Sequencer.replay

    def believe(self: Sequencer, entries: Sequence[Entry], **settings: Any) -> bool:
        self._content = None
        return replay(self, entries, **settings)

    monkeypatch.setattr(Sequencer, "replay", believe)


def a_replay_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: object) -> bool:
        return True

    monkeypatch.setattr(LogReader, "catch_up", nothing)


def a_claim_of_the_head_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = Sequencer._go_on

    def drop(self: Sequencer, claimed: int, *, is_end: bool) -> bool:
        if is_end:
            self._head_sequence = min(self._head_sequence, self._sequence)
        return go_on(self, claimed, is_end=is_end)

    monkeypatch.setattr(Sequencer, "_go_on", drop)


def a_page_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async def in_time(link: Link, answer: Coroutine[Any, Any, Any], seconds: float) -> Any:
        try:
            return await asyncio.wait_for(answer, seconds)
        except TimeoutError:
            raise LinkLost("the page took too long") from None

    monkeypatch.setattr(log_reader_module, "_while_receiving", in_time)


# --- links -----------------------------------------------------------------------------------------------------------


def any_server_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    resume = Sequencer.resume
    monkeypatch.setattr(Sequencer, "resume", lambda self, head, **_: resume(self, head, is_same_server=True))


def unknown_servers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Identity, "is_known", True)


def a_replica_goes_on_from_its_live_position(monkeypatch: pytest.MonkeyPatch) -> None:
    resume = Sequencer.resume

    def go_on(self: Sequencer, head: Anchor | None, *, is_same_server: bool) -> str | None:
        if self._proven is not None:
            self._proven = self.mark().anchor
        return resume(self, head, is_same_server=is_same_server)

    monkeypatch.setattr(Sequencer, "rewind", lambda _: None)
    monkeypatch.setattr(Sequencer, "resume", go_on)


def a_subscription_is_taken_for_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that was demoted accepts every subscription, and its heads stand still."""
    recover, echo = Follower._recover, Follower._echo
    known: list[Link] = []

    async def recover_and_claim(self: Follower, link: Link) -> Identity:
        server = await recover(self, link)
        self._confirm(self._clock(), self.caches)
        return server

    async def later(self: Follower, link: Link, server: Identity) -> None:
        if known == [link]:
            await echo(self, link, server)
        known[:] = [link]

    monkeypatch.setattr(Follower, "_recover", recover_and_claim)
    monkeypatch.setattr(Follower, "_echo", later)


def a_new_beginning_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def restart(self: Sequencer, head: Anchor | None, reason: str) -> None:
        self._proven = head
        self._move_to(head)
        if reason == "subscribed":
            self.clear(reason)

    monkeypatch.setattr(Sequencer, "restart", restart)


# --- caches ----------------------------------------------------------------------------------------------------------


def a_lost_link_goes_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalCache, "disconnect", lambda _: None)


def a_lease_has_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    renew = LocalCache._renew

    def for_ever(self: LocalCache) -> None:
        renew(self)
        self._serve_until = math.inf if self.upkeep.is_connected else self._serve_until
        self._refresh()

    monkeypatch.setattr(LocalCache, "_renew", for_ever)


def a_load_outlives_what_it_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalCache, "is_void", lambda *_: False)


def a_load_of_many_outlives_what_it_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_many = LoadsOfMany._fill_many

    def fill_late(loads: LoadsOfMany, batch: Load, loaded: Any) -> dict[str, Any]:
        for part in batch.parts:
            part.token = loads._cache.begin_load(part.token.key)
        return fill_many(loads, batch, loaded)

    monkeypatch.setattr(LoadsOfMany, "_fill_many", fill_late)


def the_tags_of_a_loaded_value_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loads, "_fill", _fill_without_tags)


def _fill_without_tags(loads: Any, load: Load, value: Any) -> Any:
    loads._cache.store(load.token, value.value)
    return value.value


def callers_take_the_value_of_a_load_whose_tags_they_did_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loads, "_is_no_result", lambda *_, **__: False)


def what_a_mapping_raises_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalCache, "_clear_after", lambda *_: None, raising=False)


def what_a_mapping_raises_ends_the_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the position moves all the same."""
    receive = Sequencer.receive

    def raise_it(_: LocalCache, error: BaseException) -> None:
        raise error

    def receive_and_move(self: Sequencer, frame: bytes) -> bool:
        try:
            return receive(self, frame)
        except MappingBroken:
            invalidation = decode(frame, self.namespace)
            if invalidation.position == (self._epoch, self._sequence + 1):
                self._sequence, self._content = self._sequence + 1, frame
            return True

    monkeypatch.setattr(LocalCache, "_clear_after", raise_it, raising=False)
    monkeypatch.setattr(Sequencer, "receive", receive_and_move)


def nothing_is_ever_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalCache, "get", lambda *_: None)


# The operations that every schedule tried against a mutant has. None: a search finds it too seldom.
MUTANTS: dict[Mutant, tuple[str, ...] | None] = {
    a_number_that_was_reached_is_skipped: ("forge_next",),
    a_frame_beyond_a_gap_is_skipped: ("forge_ahead",),
    what_was_posted_is_skipped_when_it_comes: ("post_in_advance",),
    what_was_posted_with_equal_targets_is_skipped_when_it_comes: ("post_in_advance",),
    own_messages_are_known_by_the_stem_of_their_id: ("publish_own", "publish_with_own_id"),
    what_is_posted_is_noted_and_not_applied: ("post_first",),
    what_is_posted_moves_the_position: ("post",),
    no_gap_is_seen: ("drop",),
    an_epoch_is_adopted_from_a_frame: ("drop", "flush"),
    an_echo_compares_no_heads: ("drop",),
    an_echo_compares_the_position_of_later: ("answer_late",),
    an_echo_counts_from_its_answer: ("answer_late", "drop"),
    an_echo_believes_any_history: ("fail_back",),
    no_digests_are_compared_at_the_head: None,
    a_head_without_digest_is_believed: None,
    a_proven_position_without_digest_is_believed: None,
    a_replay_skips_holes: ("trim", "cut"),
    a_replay_compares_no_digest_at_its_own_position: None,
    a_replay_is_not_asked_for: ("cut",),
    a_claim_of_the_head_is_dropped: None,
    a_page_has_a_time_limit: ("slow_down", "publish_large", "cut"),
    any_server_is_the_same: ("restart",),
    unknown_servers_are_the_same: None,
    a_replica_goes_on_from_its_live_position: None,
    a_subscription_is_taken_for_a_proof: ("fail_over", "cut"),
    a_new_beginning_drops_nothing: ("restart",),
    a_lost_link_goes_unnoticed: ("cut",),
    a_lease_has_no_end: ("black_hole",),
    a_load_outlives_what_it_missed: ("begin", "store"),
    a_load_of_many_outlives_what_it_missed: ("load", "answer_load"),
    the_tags_of_a_loaded_value_are_dropped: ("load", "answer_load"),
    callers_take_the_value_of_a_load_whose_tags_they_did_not_know: ("load", "answer_load", "publish_own"),
    nothing_is_ever_served: (),
    what_a_mapping_raises_is_passed_over: ("break_mapping",),
    what_a_mapping_raises_ends_the_apply: ("break_mapping",),
}
