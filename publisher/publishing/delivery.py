"""How an invalidation reaches the replicas: through the log in Redis, by HTTP to each of them, or both."""

from collections.abc import Sequence
from typing import Any, Final, Literal, Protocol, Self, TypeAlias, get_args

from ...shared.errors import InvalidSettings
from ...shared.fanout_report import AddressOutcome, FanoutReport
from ...shared.process.renamed import warn_of_rename

__all__ = ["AddressOutcome", "Delivery", "FanoutReport", "InvalidationSender", "check_delivery", "sender_of"]

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


def sender_of(fanout: object) -> InvalidationSender:
    """Return `fanout` as a sender. One that has the old `tell` instead of `send` works until 0.2, with a warning.

    Raises: InvalidSettings when it can send nothing.
    """
    kind = type(fanout)
    if not (hasattr(kind, "__aenter__") and hasattr(kind, "close")):
        raise InvalidSettings(_expected_of(fanout))
    if callable(send := getattr(kind, "send", None)) and send is not InvalidationSender.send:
        return fanout  # type: ignore[return-value]
    if not callable(getattr(kind, "tell", None)):
        raise InvalidSettings(_expected_of(fanout))
    warn_of_rename(f"{kind.__name__}.tell", "send", stacklevel=4)
    return _OldSender(fanout)


def check_delivery(delivery: Delivery, *, has_url: bool, has_fanout: bool) -> None:
    """Check that `delivery` is known, and has what it needs and nothing else. Raises: InvalidSettings."""
    known = get_args(Delivery)
    if delivery not in known:
        raise InvalidSettings(f"expected delivery to be one of {', '.join(known)}, got {delivery!r}")
    if delivery != "redis" and not has_fanout:
        raise InvalidSettings(
            f"expected a fanout for delivery={delivery!r}, got None: name the replicas' service, or use "
            'delivery="redis"'
        )
    if delivery == "redis" and has_fanout:
        raise InvalidSettings(
            'expected no fanout for delivery="redis", got one: it would never be used; pass '
            'delivery="redis-then-fanout", or no fanout'
        )
    if delivery != "fanout" and not has_url:
        raise InvalidSettings(
            f'expected a url for delivery={delivery!r}, got None: only delivery="fanout" needs no log'
        )


class _OldSender:
    """A sender whose method still has its old name, `tell`."""

    def __init__(self, sender: Any) -> None:
        self._sender: Final = sender

    async def __aenter__(self) -> Self:
        await self._sender.__aenter__()
        return self

    async def close(self) -> None:
        await self._sender.close()

    async def send(self, frames: Sequence[bytes]) -> FanoutReport:
        report: FanoutReport = await self._sender.tell(frames)
        return report


def _expected_of(fanout: object) -> str:
    return (
        f"fanout: expected an object with __aenter__, close and send, such as Fanout(service, port), got "
        f"{type(fanout).__name__}"
    )
