"""The newest invalidation of each key that an audit has read from the log."""

from collections.abc import Container
from typing import Final

from ...shared.invalidation import Invalidation

__all__ = ["NewestInvalidations"]

_NAMES_MAX: Final = 50_000
_PREFIXES_MAX: Final = 1_000


class NewestInvalidations:
    """The sequence of the newest invalidation that may have named a key.

    Bounded: keys that no sample needs are forgotten, and prefixes beyond the limit count for every key.
    """

    def __init__(self) -> None:
        self._keys: dict[str, int] = {}
        self._prefixes: dict[str, int] = {}
        self._everything = 0

    def of(self, key: str) -> int:
        """Return the sequence of the newest invalidation that may have named `key`; 0 if there is none."""
        prefixed = (sequence for prefix, sequence in self._prefixes.items() if key.startswith(prefix))
        return max(self._everything, self._keys.get(key, 0), *prefixed)

    def record(self, sequence: int, invalidation: Invalidation) -> None:
        """Record an invalidation: its keys and prefixes, or every key if it names tags or everything."""
        self._keys.update(dict.fromkeys(invalidation.keys, sequence))
        self._prefixes.update(dict.fromkeys(invalidation.prefixes, sequence))
        # The publisher does not know the tags of entries.
        if invalidation.everything or invalidation.tags:
            self.record_everything(sequence)

    def record_everything(self, sequence: int) -> None:
        """Record an invalidation that may have named any key."""
        self._everything = sequence
        self._prefixes.clear()

    def trim(self, kept: Container[str | None]) -> None:
        """Forget keys other than `kept`, and merge the prefixes, once there are too many."""
        if len(self._keys) > _NAMES_MAX:
            self._keys = {key: sequence for key, sequence in self._keys.items() if key in kept}
        if len(self._prefixes) > _PREFIXES_MAX:
            self.record_everything(max(self._prefixes.values()))
