"""The vocabulary that publisher and subscriber share: invalidations, their wire form, the transport, errors."""

from typing import TYPE_CHECKING, TypeAlias

from .confirmation import Confirm, Confirmation, ReplicaConfirmation
from .errors import (
    BroadcacheError,
    IdempotencyConflict,
    InvalidLoader,
    InvalidName,
    InvalidNamespace,
    InvalidSettings,
    InvalidTarget,
    LinkLost,
    LogRefused,
    MalformedFrame,
    NotConnected,
    NotDelivered,
    NotPrimary,
    ServerBinaryNotFound,
)
from .fanout_report import AddressOutcome, FanoutReport, ProcessOutcome
from .invalidation import Everything, Invalidation, Keys, Position, Prefixes, Tags, Target
from .keys.template import key_of, tag_of
from .presence import ReplicaPresence
from .process.renamed import old_names
from .receipt import Receipt

__all__ = [
    "AddressOutcome",
    "BroadcacheError",
    "Confirm",
    "Confirmation",
    "Everything",
    "FanoutReport",
    "IdempotencyConflict",
    "InvalidLoader",
    "InvalidName",
    "InvalidNamespace",
    "InvalidSettings",
    "InvalidTarget",
    "Invalidation",
    "Keys",
    "LinkLost",
    "LogRefused",
    "MalformedFrame",
    "NotConnected",
    "NotDelivered",
    "NotPrimary",
    "Position",
    "Prefixes",
    "ProcessOutcome",
    "Receipt",
    "ReplicaConfirmation",
    "ReplicaPresence",
    "ServerBinaryNotFound",
    "Tags",
    "Target",
    "key_of",
    "tag_of",
]

if TYPE_CHECKING:
    Outcome: TypeAlias = AddressOutcome
else:
    __getattr__ = old_names(__name__, {"Outcome": "AddressOutcome"}, globals())
