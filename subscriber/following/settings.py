"""The settings of a subscriber, checked."""

import math
import os
import re
import secrets
import socket
from dataclasses import dataclass
from typing import Final

from ...shared.errors import InvalidSettings

__all__ = ["Timing", "checked_replica_id", "checked_seconds", "forked_replica_id"]

_REPLICA_ID_MAX: Final = 128
_REPLICA_ID: Final = re.compile(r"[!-~]{1,128}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Timing:
    """How often a link is checked, and how long it may take. What each number is for: `Subscriber`."""

    echo_interval_seconds: float
    echo_timeout_seconds: float
    connect_timeout_seconds: float
    backoff_seconds_max: float

    @classmethod
    def checked(cls, **seconds: float) -> "Timing":
        """Make one of the fields by name. Raises: InvalidSettings."""
        return cls(**{name: checked_seconds(value, name) for name, value in seconds.items()})


def checked_seconds(seconds: float, name: str, *, may_be_zero: bool = False) -> float:
    """Return a number of seconds. Raises: InvalidSettings."""
    if not 0 <= seconds < math.inf or (seconds == 0 and not may_be_zero):
        raise InvalidSettings(f"expected {name} to be a positive number of seconds, got {seconds!r}")
    return float(seconds)


def checked_replica_id(replica_id: str | None) -> str:
    """Return the id of this replica; without one, make one of its host and process. Raises: InvalidSettings."""
    if replica_id is None:
        replica_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    if not _REPLICA_ID.fullmatch(replica_id):
        raise InvalidSettings(
            f"expected replica_id to be 1 to 128 printable ASCII characters without spaces, got {replica_id!r:.200}"
        )
    return replica_id


def forked_replica_id(replica_id: str) -> str:
    """Return the id of a forked child whose parent runs under `replica_id`, and goes on to do so."""
    own = f"-{os.getpid()}"
    return replica_id[: _REPLICA_ID_MAX - len(own)] + own
