"""The grammar of keys: no two sets of values give one key, and a value without a stable text is refused."""

import enum
import hashlib
import subprocess
import sys
import uuid
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from ipaddress import IPv4Address
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broadcache.shared import InvalidName, InvalidSettings, Keys, Tags, key_of, tag_of
from broadcache.shared.invalidation import KEY_BYTES_MAX, TAG_BYTES_MAX


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Name(str):
    def __str__(self) -> str:
        return "another text"


class Code:
    """A value with a text of its own."""

    def __str__(self) -> str:
        return "code:7"


class Plain:
    pass


class Showing:
    def __init__(self, part: object) -> None:
        self.part = part

    def __str__(self) -> str:
        return f"showing {self.part}"


class Table:
    """As an array of numpy: its text leaves out the middle."""

    def __len__(self) -> int:
        return 10_000

    def __str__(self) -> str:
        return "[0 1 ... 9]"


class SlowInts(int):
    def __str__(self) -> str:
        return "elided"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (42, "42"),
        ("42", "42"),
        (-1, "-1"),
        (True, "True"),
        (None, "None"),
        (1.5, "1.5"),
        (Decimal("1.50"), "1.50"),
        ("a:b", "a%3Ab"),
        ("100%", "100%25"),
        ("%3A", "%253A"),
        ("größe", "größe"),
        ("\ud800", "%ED%A0%80"),
        (b"a\xff%", "a%FF%25"),
        (Colour.RED, "red"),
        (Level.HIGH, "3"),
        (Name("a"), "a"),
        (SlowInts(7), "7"),
        (Code(), "code%3A7"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (date(2026, 1, 2), "2026-01-02"),
        (datetime(2026, 1, 2, 3, tzinfo=UTC), "2026-01-02 03%3A00%3A00+00%3A00"),
        (timedelta(seconds=1), "0%3A00%3A01"),
        (IPv4Address("10.0.0.1"), "10.0.0.1"),
        ((1, "a,b"), "%(1%,a,b%,%)"),
        ([1, (2,)], "%(1%,%(2%,%)%,%)"),
        (frozenset({2, 10, 1}), "%[1%,10%,2%,%]"),
        ({"b": 1, "a": [2]}, "%{a%=%(2%,%)%,b%=1%,%}"),
    ],
)
def test_each_value_has_a_stable_text(value: object, text: str) -> None:
    assert key_of("product:{id}", id=value) == f"product:{text}"


@pytest.mark.parametrize(
    "value",
    [Plain(), lambda: 1, Showing(Plain()), Table(), iter([1]), (1, Plain()), {"a": Plain()}, Plain, len, sys],
    ids=lambda value: type(value).__name__,
)
def test_a_value_without_a_stable_text_is_refused(value: object) -> None:
    with pytest.raises(InvalidName, match=r"expected a value with a stable text for \{id\} of 'product:\{id\}', got"):
        key_of("product:{id}", id=value)


def test_a_list_that_contains_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(InvalidName, match="stable text"):
        key_of("product:{id}", id=endless)


def test_values_that_contain_the_separator_give_two_keys() -> None:
    assert key_of("pair:{a}:{b}", a="1:2", b="3") == "pair:1%3A2:3"
    assert key_of("pair:{a}:{b}", a="1", b="2:3") == "pair:1:2%3A3"
    assert key_of("pair-{a}-{b}", a="1-2", b="3") == "pair-1%2D2:3".replace(":", "-")


TEXTS = st.text(alphabet="ab1:%-/ ,(){}=25AD", max_size=5)
VALUES = st.recursive(
    TEXTS | st.integers() | st.binary(max_size=3), lambda each: st.lists(each, max_size=3).map(tuple), max_leaves=4
)
TEMPLATES = ("pair:{a}:{b}", "{a}-{b}", "{a}/v1/{b}", "x{a}, {b}", "{a}({b})", "{{{a}}} {{{b}}}", "{a}::{b}:{a}")


def shown(value: object) -> object:
    """Values that are one key: as text."""
    if isinstance(value, tuple):
        return tuple(map(shown, value))
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    return str(value)


@given(st.sampled_from(TEMPLATES), st.tuples(VALUES, VALUES), st.tuples(VALUES, VALUES))
def test_no_two_pairs_of_values_give_one_key(
    template: str, first: tuple[object, object], second: tuple[object, object]
) -> None:
    keys = {key_of(template, a=a, b=b) for a, b in (first, second)}
    assert len(keys) == len({(shown(a), shown(b)) for a, b in (first, second)})


def test_what_is_empty_is_not_what_holds_something_empty() -> None:
    values: list[Any] = ["", (), ("",), ("", ""), ((),), set(), {""}, {}, {"": ""}]
    assert len({key_of("{a}", a=value) for value in values}) == len(values)


@given(st.sampled_from(TEMPLATES), TEXTS, TEXTS, TEXTS)
def test_no_way_to_cut_a_text_in_two_gives_the_same_key(template: str, first: str, middle: str, last: str) -> None:
    one = key_of(template, a=first + middle, b=last)
    other = key_of(template, a=first, b=middle + last)
    assert (one == other) is (middle == "")


def test_text_counts_and_not_type_unless_typed() -> None:
    assert key_of("p:{id}", id=1) == key_of("p:{id}", id="1")
    assert key_of("p:{id}", id=1, typed=True) == "p:1%int" != key_of("p:{id}", id="1", typed=True)
    assert key_of("p:{id}", id=(1,), typed=True) == "p:%(1%int%,%)%tuple" != key_of("p:{id}", id=("1",), typed=True)
    assert key_of("p:{id}", id=Colour.RED, typed=True) == "p:red%Colour"


def test_a_field_may_name_an_attribute() -> None:
    product = SimpleNamespace(id=7, shop=SimpleNamespace(name="a:b"))
    assert key_of("{product.shop.name}:{product.id}", product=product) == "a%3Ab:7"


def test_the_order_of_a_set_does_not_depend_on_the_process() -> None:
    program = "from broadcache.shared import key_of; print(key_of('p:{ids}', ids=set('abcdefgh')))"
    shown = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in "123"
    }
    assert len(shown) == 1


def test_what_is_too_long_is_hashed_beyond_the_limit() -> None:
    keys = {key_of("product:{id}", id="é" * 600 + end) for end in "ab"}
    assert len(keys) == 2
    for key in keys:
        Keys(key)  # which no longer key could be
        assert key.startswith("product:" + "é" * 400)
    longest = "x" * (KEY_BYTES_MAX - len("product:"))
    assert key_of("product:{id}", id=longest) == f"product:{longest}"
    whole = f"product:{longest}x"
    assert key_of("product:{id}", id=longest + "x") == f"{whole[:958]}%#{hashlib.sha256(whole.encode()).hexdigest()}"
    Tags(tag := tag_of("shop:{id}", id="x" * 10_000))
    assert len(tag) == TAG_BYTES_MAX
    assert key_of("n:{n}", n=10**5_000).startswith("n:0x")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{a}{b}", "a separator such as ':' between {a} and {b}"),
        ("{a}x{b}", "a separator"),
        ("{}", "fields that name a value"),
        ("{0}", "fields that name a value"),
        ("{a!r}", "fields that name a value"),
        ("{a:>3}", "fields that name a value"),
        ("{a[0]}", "fields that name a value"),
        ("{a", "fields in braces"),
        ("100%", "no '%' outside of braces"),
        ("x" * 2_000, "at most 958 bytes"),
        ("", "text"),
        (7, "a template as a string"),
    ],
)
def test_a_template_that_could_confuse_values_is_refused(template: Any, expected: str) -> None:
    with pytest.raises(InvalidSettings, match=r"expected ") as raised:
        key_of(template)
    assert expected in str(raised.value)


@pytest.mark.parametrize("values", [{}, {"id": 1, "shop": 2}, {"shop": 2}])
def test_each_field_has_a_value_and_no_value_is_left(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettings, match=r"expected values for id of the template 'product:\{id\}', got "):
        key_of("product:{id}", **values)
