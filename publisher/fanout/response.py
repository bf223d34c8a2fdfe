"""The response of one address to one request, or the reason why there is none."""

from typing import Final, Literal, NamedTuple, TypeAlias

__all__ = ["Header", "HttpResponse", "NoResponse", "NoResponseResult"]

Header = tuple[bytes, bytes]


NoResponseResult: TypeAlias = Literal["refused", "timeout", "failed"]
"""How a request ended without a response: connection refused, no time left, or any other failure."""


class HttpResponse(NamedTuple):
    """The response of an address.

    Shape:  `body` is the part that arrived, up to the limit. `retry_after_seconds` is the Retry-After header, if it was
            a number of seconds.
    """

    status_code: int
    body: bytes
    retry_after_seconds: float | None


class NoResponse(Exception):
    """The request got no response. `may_be_repeated` if not one byte was sent: the server cannot have acted on it."""

    def __init__(self, why: str, *, result: NoResponseResult, may_be_repeated: bool) -> None:
        super().__init__(why)
        self.result: Final[NoResponseResult] = result
        self.may_be_repeated: Final = may_be_repeated
