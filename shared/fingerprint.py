"""The fingerprint of a value: equal for equal values, in every process."""

import hashlib
from collections.abc import Collection
from typing import Any, Final

import msgspec

__all__ = ["NO_FINGERPRINT", "fingerprint_of"]

NO_FINGERPRINT: Final = ""
"""The fingerprint of a value that is too large, or that cannot be encoded as JSON. It cannot be compared."""
_DIGEST_BYTES: Final = 8
# What takes about a millisecond: a replica's event loop waits meanwhile.
_PARTS_MAX: Final = 2_000
_TEXT_MAX: Final = 65_536
_TEXTS: Final = (str, bytes, bytearray, memoryview)
_GROUPS: Final = (dict, list, tuple, set, frozenset)
_SIMPLE: Final = frozenset({int, float, bool, type(None)})


def fingerprint_of(value: Any) -> str:
    """Return 16 hexadecimal digits, a hash of the value as JSON with sorted fields; else `NO_FINGERPRINT`.

    It tells values apart. It does not hide guessable values.

    Units: a value may have up to `_PARTS_MAX` parts, which are its texts, numbers, lists, fields and so on, and
           `_TEXT_MAX` characters or bytes of text. One that has more has no fingerprint.
    """
    try:
        if _is_too_large(value):
            return NO_FINGERPRINT
        text = msgspec.json.encode(value, order="deterministic")
    except (TypeError, ValueError, RecursionError, OverflowError, msgspec.MsgspecError):
        return NO_FINGERPRINT
    return hashlib.blake2b(text, digest_size=_DIGEST_BYTES).hexdigest()


def _is_too_large(value: Any) -> bool:
    """Whether it has too many parts, or too much text. No more of it is looked at than the limits allow."""
    parts, text = 1, 0
    ahead = [value]
    while ahead:
        part = ahead.pop()
        if type(part) in _SIMPLE:
            continue
        if isinstance(part, _TEXTS):
            text += part.nbytes if isinstance(part, memoryview) else len(part)
        else:
            inside = _inside(part)
            parts += 2 * len(inside) if isinstance(part, dict) else len(inside)
            if parts <= _PARTS_MAX:
                ahead += inside
                if isinstance(part, dict):
                    ahead += part.values()
        if parts > _PARTS_MAX or text > _TEXT_MAX:
            return True
    return False


def _inside(part: Any) -> Collection[Any]:
    """Return what a list, a set or an object of fields has, or the keys of a dictionary."""
    if isinstance(part, _GROUPS):
        return part
    for fields in ("__struct_fields__", "__dataclass_fields__"):
        if (names := getattr(type(part), fields, None)) is not None:
            return [getattr(part, name, None) for name in names]
    if (attributes := getattr(type(part), "__attrs_attrs__", None)) is not None:
        return [getattr(part, attribute.name, None) for attribute in attributes]
    return ()
