"""Cache invalidation across replicas: one publish, every replica forgets.

`broadcache.publisher` publishes invalidations, `broadcache.subscriber` receives and applies them, and
`broadcache.shared` has their common vocabulary. This module imports none of them, so that a program imports only the
side it uses.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
