"""Says "forget this": the publisher, and the HTTP API around it."""

from ..shared.confirmation import Confirm
from .publisher import Publisher

__all__ = ["Confirm", "Publisher"]
