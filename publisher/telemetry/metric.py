"""One number for a metrics system."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

__all__ = ["Metric"]


class Metric(NamedTuple):
    """One number for a metrics system; `kind` is `counter` or `gauge`."""

    name: str
    kind: Literal["counter", "gauge"]
    description: str
    labels: Mapping[str, str]
    value: float
