"""Reads points in time that people type: a time, or how long ago."""

import re
from datetime import datetime
from typing import Final

from ...shared.errors import InvalidSettings

__all__ = ["since_ms_of", "unix_ms_of"]

_AGO: Final = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)([smhd]?)", re.ASCII)
_UNIT_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}
# A plus sign that was not escaped in a URL arrives as a space.
_OFFSET_AFTER_SPACE: Final = re.compile(r"(?<=\d) (\d\d:\d\d)\Z", re.ASCII)


def since_ms_of(text: str, *, now_ms: int) -> int:
    """Return `text` as a Unix time in milliseconds.

    Shape:  RFC 3339 with an offset, `2025-06-30T12:00:00Z`; or how long before now: `900` (seconds), `15m`, `2h`, `1d`.
    Raises: InvalidSettings.
    """
    if ago := _AGO.fullmatch(text):
        return now_ms - round(float(ago[1]) * _UNIT_SECONDS[ago[2]] * 1_000)
    try:
        return unix_ms_of(datetime.fromisoformat(_OFFSET_AFTER_SPACE.sub(r"+\1", text) if "T" in text else text))
    except (ValueError, OverflowError):  # includes InvalidSettings for a missing offset
        raise InvalidSettings(
            "expected a time such as 2025-06-30T12:00:00Z, or how long ago: a number of seconds, or 30s, 15m, 2h, 1d; "
            f"got {text!r:.100}"
        ) from None


def unix_ms_of(time: datetime) -> int:
    """Return a time as a Unix time in milliseconds. Raises: InvalidSettings for one without an offset."""
    if time.tzinfo is None:
        raise InvalidSettings(f"expected a time with an offset, got {time!r}; use datetime(..., tzinfo=UTC)")
    return round(time.timestamp() * 1_000)
