"""Converts a server's refusal into an error that says whether another server may accept the command."""

import re
from typing import Final

from ...errors import LogRefused, NotPrimary
from .responses import Refused

__all__ = ["refused"]

# The codes of refusals that another server, or the same one a little later, may not repeat. Redis 6 prefixes a refusal
# within a script with its own text.
_NOT_HERE: Final = re.compile(r"(?:^|[ -])(?:READONLY|MOVED|ASK|TRYAGAIN|CLUSTERDOWN|MASTERDOWN|LOADING|NOREPLICAS)\b")


def refused(what: str, error: Refused | ValueError) -> LogRefused:
    """Return the error for a refusal to do `what`: NotPrimary when another server may accept it."""
    kind = NotPrimary if _NOT_HERE.search(str(error)) else LogRefused
    return kind(f"expected Redis to {what}, got: {error}")
