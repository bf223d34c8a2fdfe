"""What a fault is: something done to a stage, and which of the controls must break the promise under it."""

from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal, NamedTuple

from tests.faults.stage import StageSettings

SOME_WRITES: Final = 20

# Each takes the stage of its own topology.
Inject = Callable[[Any], Awaitable[None]]
Breaks = frozenset[Literal["naive", "clearing"]]

BOTH: Final[Breaks] = frozenset({"naive", "clearing"})
NAIVE: Final[Breaks] = frozenset({"naive"})


class Fault(NamedTuple):
    """`breaks`: the controls that must break the promise under it; the others may, or cannot be made to for certain."""

    name: str
    inject: Inject
    breaks: Breaks = frozenset()
    settings: StageSettings = StageSettings()

    @property
    def key(self) -> str:
        """The name, and the server where it is not the usual one."""
        server = self.settings.server
        return self.name if server == "valkey" else f"{self.name} on {server}"
