"""How an invalidation reaches the replicas: through the log in Redis, by HTTP to each of them, or both."""

from collections.abc import Sequence
from typing import Literal, Protocol, Self, TypeAlias

from ...shared.fanout_report import AddressOutcome, FanoutReport

__all__ = ["AddressOutcome", "Delivery", "FanoutReport", "InvalidationSender"]

Delivery: TypeAlias = Literal["redis", "fanout", "redis-then-fanout", "both"]
"""`redis`: through the log alone. `fanout`: by HTTP alone, and into no log. `redis-then-fanout`: by HTTP as well when
Redis fails or is slow to answer. `both`: always both at once."""


class InvalidationSender(Protocol):
    """Sends invalidations to every replica of a service. The publisher that owns it enters it, and closes it."""

    async def __aenter__(self) -> Self:
        """Prepare to send. A publisher that is closed and entered again enters it again."""
        ...

    async def close(self) -> None:
        """Release all resources. Closing twice, or before entering, is harmless."""
        ...

    async def send(self, frames: Sequence[bytes]) -> FanoutReport:
        """POST each of `frames` to every replica, and report in bounded time which replicas applied all of them.

        Shape:  the frames are those of one invalidation, in order: `encode_unsequenced` in shared/wire.py.
        Raises: nothing. The report has every failure.
        """
        ...
