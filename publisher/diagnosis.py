"""The old path of `broadcache.publisher.doctor.diagnosis`, until 0.2."""

from collections.abc import Callable
from typing import Any

from ..shared.process.renamed import moved_to

__getattr__: Callable[[str], Any] = moved_to(
    "broadcache.publisher.doctor.diagnosis",
    __name__,
    elsewhere={
        "Discover": "broadcache.publisher.doctor.fanout_check",
        "look_up": "broadcache.publisher.doctor.fanout_check",
    },
)
