"""Calls to Redis over shared links: each call has a timeout, and is retried over a new link when the link is lost."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from ...shared.clock import monotonic
from ...shared.errors import InvalidSettings, LinkLost, LogRefused, NotConnected, NotPrimary
from ...shared.process.backoff import Backoff
from ...shared.telemetry.outages import Outages
from ...shared.transport.redis.address import RedisAddress
from ...shared.transport.redis.link import Link
from .kept_link import KeptLinks

__all__ = ["Calls", "check_limits", "without_log"]

T = TypeVar("T")

_CALL_TIMEOUT_SECONDS_MAX: Final = 1.0
_BACKOFF: Final = Backoff(seconds_min=0.04, seconds_max=0.5)
_FORGOTTEN_AFTER_SECONDS: Final = 60.0

_log = logging.getLogger("broadcache.publisher.outages")


class Calls:
    """Owns the links of a publisher, the timeouts and the retries.

    Shape:  `address` is None for a publisher without a log: every call then raises InvalidSettings. A `work` is a
            function that sends its commands over the link that it is given, and may be called several times.
    Units:  `timeout_seconds` limits one call with all its retries. One attempt has half of it, and 1 s at most.
    """

    def __init__(
        self, address: RedisAddress | None, *, timeout_seconds: float, uniform: Callable[[], float] = random.random
    ) -> None:
        self.is_open: bool = False
        # Half, because a new link needs time after a silent one: else the silent link would be kept for ever.
        self.attempt_seconds: Final = min(_CALL_TIMEOUT_SECONDS_MAX, timeout_seconds / 2)
        self._timeout_seconds = timeout_seconds
        self._uniform = uniform
        self.label: Final = "Redis" if address is None else address.label
        self._links = None if address is None else KeptLinks(address, client_name="broadcache:publisher")
        # In a cluster, each namespace may be at another server.
        self._is_cluster = address is not None and address.is_cluster
        self._losses = Outages(
            _log,
            clock=monotonic,
            began=f"{self.label} does not answer as a primary: publishes are retried, and fail when their time is up",
            ended=f"{self.label} answers again",
            forgotten_after_seconds=_FORGOTTEN_AFTER_SECONDS,
        )
        self._refusals = Outages(
            _log,
            clock=monotonic,
            began=f"{self.label} refuses calls",
            ended=f"{self.label} refuses no more calls",
            forgotten_after_seconds=_FORGOTTEN_AFTER_SECONDS,
        )

    def open(self) -> None:
        """Allow calls. The links are opened by the first call that needs them."""
        self.is_open = True

    def stop_retries(self) -> None:
        """End each call with its current attempt, and refuse new ones. `once` works until `close`."""
        self.is_open = False

    async def close(self) -> None:
        """Close the links. Closing twice, or before opening, is harmless."""
        self.stop_retries()
        if self._links is not None:
            await self._links.close()

    def abandon(self) -> None:
        """Close the links without their event loop, which has ended. The next call opens new ones."""
        if self._links is not None:
            self._links.abandon()

    def check_is_open(self) -> None:
        """Raises: InvalidSettings."""
        if not self.is_open:
            raise InvalidSettings("the publisher is not open: use it within `async with`")

    def check_has_log(self) -> None:
        """Raises: InvalidSettings, also when not open."""
        self.check_is_open()
        if self._links is None:
            raise without_log()

    async def link(self, namespace: str) -> Link:
        """Return an open link to the server that has `namespace`.

        Raises: LinkLost; InvalidSettings without a log.
        """
        if self._links is None:
            raise without_log()
        return await self._links.connected(namespace)

    async def with_retries(
        self, namespace: str, work: Callable[[Link], Awaitable[T]], on_failure: Callable[[], None] | None = None
    ) -> T:
        """Do `work`, again over a new link after LinkLost or NotPrimary, until there is a result or the time is up.

        Shape:  `on_failure` is called after each failed attempt.
        Raises: LinkLost, which is NotConnected when nothing was sent; LogRefused; NotPrimary; InvalidSettings when not
                open, or without a log.
        """
        self.check_is_open()
        if self._links is None or (link := self._links.shared) is None:
            return await self._with_retries(namespace, work, on_failure, self._timeout_seconds, None)
        # Over an open link one attempt has less time than the whole call, so it needs no timer of that.
        began_at = monotonic()
        try:
            return await self._over(link, namespace, work)
        except (LinkLost, NotPrimary) as error:
            first = error
        left_seconds = self._timeout_seconds - (monotonic() - began_at)
        return await self._with_retries(namespace, work, on_failure, left_seconds, first)

    async def _with_retries(
        self,
        namespace: str,
        work: Callable[[Link], Awaitable[T]],
        on_failure: Callable[[], None] | None,
        timeout_seconds: float,
        first: LinkLost | NotPrimary | None,
    ) -> T:
        """Do what `with_retries` does; `first` is the error of an attempt before, and this is left of the time."""
        was_sent = first is not None

        async def sent(link: Link) -> T:
            nonlocal was_sent
            was_sent = True
            return await work(link)

        lost = first if isinstance(first, LinkLost) else None
        refused = first if isinstance(first, NotPrimary) else None
        failures = 0
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    if lost is not None or refused is not None:
                        if on_failure is not None:
                            on_failure()
                        failures += 1
                        await asyncio.sleep(_BACKOFF.seconds(failures, self._uniform))
                    if not self.is_open:
                        closed = "the publisher was closed during the call"
                        raise LinkLost(closed) if was_sent else NotConnected(closed)
                    try:
                        return await self.once(namespace, sent)
                    except LinkLost as error:
                        lost = error
                    except NotPrimary as error:
                        refused = error
                    except LogRefused as error:
                        if lost is None or not was_sent:
                            raise
                        raise _both(lost, error) from error
        except TimeoutError:
            if was_sent and lost is not None and refused is not None:
                raise _both(lost, refused) from None
            failure = lost or refused or LinkLost(f"no answer from {self.label}")
            raise (failure if was_sent or isinstance(failure, NotPrimary) else NotConnected(str(failure))) from None

    async def once(self, namespace: str, work: Callable[[Link], Awaitable[T]]) -> T:
        """Do `work` once. A link that is silent, or leads to a server that is no primary, is closed.

        Raises: LinkLost; LogRefused; NotPrimary; InvalidSettings without a log.
        """
        part = namespace if self._is_cluster else ""
        try:
            link = await self.link(namespace)
        except LinkLost as error:
            self._losses.record_failure(part, error)
            raise
        return await self._over(link, namespace, work)

    async def _over(self, link: Link, namespace: str, work: Callable[[Link], Awaitable[T]]) -> T:
        """Do `work` over `link`. Raises: as `once`."""
        part = namespace if self._is_cluster else ""
        try:
            async with link.within(self.attempt_seconds):
                result = await work(link)
        except (LinkLost, NotPrimary) as error:
            self._losses.record_failure(part, error)
            await link.close()
            if self._links is not None:
                self._links.distrust(namespace, link)
            raise
        except LogRefused as error:
            self._refusals.record_failure(namespace, error)
            raise
        self._losses.record_success(part)
        self._refusals.record_success(namespace)
        return result


def check_limits(
    timeout_seconds: float, log_length: int, fallback_after_seconds: float, retry_queue_names_max: int
) -> None:
    """Check the numbers that a publisher was given. Raises: InvalidSettings."""
    if not 0 < timeout_seconds <= 3_600:
        raise InvalidSettings(f"expected timeout_seconds to be above 0 and at most 3600, got {timeout_seconds!r}")
    if log_length < 1:
        raise InvalidSettings(f"expected log_length to be at least 1, got {log_length!r}")
    if not 0 <= fallback_after_seconds <= 3_600:
        raise InvalidSettings(f"expected fallback_after_seconds to be from 0 to 3600, got {fallback_after_seconds!r}")
    if retry_queue_names_max < 1:
        raise InvalidSettings(f"expected retry_queue_names_max to be at least 1, got {retry_queue_names_max!r}")


def without_log() -> InvalidSettings:
    """Return the error for a call of a publisher that has no log."""
    return InvalidSettings('this publisher has no log: delivery="fanout" was given without a url; add the url')


def _both(lost: LinkLost, refused: LogRefused) -> LinkLost:
    """Return the error for an attempt that was lost and one that was refused: the lost one may have been logged."""
    return LinkLost(f"{lost}; besides: {refused}")
