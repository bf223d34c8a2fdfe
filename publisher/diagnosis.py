"""The old path of `broadcache.publisher.doctor.diagnosis`, until 0.2."""

from ..shared.process.renamed import moved_to

__getattr__ = moved_to("broadcache.publisher.doctor.diagnosis", __name__)
