"""What a subscriber follows in a `coherent` block, in place of a link: always coherent, and connected to nothing."""

import asyncio
from collections.abc import Callable
from typing import Any, NoReturn

from ..subscriber.following.follower import Follower
from ..subscriber.following.sequencer import Sequencer
from ..subscriber.following.state import State

__all__ = ["StandIn"]


class StandIn(Follower):
    """A follower without a link. `on_add` is called with the sequencer of each namespace, and makes it coherent."""

    def __init__(self, on_add: Callable[[Sequencer], None], address: Any, **options: Any) -> None:
        super().__init__(address, **options)
        self._on_add = on_add
        self.state: State = "coherent"
        self._is_coherent.set()

    def add(self, sequencer: Sequencer) -> None:
        """Follow one more namespace, or one that has a new cache."""
        state = self.state
        super().add(sequencer)
        self._on_add(sequencer)
        if state == "coherent":
            self._enter(state)

    def again(self, replica_id: str) -> "StandIn":
        """Go on in the next event loop."""
        self.state = "connecting"
        self._is_coherent = asyncio.Event()  # an event belongs to one loop
        return self

    async def wait_coherent(self) -> None:
        """Wait until the subscriber's tasks have begun."""
        await self._is_coherent.wait()

    async def follow_for_ever(self) -> NoReturn:
        """Wait to be cancelled."""
        self._enter("coherent")
        while True:
            await asyncio.Event().wait()

    def leave(self, state: State) -> None:
        """Stay coherent: the caches of a block serve until its end, whether their subscriber runs or not."""
        self._enter("coherent")
