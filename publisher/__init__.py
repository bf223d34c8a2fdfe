"""Says "forget this": the publisher, and the HTTP API around it."""

from ..shared.confirmation import Confirm
from .audit.auditor import Auditor
from .audit.stats import AuditStats, Inconsistency
from .fanout.fanout import Fanout
from .publishing.delivery import Delivery, Teller
from .publishing.preview import Preview, ReplicaPreview
from .publishing.publisher import Publisher

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
