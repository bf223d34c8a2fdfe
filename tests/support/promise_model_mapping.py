"""A mapping that raises where a schedule wants it to."""

from typing import Any


class MappingBroken(Exception):
    """Raised on purpose: user code may raise anything."""


class RaisingMapping(dict[str, Any]):
    """A dict, until `blow`. What it raises at it has not done."""

    def __init__(self) -> None:
        super().__init__()
        self._method = ""
        self._skipped = 0
        self._is_for_ever = False

    def blow(self, method: str, skipped: int, is_for_ever: int) -> None:
        """Have `method` raise after `skipped` calls that do not: once, or from then on."""
        self._method, self._skipped, self._is_for_ever = method, skipped, bool(is_for_ever)

    def mend(self) -> None:
        self._method = ""

    def __getitem__(self, key: str) -> Any:
        self._raise_in("__getitem__")
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        self._raise_in("__setitem__")
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self._raise_in("__delitem__")
        super().__delitem__(key)

    def pop(self, key: str, *default: Any) -> Any:
        self._raise_in("__delitem__")
        return super().pop(key, *default)

    def _raise_in(self, method: str) -> None:
        if method == self._method:
            if self._skipped:
                self._skipped -= 1
                return
            if not self._is_for_ever:
                self._method = ""
            raise MappingBroken(f"{method} raises on purpose")
