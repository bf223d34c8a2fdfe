"""The live channel of a namespace, for a person or a script that watches it."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, Protocol

from ..shared.errors import LinkLost, MalformedFrame
from ..shared.invalidation import Invalidation, check_namespace
from ..shared.link import Link, RedisAddress, Refused
from ..shared.log import names_of
from ..shared.wire import decode

__all__ = ["Channel", "Observer"]

_ANSWER_SECONDS: Final = 2.0
_PING_INTERVAL_SECONDS: Final = 1.0
_BACKOFF_SECONDS_MIN: Final = 0.05
_BACKOFF_SECONDS_MAX: Final = 5.0


class Observer(Protocol):
    """What is told of a channel's life."""

    def on_invalidation(self, invalidation: Invalidation) -> None:
        """Take an invalidation; its `position` is None when it was published past the log."""

    def on_unreadable(self, frame: bytes, error: MalformedFrame) -> None:
        """Take a message that is no invalidation. Replicas drop everything."""

    def on_link(self, label: str) -> None:
        """Take note that messages arrive from now on."""

    def on_lost(self, error: LinkLost) -> None:
        """Take note that they no longer do. Called once an outage."""


class Channel:
    """Follows one channel over links of its own, each made anew when it is lost or silent, for ever."""

    def __init__(self, redis_url: str, namespace: str, *, uniform: Callable[[], float] = random.random) -> None:
        self._namespace = check_namespace(namespace)
        self._address = RedisAddress(redis_url).of(namespace)
        self._uniform = uniform

    async def follow(self, observer: Observer) -> None:
        """Tell `observer` of everything, until cancelled. Whatever the observer raises ends it."""
        failures = 0
        while True:
            try:
                async with self._subscribed() as arrivals:
                    observer.on_link(self._address.label)
                    failures = 0
                    async for frame in arrivals:
                        self._report(frame, observer)
            except LinkLost as error:
                if not failures:
                    observer.on_lost(error)
                failures += 1
            ceiling_seconds: float = min(_BACKOFF_SECONDS_MAX, _BACKOFF_SECONDS_MIN * 2.0 ** min(failures, 16))
            await asyncio.sleep(self._uniform() * ceiling_seconds)

    @asynccontextmanager
    async def _subscribed(self) -> AsyncIterator[AsyncIterator[bytes]]:
        """Subscribe on a new link, and give what arrives. Raises: LinkLost."""
        frames: asyncio.Queue[bytes | LinkLost] = asyncio.Queue()
        link = await Link.open(
            self._address,
            client_name="broadcache:watch",
            timeout_seconds=_ANSWER_SECONDS,
            on_message=lambda channel, frame: frames.put_nowait(frame),
        )
        try:
            link.lost.add_done_callback(lambda lost: frames.put_nowait(lost.result()))
            await _answered(link, link.subscribe(names_of(self._namespace).channel))
            yield _arrivals(link, frames)
        finally:
            await link.close()

    def _report(self, frame: bytes, observer: Observer) -> None:
        try:
            invalidation = decode(frame, self._namespace)
        except MalformedFrame as error:
            observer.on_unreadable(frame, error)
        else:
            observer.on_invalidation(invalidation)


async def _arrivals(link: Link, frames: "asyncio.Queue[bytes | LinkLost]") -> AsyncIterator[bytes]:
    """Yield frames; when none comes for a while, have the server prove that it is there. Raises: LinkLost."""
    while True:
        try:
            async with asyncio.timeout(_PING_INTERVAL_SECONDS):
                arrived = await frames.get()
        except TimeoutError:
            await _answered(link, link.call("PING"))
            continue
        if isinstance(arrived, LinkLost):
            raise arrived
        yield arrived


async def _answered(link: Link, call: Awaitable[object]) -> None:
    """Wait for an answer, for a while. Raises: LinkLost."""
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            await call
    except TimeoutError:
        raise LinkLost(f"expected an answer from {link.label} within {_ANSWER_SECONDS:g} s, got none") from None
    except Refused as refusal:
        raise LinkLost(f"expected {link.label} to let this user subscribe, got: {refusal}") from refusal
