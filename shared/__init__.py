"""What publisher and subscriber must agree on: the invalidation, its wire form, the log and channel, errors."""

from .confirmation import Confirm, Confirmation, ReplicaConfirmation
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
from .presence import ReplicaPresence

__all__ = [
    "BroadcacheError",
    "Confirm",
    "Confirmation",
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
    "ReplicaConfirmation",
    "ReplicaPresence",
    "ServerBinaryNotFound",
    "Tags",
    "Target",
]
