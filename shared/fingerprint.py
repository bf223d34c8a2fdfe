"""The fingerprint of a value: equal for equal values, in every process."""

import hashlib
from typing import Any, Final

import msgspec

__all__ = ["NO_FINGERPRINT", "fingerprint_of"]

NO_FINGERPRINT: Final = ""
"""That of a value which cannot be written as JSON: nothing can be said of it."""
_DIGEST_BYTES: Final = 8


def fingerprint_of(value: Any) -> str:
    """Return 16 hexadecimal digits of the value's JSON, its fields sorted; `NO_FINGERPRINT` when it has none.

    It tells values apart. It hides none that can be guessed.
    """
    try:
        text = msgspec.json.encode(value, order="deterministic")
    except (TypeError, ValueError, RecursionError, OverflowError, msgspec.MsgspecError):
        return NO_FINGERPRINT
    return hashlib.blake2b(text, digest_size=_DIGEST_BYTES).hexdigest()
