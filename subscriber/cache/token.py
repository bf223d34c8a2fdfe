"""The token of a load: proof of when it began."""

from typing import NamedTuple

__all__ = ["LoadToken"]


class LoadToken(NamedTuple):
    """Proof of when a load began: made by `LocalCache.begin_load`, an argument of `LocalCache.store`."""

    key: str
    stamp: int
    began_at: float
