"""The old path of `broadcache.shared.process.logs`, until 0.2."""

from collections.abc import Callable
from typing import Any

from .process.renamed import moved_to

__getattr__: Callable[[str], Any] = moved_to("broadcache.shared.process.logs", __name__)
