"""Turns what a server refused into an error that says whether another server may take it."""

import re
from typing import Final

from ...errors import LogRefused, NotPrimary
from .responses import Refused

__all__ = ["refused"]

# What a server says that another one is to be asked, or the same one a little later. Redis 6 reports a refusal within
# a script with words of its own before it.
_NOT_HERE: Final = re.compile(r"(?:^|[ -])(?:READONLY|MOVED|ASK|TRYAGAIN|CLUSTERDOWN|MASTERDOWN|LOADING|NOREPLICAS)\b")


def refused(what: str, error: Refused | ValueError) -> LogRefused:
    """Return the error for a refusal to do `what`: NotPrimary when another server may take it."""
    kind = NotPrimary if _NOT_HERE.search(str(error)) else LogRefused
    return kind(f"expected Redis to {what}, got: {error}")
