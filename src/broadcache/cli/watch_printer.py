"""The output of `broadcache watch`: each message on standard output, the link's state on standard error."""

import json
import sys
import time
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.text import Text

from ..publisher.history.replay import Gap
from ..shared.errors import LinkLost, MalformedFrame
from ..shared.invalidation import Invalidation, Position
from .printable import printable

__all__ = ["JsonPrinter", "TextPrinter"]

_NAMES_SHOWN_MAX: Final = 5
_FRAME_SHOWN_BYTES_MAX: Final = 200


class _LinkPrinter:
    """Reports on standard error when the link is connected, missing and reconnected."""

    def __init__(self, channel: str) -> None:
        self._channel = channel
        self._has_lost = False

    def on_link(self, label: str) -> None:
        """Report that messages arrive from now on."""
        text = f"watching {self._channel} at {label}"
        if self._has_lost:
            text += ": reconnected; invalidations logged meanwhile come first"
        _report(text)

    def on_lost(self, error: LinkLost) -> None:
        """Report that no messages arrive."""
        self._has_lost = True
        _report(f"no link to Redis, retrying: {error}")


class JsonPrinter(_LinkPrinter):
    """One JSON object a line; `kind` is `invalidation`, `unreadable` or `gap`.

    Shape:  an invalidation has the fields of its wire form, with `seq` called `sequence` as in the API's responses;
            `epoch` and `sequence` are null when it was published past the log.
    Units:  `received_at_ms` is this machine's Unix clock in milliseconds.
    """

    def on_invalidation(self, invalidation: Invalidation) -> None:
        """Print an invalidation."""
        fields = {name: getattr(invalidation, name) for name in invalidation.__struct_fields__ if name != "seq"}
        present = {name: value for name, value in fields.items() if value is not msgspec.UNSET}
        self._print("invalidation", {**present, "sequence": invalidation.seq})

    def on_unreadable(self, frame: bytes, error: MalformedFrame, position: Position | None = None) -> None:
        """Print the beginning of the frame, and what is wrong with it."""
        shown = frame[:_FRAME_SHOWN_BYTES_MAX].decode(errors="replace")
        place = {} if position is None else position._asdict()
        self._print("unreadable", {"frame": shown, "error": str(error), **place})

    def on_gap(self, gap: Gap) -> None:
        """Print that invalidations may be missing here, and why."""
        self._print("gap", gap._asdict())

    def _print(self, kind: str, fields: dict[str, Any]) -> None:
        print(json.dumps({"kind": kind, "received_at_ms": time.time_ns() // 1_000_000, **fields}), flush=True)


class TextPrinter(_LinkPrinter):
    """One line of text for each message, in colour on a terminal.

    Units:  an invalidation is stamped with the local time at which its publisher sent it, by the publisher's clock: it
            may come from the log, long after. One that has no such time is stamped with the time at which it arrived.
            The time of an unreadable entry of the log is not known.
    """

    def __init__(self, channel: str) -> None:
        super().__init__(channel)
        self._console = _Console(highlight=False)

    def on_invalidation(self, invalidation: Invalidation) -> None:
        """Print an invalidation."""
        position = invalidation.position
        line = Text(
            "unsequenced" if position is None else f"#{position.sequence}", "yellow" if not position else "cyan"
        )
        for text, style in _targets(invalidation):
            line.append(f"  {text}", style)
        if invalidation.reason:
            line.append(f"  “{printable(invalidation.reason)}”", "italic")
        line.append(f"  from {printable(invalidation.source) or 'an unknown source'}", "dim")
        self._print(line, _time_of(invalidation.sent_at_ms))

    def on_unreadable(self, frame: bytes, error: MalformedFrame, position: Position | None = None) -> None:
        """Print what is wrong with the frame."""
        line = Text("unreadable", "bold red")
        line.append(f"  replicas drop everything: {printable(str(error))}", "red")
        self._print(line, _now() if position is None else None)

    def on_gap(self, gap: Gap) -> None:
        """Print that invalidations may be missing here, and why."""
        line = Text("gap", "bold yellow")
        line.append(f"  invalidations may be missing here: {printable(gap.detail)}", "yellow")
        self._print(line, _now())

    def _print(self, line: Text, time: datetime | None) -> None:
        stamp = Text(f"{_shown(time)}  ", "dim")
        self._console.print(stamp + line, soft_wrap=not self._console.is_terminal, no_wrap=True, overflow="ellipsis")
        self._console.file.flush()


class _Console(Console):
    """Raises BrokenPipeError when the reader is gone; rich itself would exit with a failure."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _now() -> datetime:
    return datetime.now().astimezone()


def _time_of(sent_at_ms: int | None) -> datetime:
    """Return when a message was sent; now, if it does not say that, or names no time that there is."""
    if sent_at_ms is None:
        return _now()
    try:
        return datetime.fromtimestamp(sent_at_ms / 1_000, UTC).astimezone()
    except (ValueError, OverflowError, OSError):
        return _now()


def _shown(time: datetime | None) -> str:
    """Return a time of day in milliseconds, with the date if that is not today."""
    if time is None:
        return "--:--:--.---"
    date = "" if time.date() == _now().date() else f"{time:%Y-%m-%d} "
    return f"{date}{time:%H:%M:%S}.{time.microsecond // 1_000:03}"


def _targets(invalidation: Invalidation) -> list[tuple[str, str]]:
    if invalidation.everything:
        return [("everything", "bold magenta")]
    kinds = (("keys", "green"), ("tags", "blue"), ("prefixes", "magenta"))
    return [(f"{kind} {_listed(names)}", style) for kind, style in kinds if (names := getattr(invalidation, kind))]


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(map(printable, names[:_NAMES_SHOWN_MAX]))
    more = len(names) - _NAMES_SHOWN_MAX
    return f"{shown} and {more} more" if more > 0 else shown


def _report(text: str) -> None:
    print(f"broadcache: {text}", file=sys.stderr, flush=True)
