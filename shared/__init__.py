"""What publisher and subscriber must agree on: the invalidation, its wire form, the log and channel, errors."""

from .errors import (
    BroadcacheError,
    IdempotencyConflict,
    InvalidLoader,
    InvalidNamespace,
    InvalidSettings,
    InvalidTarget,
    LinkLost,
    LogRefused,
    MalformedFrame,
    NotPrimary,
    ServerBinaryNotFound,
)
from .invalidation import Everything, Invalidation, Keys, Position, Prefixes, Tags, Target
from .log import Receipt

__all__ = [
    "BroadcacheError",
    "Everything",
    "IdempotencyConflict",
    "InvalidLoader",
    "InvalidNamespace",
    "InvalidSettings",
    "InvalidTarget",
    "Invalidation",
    "Keys",
    "LinkLost",
    "LogRefused",
    "MalformedFrame",
    "NotPrimary",
    "Position",
    "Prefixes",
    "Receipt",
    "ServerBinaryNotFound",
    "Tags",
    "Target",
]
