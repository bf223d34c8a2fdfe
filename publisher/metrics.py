"""The old path of `broadcache.publisher.telemetry.prometheus`, until 0.2."""

from ..shared.process.renamed import moved_to

__getattr__ = moved_to("broadcache.publisher.telemetry.prometheus", __name__)
