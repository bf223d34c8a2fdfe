"""Cache invalidation across replicas: one publish, every replica forgets.

`broadcache.publisher` says which entries to drop, `broadcache.subscriber` hears it and drops them, and
`broadcache.shared` holds what both agree on. This module imports none of them, so that a program pays only for
the side it uses.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
