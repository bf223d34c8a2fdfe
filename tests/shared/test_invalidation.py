"""The invalidation and its targets: what they are, and what they refuse."""

import copy
import pickle
from typing import Any

import pytest

from broadcache.shared import Everything, InvalidNamespace, InvalidTarget, Keys, Prefixes, Tags
from broadcache.shared.invalidation import (
    ID_BYTES_MAX,
    KEY_BYTES_MAX,
    REASON_BYTES_MAX,
    REQUEST_NAMES_MAX,
    SOURCE_BYTES_MAX,
    TAG_BYTES_MAX,
    check_namespace,
    invalidation_of,
    new_id,
)


@pytest.mark.parametrize("kind", [Keys, Tags, Prefixes])
def test_a_target_is_equal_to_another_of_its_kind_and_names(kind: type[Keys] | type[Tags] | type[Prefixes]) -> None:
    assert kind("a", "b") == kind("a", "b")
    assert kind("a", "b") != kind("b", "a")
    assert len({kind("a"), kind("a"), Keys("b"), Tags("b"), Prefixes("b"), Everything(), Everything()}) == 5
    assert repr(kind("a", "b")) == f"{kind.__name__}('a', 'b')"


def test_a_target_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="Keys is immutable: names cannot be set"):
        Keys("a").names = ("b",)


@pytest.mark.parametrize("target", [Keys("a", "b"), Tags("t"), Prefixes("p"), Everything()], ids=repr)
def test_a_target_can_be_copied_and_sent_to_another_process(target: object) -> None:
    assert pickle.loads(pickle.dumps(target)) == target
    assert copy.copy(target) == target
    assert copy.deepcopy(target) == target


@pytest.mark.parametrize(
    ("kind", "names", "text"),
    [
        (Keys, (), "expected at least one name in Keys(...), got none; to drop all, use Everything()"),
        (Keys, ("a", 7), "expected a string, got int at Keys(...)[1]"),
        (Keys, (["a"],), "expected a string, got list at Keys(...)[0]"),
        (Tags, ("",), "expected a string that is not empty, got '' at Tags(...)[0]"),
        (Keys, ("k" * (KEY_BYTES_MAX + 1),), "expected at most 1024 bytes of UTF-8, got 1025 at Keys(...)[0]"),
        (Prefixes, ("ø" * 513,), "expected at most 1024 bytes of UTF-8, got 1026 at Prefixes(...)[0]"),
        (Tags, ("t" * (TAG_BYTES_MAX + 1),), "expected at most 256 bytes of UTF-8, got 257 at Tags(...)[0]"),
        (Keys, ("\ud800",), "expected text that UTF-8 can hold, got a lone surrogate at Keys(...)[0]"),
        (Keys, ("k",) * (REQUEST_NAMES_MAX + 1), "expected at most 10000 names in Keys(...), got 10001"),
    ],
)
def test_names_that_cannot_be_sent_are_refused(kind: Any, names: tuple[Any, ...], text: str) -> None:
    with pytest.raises(InvalidTarget) as error:
        kind(*names)
    assert text in str(error.value)


def test_names_of_the_greatest_length_are_taken() -> None:
    assert Keys("k" * KEY_BYTES_MAX).names == ("k" * KEY_BYTES_MAX,)
    assert Tags("ø" * (TAG_BYTES_MAX // 2)).names == ("ø" * (TAG_BYTES_MAX // 2),)


def test_one_invalidation_gathers_its_targets_and_drops_repetitions() -> None:
    invalidation = invalidation_of([Keys("b", "a"), Tags("t"), Keys("a", "c"), Prefixes("p")], namespace="products")
    assert (invalidation.keys, invalidation.tags, invalidation.prefixes) == (("b", "a", "c"), ("t",), ("p",))
    assert invalidation.position is None
    assert len(invalidation.id) == 26


@pytest.mark.parametrize(
    ("targets", "options", "text"),
    [
        ([], {}, "expected at least one target, got none; to drop all, use Everything()"),
        ([Everything(), Keys("a")], {}, "expected Everything() alone, got 1 more names beside it"),
        (["product:42"], {}, "expected Keys, Tags, Prefixes or Everything, got str; wrap the names"),
        ([Keys], {}, "expected Keys, Tags, Prefixes or Everything, got type"),
        (
            [Keys(*map(str, range(9_000))), Tags(*map(str, range(1_001)))],
            {},
            "expected at most 10000 names in one invalidation, got 10001",
        ),
        (
            [Keys("a")],
            {"reason": "r" * (REASON_BYTES_MAX + 1)},
            "expected at most 1024 bytes of UTF-8, got 1025 at reason",
        ),
        (
            [Keys("a")],
            {"source": "s" * (SOURCE_BYTES_MAX + 1)},
            "expected at most 128 bytes of UTF-8, got 129 at source",
        ),
        ([Keys("a")], {"id": "i" * (ID_BYTES_MAX + 1)}, "expected at most 128 bytes of UTF-8, got 129 at id"),
        ([Keys("a")], {"id": ""}, "expected a string that is not empty, got '' at id"),
        ([Keys("a")], {"id": "\ud800"}, "expected text that UTF-8 can hold, got a lone surrogate at id"),
    ],
)
def test_an_invalidation_that_cannot_be_sent_is_refused(targets: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidTarget) as error:
        invalidation_of(targets, **options)
    assert text in str(error.value)


@pytest.mark.parametrize("namespace", ["a", "0", "products", "A.b_c-d", "x" * 64])
def test_a_namespace_is_letters_digits_and_a_few_signs(namespace: str) -> None:
    assert check_namespace(namespace) == namespace


@pytest.mark.parametrize("namespace", ["", "-a", ".a", "a b", "a:b", "{a}", "a\n", "ø", "²", "x" * 65, None, 7])
def test_anything_else_is_no_namespace(namespace: object) -> None:
    with pytest.raises(InvalidNamespace, match="expected a namespace of 1 to 64 ASCII letters"):
        check_namespace(namespace)


def test_ids_are_new_each_time_and_sort_by_the_time_they_were_made_in() -> None:
    ids = [new_id() for _ in range(1_000)]
    assert len(set(ids)) == 1_000
    times = [each[:10] for each in ids]
    assert times == sorted(times)
    assert set("".join(ids)) <= set("0123456789ABCDEFGHJKMNPQRSTVWXYZ")
