"""Numbers and lists as texts of findings."""

from collections.abc import Sequence
from typing import Final

__all__ = ["dotted", "duration", "listed", "mib", "ms"]

_LISTED_MAX: Final = 8


def dotted(version: tuple[int, int]) -> str:
    """Return a version such as 6.2."""
    return f"{version[0]}.{version[1]}"


def ms(milliseconds: float) -> str:
    """Return a short time in ms, or in s from one second on."""
    if milliseconds >= 1_000:
        return f"{milliseconds / 1_000:,.1f} s"
    return f"{milliseconds:.0f} ms" if milliseconds >= 10 else f"{milliseconds:.2f} ms"


def mib(size_bytes: int) -> str:
    """Return a size in MiB."""
    return f"{size_bytes / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    """Return a time in its largest unit: d, h, min or s."""
    for unit_seconds, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= unit_seconds:
            return f"{seconds / unit_seconds:.3g} {unit}"
    return f"{seconds:.3g} s"


def listed(texts: Sequence[str], separator: str = ", ") -> str:
    """Return the first eight of `texts`, and how many more there are."""
    more = len(texts) - _LISTED_MAX
    return separator.join(texts[:_LISTED_MAX]) + (f" and {more} more" if more > 0 else "")
