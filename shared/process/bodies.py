"""Bodies of HTTP requests, read up to a limit."""

from collections.abc import AsyncIterable

__all__ = ["read_at_most"]


async def read_at_most(chunks: AsyncIterable[bytes], bytes_max: int) -> bytes:
    """Join `chunks`; stop reading as soon as they exceed `bytes_max`.

    Shape: a body that is too long is returned as its first `bytes_max + 1` bytes.
    """
    kept: list[bytes] = []
    left_bytes = bytes_max + 1
    async for chunk in chunks:
        kept.append(chunk[:left_bytes])
        left_bytes -= len(chunk)
        if left_bytes <= 0:
            break
    return b"".join(kept)
