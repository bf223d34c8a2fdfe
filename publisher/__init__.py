"""Says "forget this": the publisher, and the HTTP API around it."""

from .delivery import Delivery, Teller
from .publisher import Publisher

__all__ = ["Delivery", "Publisher", "Teller"]
