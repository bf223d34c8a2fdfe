"""Says "forget this": the publisher, and the HTTP API around it."""

from ..shared.confirmation import Confirm
from .delivery import Delivery, Teller
from .fanout import Fanout
from .publisher import Publisher

__all__ = ["Confirm", "Delivery", "Fanout", "Publisher", "Teller"]
