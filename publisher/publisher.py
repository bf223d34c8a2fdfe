"""The publisher: logs invalidations, which reaches every replica that listens."""

import asyncio
import contextlib
import random
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Final, Self, TypeVar

from ..shared.address import RedisAddress
from ..shared.clock import Clock, monotonic
from ..shared.confirmation import Confirm
from ..shared.errors import BroadcacheError, InvalidSettings, LinkLost, LogRefused, NotPrimary
from ..shared.invalidation import (
    DEFAULT_NAMESPACE,
    SOURCE_BYTES_MAX,
    Invalidation,
    Position,
    Target,
    check_namespace,
    check_text,
    invalidation_of,
)
from ..shared.link import Link
from ..shared.log import LOG_LENGTH, Entry, Receipt, append, head, read_newest
from ..shared.presence import ReplicaPresence, presences, registered, replicas_of
from .confirmations import Confirmations, Wait
from .kept_link import KeptLink, KeptLinks

__all__ = ["Publisher"]

T = TypeVar("T")

_CALL_TIMEOUT_SECONDS_MAX: Final = 1.0
_BACKOFF_SECONDS_MIN: Final = 0.02
_BACKOFF_SECONDS_MAX: Final = 0.5
_RECEIPT_SECONDS_MIN: Final = 30.0
_LOOK_INTERVAL_SECONDS: Final = 0.25
"""How often a publish that waits for replicas looks at their positions: a report may have been lost."""
_LOOK_SECONDS: Final = 0.25
"""How long such a look may take, also beyond the time that was to be waited."""
_PAGE_ENTRIES: Final = 100
"""How much history is read at once: publishes share the connection, and wait behind it."""


class Publisher:
    """Publishes over one connection (in a cluster: one for each namespace), which concurrent calls share.

    It is made anew when it is lost, and when its server is no primary any more.

    An asynchronous context manager. Entering does not connect: a publisher outlives a Redis that is away, and each
    `publish` says whether it was logged.

    Shape:  `source` tells replicas and operators who published; the host's name when it is left out.
    Units:  `timeout_seconds` is how long one `publish` tries, `log_length` about how many invalidations of a namespace
            the log keeps for replicas that were away.
    Raises: InvalidSettings.
    """

    def __init__(
        self,
        url: str,
        *,
        source: str | None = None,
        timeout_seconds: float = 5.0,
        log_length: int = LOG_LENGTH,
        uniform: Callable[[], float] = random.random,
        clock: Clock = monotonic,
    ) -> None:
        if not 0 < timeout_seconds <= 3_600:
            raise InvalidSettings(f"expected timeout_seconds to be above 0 and at most 3600, got {timeout_seconds!r}")
        if log_length < 1:
            raise InvalidSettings(f"expected log_length to be at least 1, got {log_length!r}")
        self.source: Final = check_text(socket.gethostname() if source is None else source, SOURCE_BYTES_MAX, "source")
        self._address = RedisAddress(url)
        self._timeout_seconds = timeout_seconds
        # There must be time left for a new link after one that keeps silent: else it would be kept for ever.
        self._call_timeout_seconds = min(_CALL_TIMEOUT_SECONDS_MAX, timeout_seconds / 2)
        self._log_length = log_length
        self._uniform = uniform
        self._is_entered = False
        self._links = KeptLinks(self._address, client_name="broadcache:publisher")
        self._confirmations = Confirmations(self._address, clock=clock)

    async def __aenter__(self) -> Self:
        self._is_entered = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. Closing twice, or before entering, is harmless."""
        self._is_entered = False
        await asyncio.gather(self._links.close(), self._confirmations.close())

    async def publish(
        self,
        *targets: Target,
        namespace: str = DEFAULT_NAMESPACE,
        reason: str = "",
        id: str | None = None,
        receipt_seconds: float | None = None,
        confirm: Confirm | None = None,
    ) -> Receipt:
        """Log one invalidation of all `targets` and publish it. It is accepted when this returns.

        With `confirm`, it waits besides until every replica that is there has applied it, or the time for that is up:
        the receipt's `confirmation` names each of them.

        It is tried again until `timeout_seconds` have passed, always with the same id, and is logged once. To go on
        trying after LinkLost, call again with the same `id`.

        Shape:  one too large for one message is split, logged atomically, and the receipt has the last position.
        Units:  `receipt_seconds` is how long the id is remembered, by default at least half a minute.
        Raises: InvalidTarget (for a reason or an id that is too long as well), InvalidNamespace; LinkLost when it is
                not known whether it was logged; LogRefused when it was not, NotPrimary when no primary was found that
                would; IdempotencyConflict when the id was used for other targets.
        """
        invalidation = invalidation_of(
            targets, namespace=namespace, reason=reason, source=self.source, id=id, confirm=confirm is not None
        )
        if receipt_seconds is None:
            receipt_seconds = max(_RECEIPT_SECONDS_MIN, 2 * self._timeout_seconds)

        async def logged(link: Link) -> Receipt:
            return await append(link, invalidation, log_length=self._log_length, receipt_seconds=receipt_seconds)

        try:
            if confirm is not None:
                return await self._confirmed(invalidation, logged, confirm)
            return await self._with_retries(namespace, logged)
        except LinkLost as error:
            raise LinkLost(
                f"expected Redis to log the invalidation within {self._timeout_seconds:g} s, it did not answer; it may "
                f"have been logged: publish again with id={invalidation.id!r}, which is harmless. Last: {error}"
            ) from error

    async def history(
        self, namespace: str = DEFAULT_NAMESPACE, *, count: int = 100, before: int | None = None
    ) -> list[Entry]:
        """Return up to `count` logged invalidations, the newest first; with `before`, those of a lower sequence.

        Raises: InvalidNamespace, LinkLost, LogRefused.
        """
        check_namespace(namespace)
        entries: list[Entry] = []
        while len(entries) < count:
            page_count = min(_PAGE_ENTRIES, count - len(entries))
            page = await self._with_retries(
                namespace, partial(read_newest, namespace=namespace, count=page_count, before=before)
            )
            entries += page
            if len(page) < page_count:
                break
            before = page[-1].sequence
        return entries

    async def head(self, namespace: str = DEFAULT_NAMESPACE) -> Position | None:
        """Return the position of the newest logged invalidation. Raises: InvalidNamespace, LinkLost, LogRefused."""
        check_namespace(namespace)
        return await self._with_retries(namespace, lambda link: head(link, namespace))

    async def replicas(self, namespace: str = DEFAULT_NAMESPACE) -> list[ReplicaPresence]:
        """Return the replicas that follow `namespace`, by name, as each was at its last echo.

        Raises: InvalidNamespace, LinkLost, LogRefused.
        """
        check_namespace(namespace)
        return await self._with_retries(namespace, lambda link: replicas_of(link, namespace))

    async def _confirmed(
        self, invalidation: Invalidation, logged: Callable[[Link], Awaitable[Receipt]], confirm: Confirm
    ) -> Receipt:
        """Have it logged, and wait for the replicas."""
        namespace = invalidation.namespace

        async def expected_then_logged(link: Link) -> Receipt:
            # Before, so that whoever must not be asked for replicas is told so while nothing has been logged. Who
            # registers in between has subscribed before, and hears of it.
            wait.expect(await registered(link, namespace))
            return await logged(link)

        self._check_is_entered()
        with self._confirmations.waiting(namespace, invalidation.id) as wait:
            listen_seconds = min(self._call_timeout_seconds, confirm.timeout_seconds)
            is_heard = await self._confirmations.listen(namespace, listen_seconds)
            receipt = await self._with_retries(namespace, expected_then_logged)
            wait.accept(receipt.position)
            # Of what was logged before, nothing is published again: only positions can tell.
            await self._wait(wait, receipt, confirm.timeout_seconds, is_reported=is_heard and not receipt.is_repeat)
            return receipt._replace(confirmation=wait.confirmation())

    async def _wait(self, wait: Wait, receipt: Receipt, timeout_seconds: float, *, is_reported: bool) -> None:
        """Wait until nobody is missing, at most `timeout_seconds`; meanwhile look at positions now and then."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        look_seconds = _LOOK_INTERVAL_SECONDS if is_reported else 0.0
        while self._is_entered and wait.missing and (left_seconds := deadline - loop.time()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_seconds, look_seconds)):
                    await wait.until_complete()
            await self._look_at_positions(wait, receipt.namespace)
            look_seconds = _LOOK_INTERVAL_SECONDS
        if is_reported and not wait.has_heard and wait.confirmation().confirmed:
            await self._confirmations.distrust(receipt.namespace)

    async def _look_at_positions(self, wait: Wait, namespace: str) -> None:
        """See in the presences of who is missing whether a report was lost. What cannot be seen is not known."""
        missing = wait.missing
        if not missing or not self._is_entered:
            return
        with contextlib.suppress(BroadcacheError, TimeoutError):
            async with asyncio.timeout(_LOOK_SECONDS):
                link = await (await self._link_for(namespace)).connected()
                for presence in (await presences(link, namespace, missing)).values():
                    wait.take_position(presence)

    def _check_is_entered(self) -> None:
        if not self._is_entered:
            raise InvalidSettings("expected a publisher that is open, got one that is not: use it within `async with`")

    async def _with_retries(self, namespace: str, work: Callable[[Link], Awaitable[T]]) -> T:
        """Do `work` over a link, over new ones when it is lost, until there is a result or the time is up."""
        self._check_is_entered()
        last: LinkLost | NotPrimary | None = None
        attempt = 0
        try:
            async with asyncio.timeout(self._timeout_seconds):
                while True:
                    if not self._is_entered:
                        raise LinkLost("the publisher was closed meanwhile")
                    try:
                        kept = await self._link_for(namespace)
                        return await self._answered(await kept.connected(), work)
                    except LinkLost as error:
                        last = error
                    except NotPrimary as error:
                        # What was lost on the way before may have been logged: then that is what there is to say.
                        last = last if isinstance(last, LinkLost) else error
                    except LogRefused as error:
                        if isinstance(last, LinkLost):
                            raise LinkLost(f"{last}; and then: {error}") from error
                        raise
                    attempt += 1
                    ceiling_seconds = min(_BACKOFF_SECONDS_MAX, _BACKOFF_SECONDS_MIN * 2.0 ** min(attempt, 16))
                    await asyncio.sleep(self._uniform() * ceiling_seconds)
        except TimeoutError:
            raise last or LinkLost(f"no answer from {self._address.label}") from None

    async def _answered(self, link: Link, work: Callable[[Link], Awaitable[T]]) -> T:
        """Do `work`, but leave a link that keeps silent, or leads to a server that does not take it any more."""
        try:
            async with asyncio.timeout(self._call_timeout_seconds):
                return await work(link)
        except TimeoutError:
            await link.close()
            raise LinkLost(f"no answer from {link.label} within {self._call_timeout_seconds:g} s") from None
        except NotPrimary:
            await link.close()
            raise

    async def _link_for(self, namespace: str) -> KeptLink:
        """Return the link that leads to where `namespace` is."""
        return await self._links.of(namespace)
