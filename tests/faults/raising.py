"""A user's mapping that raises at random: a TTLCache whose methods fail now and then."""

import random
from typing import Final

from cachetools import TTLCache

DELETE_FAILS: Final = 0.1
SET_FAILS: Final = 0.02
# Of each read, of which there are thousands a second.
GET_FAILS: Final = 0.001


class MappingBroke(Exception):
    """What the mapping raises."""


class RaisingTTLCache(TTLCache[str, int]):
    """`chance` decides which call raises. What raises has done nothing."""

    def __init__(self, maxsize: float, ttl: float, *, chance: random.Random) -> None:
        super().__init__(maxsize, ttl)
        self._chance: Final = chance.random

    def __getitem__(self, key: str) -> int:
        self._break_at_random(GET_FAILS)
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: int) -> None:
        self._break_at_random(SET_FAILS)
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self._break_at_random(DELETE_FAILS)
        super().__delitem__(key)

    def _break_at_random(self, share: float) -> None:
        if self._chance() < share:
            raise MappingBroke("a mapping that raises at random has raised")
