"""Says "forget this": the publisher, and the HTTP API around it."""

from .publisher import Publisher

__all__ = ["Publisher"]
