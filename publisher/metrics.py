"""The old path of `broadcache.publisher.telemetry.prometheus`, until 0.2."""

from collections.abc import Callable
from typing import Any

from ..shared.process.renamed import moved_to

__getattr__: Callable[[str], Any] = moved_to("broadcache.publisher.telemetry.prometheus", __name__)
