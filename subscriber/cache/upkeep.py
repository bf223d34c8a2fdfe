"""What a cache and its subscriber know of each other."""

import logging
from collections.abc import Callable
from typing import Any
from weakref import ref

from ...shared.errors import InvalidSettings
from ...shared.invalidation import Invalidation

__all__ = ["Upkeep"]

_log = logging.getLogger("broadcache.subscriber")


def _warn_of_no_subscriber() -> None:
    _log.warning(
        "a LocalCache is bypassed, every read goes to the source (with when_incoherent='serve' it serves what no "
        "publisher can invalidate): no subscriber was ever started for it; expected "
        "Subscriber(url, caches={'products': cache}), entered before the first read"
    )


class Upkeep:
    """Whether invalidations arrive at a cache, and what a bypassed read calls, once, while no subscriber runs.

    Shape:  `has_left` is whether its subscriber has left in order, or this process is a forked child in which it has
            not started: no publisher expects it. `is_listed_as_bypass` is whether publishers have been told that it
            serves nothing once it is cut off. In both cases `when_incoherent="serve"` has no effect.
            `home` is its subscriber and its namespace, for invalidations that begin at the cache. `on_invalidated` is
            the user's function that is called after each invalidation was applied.
    """

    __slots__ = ("has_left", "home", "is_connected", "is_listed_as_bypass", "on_bypass", "on_invalidated")

    def __init__(self, on_invalidated: Callable[[Invalidation], object] | None) -> None:
        given: Any = on_invalidated
        if given is not None and not callable(given):
            raise InvalidSettings(
                f"expected on_invalidated to be a function or None, got {type(given).__name__}; pass one that is "
                "called with each Invalidation"
            )
        self.has_left: bool = False
        self.is_connected: bool = False
        self.is_listed_as_bypass: bool = False
        self.on_bypass: Callable[[], None] | None = _warn_of_no_subscriber
        self.home: tuple[ref[Any], str] | None = None
        self.on_invalidated: Callable[[Invalidation], object] | None = on_invalidated

    def report_invalidated(self, invalidation: Invalidation) -> None:
        """Call the user's function; log what it raises: the invalidation was applied."""
        if self.on_invalidated is not None:
            try:
                self.on_invalidated(invalidation)
            except Exception:  # noqa: BLE001  (the user's code)
                _log.exception("on_invalidated failed: expected a function that does not raise")
