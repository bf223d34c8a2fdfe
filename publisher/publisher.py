"""The publisher: logs invalidations, which reaches every replica that listens, and has a second path."""

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Final, Self, TypeVar, get_args

from ..shared.address import RedisAddress
from ..shared.errors import InvalidSettings, LinkLost, LogRefused, NotPrimary
from ..shared.invalidation import (
    DEFAULT_NAMESPACE,
    SOURCE_BYTES_MAX,
    Position,
    Target,
    check_namespace,
    check_text,
    invalidation_of,
)
from ..shared.link import Link
from ..shared.log import LOG_LENGTH, Entry, Receipt, append, head, read_newest
from .backlog import Pending
from .delivery import Delivery, Teller
from .kept_link import KeptLink
from .outbox import OUTBOX_NAMES_MAX, Outbox
from .second_path import SecondPath

__all__ = ["Publisher"]

T = TypeVar("T")

_CALL_TIMEOUT_SECONDS_MAX: Final = 1.0
_BACKOFF_SECONDS_MIN: Final = 0.02
_BACKOFF_SECONDS_MAX: Final = 0.5
_RECEIPT_SECONDS_MIN: Final = 30.0
_LINKS_MAX: Final = 100
"""How many links there are at most in a cluster, where each namespace has its own."""
_PAGE_ENTRIES: Final = 100
"""How much history is read at once: publishes share the connection, and wait behind it."""


class Publisher:
    """Publishes over one connection (in a cluster: one for each namespace), which concurrent calls share.

    It is made anew when it is lost, and when its server is no primary any more.

    An asynchronous context manager. Entering does not connect: a publisher outlives a Redis that is away, and each
    `publish` says whether it was logged.

    Shape:  `source` tells replicas and operators who published; the host's name when it is left out. With a `delivery`
            other than "redis", `fanout` is what calls the replicas; with "fanout" alone `url` may be None.
    Units:  `timeout_seconds` is how long one `publish` tries, `log_length` about how many invalidations of a namespace
            the log keeps for replicas that were away. `fallback_after_seconds` is how long Redis is waited for before
            the fan-out begins, at most half of `timeout_seconds`; `outbox_names_max` how many names, over all
            namespaces, may wait to be logged.
    Raises: InvalidSettings.
    """

    def __init__(
        self,
        url: str | None,
        *,
        delivery: Delivery = "redis",
        fanout: Teller | None = None,
        source: str | None = None,
        timeout_seconds: float = 5.0,
        log_length: int = LOG_LENGTH,
        fallback_after_seconds: float = 0.25,
        outbox_names_max: int = OUTBOX_NAMES_MAX,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        if not 0 < timeout_seconds <= 3_600:
            raise InvalidSettings(f"expected timeout_seconds to be above 0 and at most 3600, got {timeout_seconds!r}")
        if log_length < 1:
            raise InvalidSettings(f"expected log_length to be at least 1, got {log_length!r}")
        if not 0 <= fallback_after_seconds <= 3_600:
            raise InvalidSettings(
                f"expected fallback_after_seconds to be from 0 to 3600, got {fallback_after_seconds!r}"
            )
        if outbox_names_max < 1:
            raise InvalidSettings(f"expected outbox_names_max to be at least 1, got {outbox_names_max!r}")
        _check_delivery(delivery, has_url=url is not None, has_fanout=fanout is not None)
        self.source: Final = check_text(socket.gethostname() if source is None else source, SOURCE_BYTES_MAX, "source")
        self.delivery: Final = delivery
        self._address = None if url is None else RedisAddress(url)
        self._fanout = fanout
        self._fallback_after_seconds = min(fallback_after_seconds, timeout_seconds / 2)
        self._outbox_names_max = outbox_names_max
        self._second_path: SecondPath | None = None
        self._timeout_seconds = timeout_seconds
        # There must be time left for a new link after one that keeps silent: else it would be kept for ever.
        self._call_timeout_seconds = min(_CALL_TIMEOUT_SECONDS_MAX, timeout_seconds / 2)
        self._log_length = log_length
        self._uniform = uniform
        self._is_entered = False
        self._links: dict[str, KeptLink] = {}

    async def __aenter__(self) -> Self:
        if self._fanout is not None and self._second_path is None:
            await self._fanout.__aenter__()
            self._second_path = self._new_second_path(self._fanout)
        self._is_entered = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def has_log(self) -> bool:
        """Whether there is a log: a publisher that fans out alone may do without Redis."""
        return self._address is not None

    @property
    def outbox_length(self) -> int:
        """How many invalidations wait to be logged."""
        return 0 if self._second_path is None else len(self._second_path.outbox)

    async def close(self, *, last_attempt_seconds: float = 1.0) -> None:
        """End what is under way and close the connection. Closing twice, or before entering, is harmless.

        A fan-out that has begun is waited for. What is in the outbox is tried once more, for up to
        `last_attempt_seconds`; what is left then is lost, and is logged as an error.
        """
        self._is_entered = False
        try:
            if self._second_path is not None:
                await self._second_path.close(last_attempt_seconds)
                self._second_path = None
        finally:
            links, self._links = self._links, {}
            await asyncio.gather(*[link.close() for link in links.values()])

    async def publish(
        self,
        *targets: Target,
        namespace: str = DEFAULT_NAMESPACE,
        reason: str = "",
        id: str | None = None,
        receipt_seconds: float | None = None,
    ) -> Receipt:
        """Log one invalidation of all `targets` and publish it. With delivery "redis" it is accepted when this returns.

        It is tried again until `timeout_seconds` have passed, always with the same id, and is logged once. To go on
        trying after LinkLost or NotDelivered, call again with the same `id`. With another delivery it has been accepted
        by the log or taken by every replica, and the receipt says which; what was not logged waits in the outbox.

        Shape:  one too large for one message is split, logged atomically, and the receipt has the last position.
        Units:  `receipt_seconds` is how long the id is remembered, by default at least half a minute.
        Raises: InvalidTarget (for a reason or an id that is too long as well), InvalidNamespace; LinkLost when it is
                not known whether it was logged; LogRefused when it was not, NotPrimary when no primary was found that
                would; NotDelivered, instead of these three, when it went both ways in vain;
                IdempotencyConflict when the id was used for other targets.
        """
        self._check_is_open()
        invalidation = invalidation_of(targets, namespace=namespace, reason=reason, source=self.source, id=id)
        if receipt_seconds is None:
            receipt_seconds = max(_RECEIPT_SECONDS_MIN, 2 * self._timeout_seconds)

        pending = Pending(invalidation, receipt_seconds)
        if self._second_path is not None:
            return await self._second_path.deliver(pending)
        try:
            return await self._log(pending)
        except LinkLost as error:
            raise LinkLost(
                f"expected Redis to log the invalidation within {self._timeout_seconds:g} s, it did not answer; it may "
                f"have been logged: publish again with id={invalidation.id!r}, which is harmless. Last: {error}"
            ) from error

    async def history(
        self, namespace: str = DEFAULT_NAMESPACE, *, count: int = 100, before: int | None = None
    ) -> list[Entry]:
        """Return up to `count` logged invalidations, the newest first; with `before`, those of a lower sequence.

        Raises: InvalidNamespace, LinkLost, LogRefused; InvalidSettings when there is no log.
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
        """Return the position of the newest logged invalidation.

        Raises: InvalidNamespace, LinkLost, LogRefused; InvalidSettings when there is no log.
        """
        check_namespace(namespace)
        return await self._with_retries(namespace, lambda link: head(link, namespace))

    def _new_second_path(self, teller: Teller) -> SecondPath:
        outbox = Outbox(self._log_once, names_max=self._outbox_names_max, source=self.source, uniform=self._uniform)
        return SecondPath(
            self.delivery,
            teller,
            log=self._log,
            outbox=outbox,
            fallback_after_seconds=self._fallback_after_seconds,
        )

    def _check_is_open(self) -> None:
        if not self._is_entered:
            raise InvalidSettings("expected a publisher that is open, got one that is not: use it within `async with`")

    async def _log(self, pending: Pending, on_failure: Callable[[], None] | None = None) -> Receipt:
        return await self._with_retries(pending.invalidation.namespace, self._appending(pending), on_failure)

    async def _log_once(self, pending: Pending) -> Receipt:
        return await self._once(pending.invalidation.namespace, self._appending(pending))

    def _appending(self, pending: Pending) -> Callable[[Link], Awaitable[Receipt]]:
        return partial(
            append,
            invalidation=pending.invalidation,
            log_length=self._log_length,
            receipt_seconds=pending.receipt_seconds,
        )

    async def _with_retries(
        self, namespace: str, work: Callable[[Link], Awaitable[T]], on_failure: Callable[[], None] | None = None
    ) -> T:
        """Do `work` over a link, over new ones when it is lost, until there is a result or the time is up."""
        self._check_is_open()
        last: LinkLost | NotPrimary | None = None
        attempt = 0
        try:
            async with asyncio.timeout(self._timeout_seconds):
                while True:
                    if not self._is_entered:
                        raise LinkLost("the publisher was closed meanwhile")
                    try:
                        return await self._once(namespace, work)
                    except LinkLost as error:
                        last = error
                    except NotPrimary as error:
                        # What was lost on the way before may have been logged: then that is what there is to say.
                        last = last if isinstance(last, LinkLost) else error
                    except LogRefused as error:
                        if isinstance(last, LinkLost):
                            raise LinkLost(f"{last}; and then: {error}") from error
                        raise
                    if on_failure is not None:
                        on_failure()
                    attempt += 1
                    ceiling_seconds = min(_BACKOFF_SECONDS_MAX, _BACKOFF_SECONDS_MIN * 2.0 ** min(attempt, 16))
                    await asyncio.sleep(self._uniform() * ceiling_seconds)
        except TimeoutError:
            raise last or LinkLost(f"no answer from Redis within {self._timeout_seconds:g} s") from None

    async def _once(self, namespace: str, work: Callable[[Link], Awaitable[T]]) -> T:
        kept = await self._link_for(namespace)
        return await self._answered(await kept.connected(), work)

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
        """Return the link of all namespaces; in a cluster, where each may be at another server, the namespace's own."""
        if self._address is None:
            raise InvalidSettings(
                'expected a publisher that has a log, got one with delivery="fanout" and no url; give it the url'
            )
        key = namespace if self._address.is_cluster else ""
        kept = self._links.pop(key, None) or KeptLink(self._address.of(namespace))
        self._links[key] = kept  # the one used last stands last
        if len(self._links) > _LINKS_MAX:
            await self._links.pop(next(iter(self._links))).close()
        return kept


def _check_delivery(delivery: Delivery, *, has_url: bool, has_fanout: bool) -> None:
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
            'expected no fanout for delivery="redis", got one: nobody would be called; use '
            'delivery="redis-then-fanout", or leave it out'
        )
    if delivery != "fanout" and not has_url:
        raise InvalidSettings(
            f'expected a url for delivery={delivery!r}, got None: only delivery="fanout" does without a log'
        )
