"""Text for a terminal: made safe if it is from the network and put in the output's encoding."""

import codecs
import json
import sys
from io import TextIOWrapper
from typing import Final

__all__ = ["escape_unencodable", "printable"]

_ESCAPE: Final = "broadcache.escape"
_IN_ASCII: Final = {
    "…": "...",
    "✓": "+",
    "✗": "x",
    "“": "'",
    "”": "'",
    "’": "'",
    "–": "-",
    "—": "-",
    "·": "-",
    "•": "*",
    "●": "*",
    "×": "x",
    "→": "->",
    "≤": "<=",
    "≥": ">=",
}


def printable(text: str) -> str:
    """Escape control characters: any client that may publish chooses names and reasons."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def escape_unencodable() -> None:
    """Print what the encoding of standard output and error does not have in ASCII, instead of raising."""
    codecs.register_error(_ESCAPE, _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=_ESCAPE)


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError), "output is only encoded"
    text = error.object[error.start : error.end]
    # Both forms may stand inside a JSON string.
    return "".join(_IN_ASCII.get(char) or json.dumps(char)[1:-1] for char in text), error.end
