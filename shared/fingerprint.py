"""The fingerprint of a value: equal for equal values, in every process."""

import hashlib
from typing import Any, Final

import msgspec

__all__ = ["NO_FINGERPRINT", "fingerprint_of"]

NO_FINGERPRINT: Final = ""
"""The fingerprint of a value that cannot be encoded as JSON. It cannot be compared."""
_DIGEST_BYTES: Final = 8


def fingerprint_of(value: Any) -> str:
    """Return 16 hexadecimal digits, a hash of the value as JSON with sorted fields; else `NO_FINGERPRINT`.

    It tells values apart. It does not hide guessable values.
    """
    try:
        text = msgspec.json.encode(value, order="deterministic")
    except (TypeError, ValueError, RecursionError, OverflowError, msgspec.MsgspecError):
        return NO_FINGERPRINT
    return hashlib.blake2b(text, digest_size=_DIGEST_BYTES).hexdigest()
