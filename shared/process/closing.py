"""A base class for async context managers that close on exit."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import NoReturn, Self

from .copying import refuse_copy

__all__ = ["Closing"]


class Closing(ABC):
    """Calls `close()` on exit, whatever was raised. A subclass that starts something overrides `__aenter__`."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __getstate__(self) -> NoReturn:
        refuse_copy(self)

    @abstractmethod
    async def close(self) -> None:
        """Release all resources. Closing twice is harmless."""
