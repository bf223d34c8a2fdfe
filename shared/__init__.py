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
    NotDelivered,
    NotPrimary,
    ServerBinaryNotFound,
)
from .fanout_report import FanoutReport, Outcome
from .invalidation import Everything, Invalidation, Keys, Position, Prefixes, Tags, Target
from .presence import ReplicaPresence
from .receipt import Receipt

__all__ = [
    "BroadcacheError",
    "Confirm",
    "Confirmation",
    "Everything",
    "FanoutReport",
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
    "NotDelivered",
    "NotPrimary",
    "Outcome",
    "Position",
    "Prefixes",
    "Receipt",
    "ReplicaConfirmation",
    "ReplicaPresence",
    "ServerBinaryNotFound",
    "Tags",
    "Target",
]
