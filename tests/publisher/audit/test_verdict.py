"""The verdict on one observation, and the newest invalidation of a key: without servers."""

from collections.abc import Mapping

import pytest

from broadcache.publisher.audit import newest as newest_module
from broadcache.publisher.audit.newest import NewestInvalidations
from broadcache.publisher.audit.verdict import Observation, ServedEntries, inconsistencies, served_entries, signature_of
from broadcache.shared.invalidation import Invalidation, Position
from broadcache.shared.question import Question, ReplicaAnswer

AT_7 = Position("e", 7)


def serving(*fingerprints: str | None, sequence: int = 7, epoch: str = "e") -> ServedEntries:
    return ServedEntries(Position(epoch, sequence), {"a": fingerprints})


def found(
    replicas: Mapping[str, ServedEntries], *, source: str = "", newest: int = 7, missing: tuple[str, ...] = ()
) -> dict[str, tuple[str, str | None]]:
    """Replica to the kind of its inconsistency, and what was expected of it."""
    observation = Observation({"a": newest}, {"a": source} if source else {}, replicas, missing, None)
    return {each.replica: (each.kind, each.expected) for each in inconsistencies(observation, "a", AT_7, 1.0)}


@pytest.mark.parametrize(
    ("replicas", "source", "expected"),
    [
        ({"r1": serving("x"), "r2": serving("x")}, "", {}),
        ({"r1": serving("x"), "r2": serving("x")}, "x", {}),
        ({"r1": serving("x"), "r2": serving("y")}, "x", {"r2": ("differs", "x")}),
        ({"r1": serving("x"), "r2": serving("x"), "r3": serving("y")}, "", {"r3": ("differs", "x")}),
        # Without a majority, each of those that disagree is named.
        ({"r1": serving("x"), "r2": serving("y")}, "", {"r1": ("differs", None), "r2": ("differs", None)}),
        # Caches are compared each with the same one of the others.
        ({"r1": serving("x", "y"), "r2": serving("x", "y")}, "", {}),
        # What a replica would not serve, or has no fingerprint, is not compared.
        ({"r1": serving("x"), "r2": serving(None), "r3": serving("")}, "x", {}),
        ({"r1": serving("x", sequence=6), "r2": serving("y")}, "y", {"r1": ("behind", None)}),
        ({"r1": serving("x", epoch="f"), "r2": serving("y")}, "y", {"r1": ("behind", None)}),
    ],
)
def test_a_replica_is_inconsistent_if_it_is_behind_or_differs(
    replicas: Mapping[str, ServedEntries], source: str, expected: Mapping[str, tuple[str, str | None]]
) -> None:
    assert found(replicas, source=source) == expected


def test_only_replicas_that_have_applied_the_newest_invalidation_of_the_key_are_compared() -> None:
    replicas = {"r1": serving("old", sequence=8), "r2": serving("new", sequence=9)}
    assert found(replicas, source="new", newest=9) == {}
    assert found(replicas, source="new", newest=8) == {"r1": ("differs", "new")}


def test_a_replica_that_did_not_answer_is_missing() -> None:
    assert found({"r1": serving("x")}, missing=("r2",)) == {"r2": ("missing", None)}


def test_only_differing_values_have_to_be_seen_twice() -> None:
    observation = Observation({"a": 7}, {"a": "y"}, {"r1": serving("x"), "r2": serving("y", sequence=1)}, ("r3",), None)
    assert signature_of(list(inconsistencies(observation, "a", AT_7, 1.0))) == {("r1", "x", "y")}


@pytest.mark.parametrize(
    ("replicas", "doubt", "is_conclusive"),
    [({"r1": serving("x")}, None, True), ({}, None, False), ({"r1": serving("x")}, "the registry is new", False)],
)
def test_finding_nothing_proves_something_only_if_every_replica_was_queried(
    replicas: Mapping[str, ServedEntries], doubt: str | None, is_conclusive: bool
) -> None:
    assert Observation({}, {}, replicas, (), doubt).is_conclusive == is_conclusive


def test_the_answers_to_several_questions_are_one_with_the_first_position() -> None:
    questions = [Question(id="1", entries=("a", "b")), Question(id="2", entries=("c",))]
    answers = [
        ReplicaAnswer(id="1", position=AT_7, fingerprints=(("x",), ("y",))),
        ReplicaAnswer(id="2", position=Position("e", 8), fingerprints=(("z",),)),
    ]
    assert served_entries(questions, answers) == (AT_7, {"a": ("x",), "b": ("y",), "c": ("z",)})


def test_the_newest_invalidation_of_a_key_is_the_last_that_may_have_named_it() -> None:
    newest = NewestInvalidations()
    assert newest.of("a1") == 0
    newest.record(1, Invalidation(keys=("a1",)))
    newest.record(2, Invalidation(prefixes=("a",)))
    assert (newest.of("a1"), newest.of("a2"), newest.of("b")) == (2, 2, 0)
    newest.record(3, Invalidation(keys=("b",)))
    assert (newest.of("a1"), newest.of("b")) == (2, 3)
    newest.record(4, Invalidation(tags=("t",)))
    assert (newest.of("a1"), newest.of("c")) == (4, 4)
    newest.record_everything(5)
    assert newest.of("c") == 5


def test_too_many_keys_are_forgotten_unless_kept_and_too_many_prefixes_count_for_every_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(newest_module, "_NAMES_MAX", 2)
    monkeypatch.setattr(newest_module, "_PREFIXES_MAX", 2)
    newest = NewestInvalidations()
    newest.record(1, Invalidation(keys=("a", "b", "c"), prefixes=("x", "y")))
    newest.trim({"b", None})
    assert (newest.of("a"), newest.of("b"), newest.of("x1")) == (0, 1, 1)
    newest.record(2, Invalidation(prefixes=("z",)))
    newest.trim({"b"})
    assert (newest.of("x1"), newest.of("anything")) == (2, 2)
