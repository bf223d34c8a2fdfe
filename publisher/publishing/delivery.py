"""How an invalidation reaches the replicas: through the log in Redis, by HTTP to each of them, or both."""

from collections.abc import Sequence
from typing import Literal, Protocol, Self, TypeAlias

from ...shared.fanout_report import AddressOutcome, FanoutReport

__all__ = ["AddressOutcome", "Delivery", "FanoutReport", "InvalidationSender"]

Delivery: TypeAlias = Literal["redis", "fanout", "redis-then-fanout", "both"]
"""`redis`: through the log alone. `fanout`: by HTTP alone, and into no log. `redis-then-fanout`: by HTTP as well when
Redis fails or is slow to answer. `both`: always both at once."""


class InvalidationSender(Protocol):
    """What calls every replica of a service. The publisher that it is given to enters it, and closes it."""

    async def __aenter__(self) -> Self:
        """Get ready to call. A publisher that is closed and entered again enters it again."""
        ...

    async def close(self) -> None:
        """Let go of whatever it holds. Closing twice, or before entering, is harmless."""
        ...

    async def send(self, frames: Sequence[bytes]) -> FanoutReport:
        """POST each of `frames` to every replica, and return in bounded time who took all of them.

        Shape:  the frames are those of one invalidation, in order: `encode_unsequenced` in shared/wire.py.
        Raises: nothing. What goes wrong is in the report.
        """
        ...
