"""The text of a value in a key: the same on every replica, and without the characters that separate values."""

import re
from collections.abc import Iterable, Mapping, Sized
from collections.abc import Set as AbstractSet
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, Final
from uuid import UUID

__all__ = ["Unstable", "escaped", "text_of"]

_PLAIN: Final = (bool, date, time, timedelta, Decimal, UUID, type(None))
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_ADDRESS: Final = re.compile(r"\bat 0x[0-9A-Fa-f]+")


class Unstable(TypeError):
    """A value whose text differs from replica to replica, or from one equal value to another."""


def text_of(value: object, separators: str, *, typed: bool) -> str:
    """Return the text of a value. Two values have the same text if `str` shows them as the same.

    Shape:  `separators` begins with `%`. These characters are escaped as in a URL, `%3A` for `:`. A `%` that no two
            hexadecimal digits follow is the grammar's own: `%(1%,2%,%)` is a tuple or a list, `%[1%,2%,%]` a set,
            `%{a%=1%,%}` a mapping; with `typed`, `1%int` is an integer.
    Raises: Unstable.
    """
    text = _untyped(value, separators, typed=typed)
    return f"{text}%{type(value).__qualname__}" if typed else text


def escaped(text: str, separators: str) -> str:
    """Return `text` without separators, and without lone surrogates, which UTF-8 cannot hold."""
    for separator in separators:
        if separator in text:
            text = text.replace(separator, _escape(separator))
    return text if text.isascii() else _SURROGATE.sub(lambda match: _escape(match[0]), text)


def _escape(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogatepass"))


def _untyped(value: Any, separators: str, *, typed: bool) -> str:
    if isinstance(value, Enum):
        text = _untyped(value.value, separators, typed=typed)
    elif isinstance(value, str):
        text = escaped(str.__str__(value), separators)
    elif isinstance(value, bytes | bytearray):
        text = "".join(_of_byte(byte, separators) for byte in value)
    elif isinstance(value, tuple | list):
        text = f"%({_joined(text_of(each, separators, typed=typed) for each in value)}%)"
    elif isinstance(value, AbstractSet):
        text = f"%[{_joined(sorted(text_of(each, separators, typed=typed) for each in value))}%]"
    elif isinstance(value, Mapping):
        pairs = [
            f"{text_of(key, separators, typed=typed)}%={text_of(each, separators, typed=typed)}"
            for key, each in value.items()
        ]
        text = f"%{{{_joined(sorted(pairs))}%}}"
    else:
        text = escaped(_plain(value), separators)
    return text


def _joined(texts: Iterable[str]) -> str:
    # Each ends with a comma: so no values differ from one that is empty.
    return "".join(f"{text}%," for text in texts)


def _of_byte(byte: int, separators: str) -> str:
    return chr(byte) if byte < 128 and chr(byte) not in separators else f"%{byte:02X}"


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return int.__repr__(value)
        except ValueError:  # more digits than Python converts
            return hex(value)
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, _PLAIN):
        return str(value)
    # An own __str__ is a text that the class has chosen. That of an array or a table may leave out its middle.
    shows: Any = type(value).__str__
    if shows is object.__str__ or isinstance(value, Iterable | Sized | type) or callable(value):
        raise Unstable
    text = str(value)
    if _ADDRESS.search(text):
        raise Unstable
    return text
