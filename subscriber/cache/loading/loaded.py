"""What a loader may return instead of a value: the value, and what only the source knows of it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

from ..checks import Names, Ttl, checked_tags, checked_ttl

__all__ = ["AsyncLoader", "Loaded", "Loader"]

T = TypeVar("T")
V_co = TypeVar("V_co", covariant=True)

Loader: TypeAlias = Callable[[], T]
AsyncLoader: TypeAlias = Callable[[], Awaitable[T]]


@dataclass(frozen=True, slots=True)
class Loaded(Generic[V_co]):
    """A loaded value, with tags, lifetime, and whether to store it: `Loaded(product, tags=("shop:7",))`.

    A loader returns it instead of the value. Its callers get the value.

    Shape:  `tags` are added to those of the call; `ttl_seconds` takes the place of that of the call. With `store=False`
            nothing is stored, and an older value is dropped.
    Raises: InvalidName, InvalidSettings.
    """

    value: V_co
    tags: Names = field(default=(), kw_only=True)
    ttl_seconds: Ttl = field(default=None, kw_only=True)
    store: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tags", checked_tags(self.tags))
        object.__setattr__(self, "ttl_seconds", checked_ttl(self.ttl_seconds))
