"""What replicas say of themselves, read from what they leave in Redis with each echo."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from ...shared.invalidation import DEFAULT_NAMESPACE, Position
from ...shared.transport.redis.names import names_of
from .facts import PresenceFacts

__all__ = ["PRESENCE_PATTERN", "is_of", "sighting_of"]

PRESENCE_PATTERN: Final = f"{{{names_of(DEFAULT_NAMESPACE).channel}*}}:replica:*"
"""What SCAN has to match: a replica that follows several namespaces may be under the name of any of them."""

_UNREADABLE: Final = (msgspec.MsgspecError, RecursionError, AttributeError, LookupError, TypeError, ValueError)


def is_of(key: str, namespace: str) -> bool:
    """Whether a presence is under the name of `namespace`."""
    return key.startswith(f"{{{names_of(namespace).channel}}}:")


def sighting_of(key: str, text: bytes, namespace: str) -> PresenceFacts | None:
    """Read the presence under `key` as far as it concerns `namespace`; None when it does not.

    Shape:  a JSON object with `replica` and `state`, and either `positions` by namespace, or `namespace` and
            `position`; a position is `[epoch, sequence]` or an object of the two. What cannot be read is `unreadable`,
            under the name of its own namespace: it is there, and nobody knows what it does.
    """
    replica = key.partition("}:replica:")[2]
    try:
        said: Any = msgspec.json.decode(text)
        positions = _positions_in(said)
        state = str(said.get("state", "unknown"))
    except _UNREADABLE:
        return PresenceFacts(replica=replica, state="unreadable", position=None) if is_of(key, namespace) else None
    if namespace not in positions:
        return None
    return PresenceFacts(replica=str(said.get("replica") or replica), state=state, position=positions[namespace])


def _positions_in(said: Any) -> dict[str, Position | None]:
    positions = said["positions"] if "positions" in said else {said["namespace"]: said.get("position")}
    return {namespace: _position_of(position) for namespace, position in positions.items()}


def _position_of(position: Any) -> Position | None:
    if position is None:
        return None
    if isinstance(position, Mapping):
        return Position(str(position["epoch"]), int(position["sequence"]))
    epoch, sequence = position
    return Position(str(epoch), int(sequence))
