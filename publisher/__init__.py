"""Says "forget this": the publisher, and the HTTP API around it."""

from ..shared.confirmation import Confirm
from .delivery import Delivery, Teller
from .fanout import Fanout
from .preview import Preview, ReplicaPreview
from .publisher import Publisher

__all__ = ["Confirm", "Delivery", "Fanout", "Preview", "Publisher", "ReplicaPreview", "Teller"]
