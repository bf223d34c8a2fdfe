"""The old path of `broadcache.shared.process.logs`, until 0.2."""

from .process.renamed import moved_to

__getattr__ = moved_to("broadcache.shared.process.logs", __name__)
