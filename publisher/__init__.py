"""Says "forget this": the publisher, and the HTTP API around it."""

from ..shared.confirmation import Confirm
from .audit_stats import AuditStats, Inconsistency
from .auditor import Auditor
from .delivery import Delivery, Teller
from .fanout import Fanout
from .preview import Preview, ReplicaPreview
from .publisher import Publisher

__all__ = [
    "AuditStats",
    "Auditor",
    "Confirm",
    "Delivery",
    "Fanout",
    "Inconsistency",
    "Preview",
    "Publisher",
    "ReplicaPreview",
    "Teller",
]
