"""The settings of a subscriber, checked."""

import difflib
import math
import os
import re
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypedDict, cast

import msgspec
from msgspec import Meta

from ...shared.clock import Clock
from ...shared.errors import InvalidSettings
from ...shared.process.settings import VARIABLE_PREFIX, Settings, read_settings, variable_of
from ...shared.transport.redis.address import AddressRemap, Credentials
from .state import State

__all__ = [
    "SubscriberOptions",
    "SubscriberSettings",
    "Timing",
    "checked_replica_id",
    "checked_seconds",
    "forked_replica_id",
    "options_from",
]

_REPLICA_ID_MAX: Final = 128
_REPLICA_ID: Final = re.compile(r"[!-~]{1,128}", re.ASCII)


_ABOVE_ZERO: Final = Meta(gt=0)


class SubscriberOptions(TypedDict, total=False):
    """The options of a `Subscriber`, for what makes one: their meaning is there."""

    replica_id: str | None
    echo_interval_seconds: float
    echo_timeout_seconds: float
    connect_timeout_seconds: float
    start_timeout_seconds: float
    backoff_seconds_max: float
    on_state: Callable[[State], None] | None
    clock: Clock
    uniform: Callable[[], float]
    credentials: Credentials
    address_remap: AddressRemap | None
    prefix: str | None
    replica_token: str | None
    allow_open: bool | None


class SubscriberSettings(Settings, frozen=True, kw_only=True):
    """What a subscriber reads from the environment. The id of a replica is not among it: processes share variables.

    Raises: InvalidSettings, at construction.
    """

    redis_url: Annotated[
        str,
        Meta(
            min_length=1,
            description="The Redis that holds the log; the URL may contain a password.",
            extra={"secret": True},
        ),
    ]
    echo_interval_seconds: Annotated[float, _ABOVE_ZERO, Meta(description="About how often coherence is proven.")] = 1.0
    echo_timeout_seconds: Annotated[float, _ABOVE_ZERO, Meta(description="How long a link may be silent.")] = 2.0
    connect_timeout_seconds: Annotated[float, _ABOVE_ZERO, Meta(description="How long a connection may take.")] = 2.0
    start_timeout_seconds: Annotated[float, Meta(ge=0, description="How long a start waits for coherence.")] = 5.0
    backoff_seconds_max: Annotated[float, _ABOVE_ZERO, Meta(description="The longest pause between attempts.")] = 5.0


# Read where they are used, and not again: who may POST, and what begins all names in Redis.
_READ_ELSEWHERE: Final = ("BROADCACHE_REPLICA_TOKEN", "BROADCACHE_REPLICA_ALLOW_OPEN", "BROADCACHE_PREFIX")
_SIMILAR: Final = 0.85


def options_from(environ: Mapping[str, str], options: SubscriberOptions) -> tuple[str, dict[str, Any]]:
    """Return the Redis URL of the environment, and `options` completed from there.

    A variable that none of ours resembles is not warned of: it may be for a publisher of the same environment.
    Raises: InvalidSettings.
    """
    fields = {field.name for field in msgspec.structs.fields(SubscriberSettings)}
    known = {*map(variable_of, fields), *_READ_ELSEWHERE}
    read = {
        name: value
        for name, value in environ.items()
        if name.startswith(VARIABLE_PREFIX) and (name in known or difflib.get_close_matches(name, known, 1, _SIMILAR))
    }
    if not read.get("BROADCACHE_REDIS_URL", "").strip():
        raise InvalidSettings(
            "expected BROADCACHE_REDIS_URL, got none: set it, e.g. to redis://127.0.0.1:6379; in tests with "
            "broadcache.testing.coherent, any URL will do: nothing connects to it"
        )
    given = cast("dict[str, Any]", options)
    ours = {name: value for name, value in given.items() if name in fields}
    settings = read_settings(SubscriberSettings, read, read_elsewhere=_READ_ELSEWHERE, **ours)
    timing = {name: getattr(settings, name) for name in fields - {"redis_url"}}
    return settings.redis_url, {**given, **timing}


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
