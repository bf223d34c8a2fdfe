"""The publisher: logs invalidations, which reaches every replica that listens, and has a second path."""

import asyncio
import contextlib
import random
import socket
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from typing import Final, Self, TypeVar, get_args

from ...shared.clock import Clock, monotonic
from ...shared.confirmation import Confirm
from ...shared.errors import BroadcacheError, InvalidSettings, LinkLost, LogRefused, NotPrimary
from ...shared.fanout_report import FanoutReport
from ...shared.invalidation import (
    DEFAULT_NAMESPACE,
    SCOPE_BYTES_MAX,
    SOURCE_BYTES_MAX,
    Position,
    Target,
    check_namespace,
    check_text,
    invalidation_of,
)
from ...shared.presence import ReplicaPresence
from ...shared.process.backoff import backoff_seconds
from ...shared.process.closing import Closing
from ...shared.question import Question, counting
from ...shared.receipt import Receipt
from ...shared.telemetry.tracing import is_set_up, publishing
from ...shared.transport.redis.address import RedisAddress
from ...shared.transport.redis.link import Link
from ...shared.transport.redis.log import LOG_LENGTH, Entry, append, head, read_at, read_newest
from ...shared.transport.redis.registry import Registries, presences, replicas_of
from ..history.pages import EXAMINED_MAX, Filter, HistoryPage, read_page
from ..history.since import unix_ms_of
from ..telemetry.observer import UNOBSERVED, PublisherObserver, observed
from .backlog import Pending
from .confirmations import Confirmations, Wait
from .delivery import Delivery, InvalidationSender
from .kept_link import KeptLink, KeptLinks
from .preview import Preview
from .questions import Answers, Questions
from .retry_queue import RETRY_QUEUE_NAMES_MAX, RetryQueue
from .second_path import SecondPath

__all__ = ["Publisher"]

T = TypeVar("T")

_CALL_TIMEOUT_SECONDS_MAX: Final = 1.0
_BACKOFF_SECONDS_MIN: Final = 0.04
_BACKOFF_SECONDS_MAX: Final = 0.5
_RECEIPT_SECONDS_MIN: Final = 30.0
_LOOK_INTERVAL_SECONDS: Final = 0.25
"""How often a publish that waits for replicas looks at their positions: a report may have been lost."""
_LOOK_SECONDS: Final = 0.25
"""How long such a look may take, also beyond the time that was to be waited."""


class Publisher(Closing):
    """Publishes over one connection (in a cluster: one for each namespace), which concurrent calls share.

    It is made anew when it is lost, and when its server is no primary any more.

    An asynchronous context manager. Entering does not connect: a publisher outlives a Redis that is away, and each
    `publish` says whether it was logged.

    Shape:  `source` tells replicas and operators who published, and an `id` is remembered for its source; the host's
            name when it is left out. With a `delivery`
            other than "redis", `fanout` is what calls the replicas; with "fanout" alone `url` may be None.
            `observer` is told what comes of each publish.
    Units:  `timeout_seconds` is how long one `publish` tries, `log_length` about how many invalidations of a namespace
            the log keeps for replicas that were away. `fallback_after_seconds` is how long Redis is waited for before
            the fan-out begins, at most half of `timeout_seconds`; `retry_queue_names_max` how many names, over all
            namespaces, may wait to be logged.
    Raises: InvalidSettings.
    """

    def __init__(
        self,
        url: str | None,
        *,
        delivery: Delivery = "redis",
        fanout: InvalidationSender | None = None,
        source: str | None = None,
        timeout_seconds: float = 5.0,
        log_length: int = LOG_LENGTH,
        fallback_after_seconds: float = 0.25,
        retry_queue_names_max: int = RETRY_QUEUE_NAMES_MAX,
        uniform: Callable[[], float] = random.random,
        clock: Clock = monotonic,
        observer: PublisherObserver = UNOBSERVED,
    ) -> None:
        if not 0 < timeout_seconds <= 3_600:
            raise InvalidSettings(f"expected timeout_seconds to be above 0 and at most 3600, got {timeout_seconds!r}")
        if log_length < 1:
            raise InvalidSettings(f"expected log_length to be at least 1, got {log_length!r}")
        if not 0 <= fallback_after_seconds <= 3_600:
            raise InvalidSettings(
                f"expected fallback_after_seconds to be from 0 to 3600, got {fallback_after_seconds!r}"
            )
        if retry_queue_names_max < 1:
            raise InvalidSettings(f"expected retry_queue_names_max to be at least 1, got {retry_queue_names_max!r}")
        _check_delivery(delivery, has_url=url is not None, has_fanout=fanout is not None)
        self.source: Final = check_text(socket.gethostname() if source is None else source, SOURCE_BYTES_MAX, "source")
        self.delivery: Final = delivery
        self._address = None if url is None else RedisAddress(url)
        self._fanout = fanout
        self._fallback_after_seconds = min(fallback_after_seconds, timeout_seconds / 2)
        self._retry_queue_names_max = retry_queue_names_max
        self._second_path: SecondPath | None = None
        self._timeout_seconds = timeout_seconds
        # There must be time left for a new link after one that keeps silent: else it would be kept for ever.
        self._call_timeout_seconds = min(_CALL_TIMEOUT_SECONDS_MAX, timeout_seconds / 2)
        self._log_length = log_length
        self._uniform = uniform
        self.observer: PublisherObserver = observer
        self._is_entered = False
        self._clock = clock
        self._registries = Registries()
        self._links: KeptLinks | None = None
        self._confirmations: Confirmations | None = None
        if self._address is not None:
            self._links = KeptLinks(self._address, client_name="broadcache:publisher")
            self._confirmations = Confirmations(self._address, clock=clock)

    async def __aenter__(self) -> Self:
        if self._fanout is not None and self._second_path is None:
            await self._fanout.__aenter__()
            self._second_path = self._new_second_path(self._fanout)
        self._is_entered = True
        return self

    @property
    def has_log(self) -> bool:
        """Whether there is a log: a publisher that fans out alone may do without Redis."""
        return self._address is not None

    @property
    def retry_queue_length(self) -> int:
        """How many invalidations wait to be logged."""
        return 0 if self._second_path is None else len(self._second_path.retry_queue)

    async def close(self, *, last_attempt_seconds: float = 1.0) -> None:
        """End what is under way and close the connection. Closing twice, or before entering, is harmless.

        A fan-out that has begun is waited for. What is in the retry queue is tried once more, for up to
        `last_attempt_seconds`; what is left then is lost, and is logged as an error.
        """
        self._is_entered = False
        try:
            if self._second_path is not None:
                await self._second_path.close(last_attempt_seconds)
                self._second_path = None
        finally:
            if self._links is not None and self._confirmations is not None:
                await asyncio.gather(self._links.close(), self._confirmations.close())

    async def publish(
        self,
        *targets: Target,
        namespace: str = DEFAULT_NAMESPACE,
        reason: str = "",
        id: str | None = None,
        scope: str | None = None,
        receipt_seconds: float | None = None,
        confirm: Confirm | None = None,
    ) -> Receipt:
        """Log one invalidation of all `targets` and publish it. With delivery "redis" it is accepted when this returns.

        With `confirm`, it also waits until every registered replica has applied it, or the time for that is up. The
        receipt's `confirmation` names each of them, and says if there may be others.

        It is tried again until `timeout_seconds` have passed, always with the same id, and is logged once. To go on
        trying after LinkLost or NotDelivered, call again with the same `id`. With another delivery it has been accepted
        by the log or taken by every replica, and the receipt says which; what was not logged waits in the retry_queue.

        Shape:  one too large for one message is split, logged atomically, and the receipt has the last position.
                `scope` is whose `id` it is, the publisher's `source` when left out: the same id of another scope is
                another invalidation. Only its hash goes to Redis.
        Units:  `receipt_seconds` is how long the id is remembered, by default at least half a minute.
        Raises: InvalidTarget (for a reason or an id that is too long as well), InvalidNamespace; LinkLost when it is
                not known whether it was logged; LogRefused when it was not, NotPrimary when no primary was found that
                would; NotDelivered, instead of these three, when it went both ways in vain;
                IdempotencyConflict when the id was used for other targets.
        """
        self._check_is_open()
        if scope is not None:
            check_text(scope, SCOPE_BYTES_MAX, "scope")
        invalidation = invalidation_of(
            targets, namespace=namespace, reason=reason, source=self.source, id=id, confirm=confirm is not None
        )
        if receipt_seconds is None:
            receipt_seconds = max(_RECEIPT_SECONDS_MIN, 2 * self._timeout_seconds)
        if self.observer is UNOBSERVED and not is_set_up():
            # Nobody looks: a publish takes a fraction of a millisecond, in which both would be felt.
            return await self._carried_out(Pending(invalidation, receipt_seconds, scope=scope), confirm)
        with observed(self.observer, namespace) as recorded, publishing(invalidation) as traced:
            return recorded(await self._carried_out(Pending(traced, receipt_seconds, scope=scope), confirm))

    async def history(
        self,
        namespace: str = DEFAULT_NAMESPACE,
        *,
        count: int = 100,
        before: int | None = None,
        key: str | None = None,
        since: datetime | None = None,
    ) -> list[Entry]:
        """Return up to `count` logged invalidations, the newest first; with `before`, those of a lower sequence.

        Shape:  with `key`, those that concern it: that name it, a prefix of it, or everything. With `since`, those that
                were sent since then by their publisher's clock: for people. What is unreadable concerns every key and
                every time: replicas drop everything.
        Raises: InvalidNamespace, InvalidSettings (a time without an offset, or no log), LinkLost, LogRefused.
        """
        since_ms = None if since is None else unix_ms_of(since)
        entries: list[Entry] = []
        while len(entries) < count:
            page = await self.history_page(
                namespace, count=count - len(entries), before=before, key=key, since_ms=since_ms
            )
            entries += page.entries
            before = page.next_before
            if before is None:
                break
        return entries

    async def history_page(
        self,
        namespace: str = DEFAULT_NAMESPACE,
        *,
        count: int = 100,
        before: int | None = None,
        key: str | None = None,
        since_ms: int | None = None,
        examined_max: int = EXAMINED_MAX,
    ) -> HistoryPage:
        """Do what `history` does, but look at `examined_max` entries at most, and tell where to go on.

        Raises: InvalidNamespace, LinkLost, LogRefused.
        """
        check_namespace(namespace)

        async def read(count: int, before: int | None) -> list[Entry]:
            return await self._with_retries(
                namespace, partial(read_newest, namespace=namespace, count=count, before=before)
            )

        is_wanted = Filter(key=key, since_ms=since_ms)
        return await read_page(read, is_wanted, count=count, before=before, examined_max=examined_max)

    async def head(self, namespace: str = DEFAULT_NAMESPACE) -> Position | None:
        """Return the position of the newest logged invalidation.

        Raises: InvalidNamespace, LinkLost, LogRefused; InvalidSettings when there is no log.
        """
        check_namespace(namespace)
        return await self._with_retries(namespace, lambda link: head(link, namespace))

    async def replicas(self, namespace: str = DEFAULT_NAMESPACE) -> list[ReplicaPresence]:
        """Return the replicas that follow `namespace`, by name, as each was at its last echo.

        Raises: InvalidNamespace, LinkLost, LogRefused.
        """
        check_namespace(namespace)
        return await self._with_retries(namespace, lambda link: replicas_of(link, namespace))

    async def preview(
        self, *targets: Target, namespace: str = DEFAULT_NAMESPACE, timeout_seconds: float = 1.0
    ) -> Preview:
        """Ask the replicas that are there how many of their entries `targets` name. Nothing is dropped or logged.

        Units:  `timeout_seconds` is how long they are waited for: above 0, at most 60.
        Raises: InvalidTarget, InvalidNamespace, LinkLost, LogRefused; InvalidSettings, also when there is no log.
        """
        questions = counting(invalidation_of(targets, namespace=namespace))
        return Preview.of(namespace, await self.query(*questions, namespace=namespace, timeout_seconds=timeout_seconds))

    async def query(
        self, *questions: Question, namespace: str = DEFAULT_NAMESPACE, timeout_seconds: float = 1.0
    ) -> Answers:
        """Put questions to the replicas that are there, and return what each answers to all of them.

        Units:  as for `preview`.
        Raises: InvalidNamespace, LinkLost, LogRefused; InvalidSettings, also when there is no log.
        """
        check_namespace(namespace)
        Confirm(timeout_seconds=timeout_seconds)  # the same bounds
        await self._link_for(namespace)  # without a log nobody can be asked, and it says so
        assert self._confirmations is not None, "it is there wherever there is a log"
        questions_to_all = Questions(self._confirmations, self._with_retries, self._registries)
        return await questions_to_all.query(namespace, questions, timeout_seconds)

    def _carried_out(self, pending: Pending, confirm: Confirm | None) -> Awaitable[Receipt]:
        return self._delivered(pending) if confirm is None else self._confirmed(pending, confirm)

    async def _confirmed(self, pending: Pending, confirm: Confirm) -> Receipt:
        """Have it delivered, and wait for the replicas."""
        namespace = pending.invalidation.namespace
        if self._confirmations is None:
            return _answered_by_http(await self._delivered(pending), Wait(pending.invalidation, self._clock))

        async def expect(link: Link) -> None:
            # Before the append, so that a user without the right to read the registry is refused while nothing has been
            # logged; and after it, because a replica may have registered in between, with entries of before.
            registry = await self._registries.read(link, namespace)
            wait.expect(registry.left_ms, registry.doubt)

        with self._confirmations.waiting(pending.invalidation) as wait:
            listen_seconds = min(self._call_timeout_seconds, confirm.timeout_seconds)
            if self._second_path is not None:  # which must not wait long for a Redis that may be away
                listen_seconds = min(listen_seconds, self._fallback_after_seconds)
            is_heard = await self._confirmations.listen(namespace, listen_seconds)
            receipt = await self._delivered(pending._replace(ask_first=expect))
            if receipt.position is None:
                return _answered_by_http(receipt, wait)
            try:
                await self._once(namespace, expect)
            except BroadcacheError as error:
                wait.expect(
                    (), f"the registry of replicas could not be read after the invalidation was logged: {error}"
                )
            for outcome in receipt.fanout.outcomes if receipt.fanout else ():
                wait.record_response(outcome)
            wait.accept(receipt)
            # Of what was logged before, nothing is published again: only positions can tell.
            await self._wait(wait, receipt, confirm.timeout_seconds, is_reported=is_heard and not receipt.is_repeat)
            return receipt._replace(confirmation=wait.confirmation())

    async def _wait(self, wait: Wait, receipt: Receipt, timeout_seconds: float, *, is_reported: bool) -> None:
        """Wait until no replica is missing, at most `timeout_seconds`; meanwhile look at positions now and then."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        look_seconds = _LOOK_INTERVAL_SECONDS if is_reported else 0.0
        while self._is_entered and wait.missing and (left_seconds := deadline - loop.time()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_seconds, look_seconds)):
                    await wait.until_complete()
            await self._look_at_positions(wait, receipt.namespace)
            look_seconds = _LOOK_INTERVAL_SECONDS
        if is_reported and not wait.has_heard and wait.confirmation().confirmed and self._confirmations is not None:
            await self._confirmations.distrust(receipt.namespace)

    async def _look_at_positions(self, wait: Wait, namespace: str) -> None:
        """Compare the proven positions of the missing replicas with the log: a report may have been lost."""
        missing = wait.missing
        if not missing or not self._is_entered:
            return
        with contextlib.suppress(BroadcacheError, TimeoutError):
            async with asyncio.timeout(_LOOK_SECONDS):
                link = await (await self._link_for(namespace)).connected()
                reaching = wait.reaching((await presences(link, namespace, missing)).values())
                if reaching:
                    # The log after the positions: what a replica has proven must still be in it.
                    wait.record_positions(reaching, await read_at(link, namespace, wait.sequences(reaching)))

    async def _delivered(self, pending: Pending) -> Receipt:
        if self._second_path is not None:
            return await self._second_path.deliver(pending)
        try:
            return await self._log(pending)
        except LinkLost as error:
            raise LinkLost(
                f"expected Redis to log the invalidation within {self._timeout_seconds:g} s, it did not answer; it may "
                f"have been logged: publish again with id={pending.invalidation.id!r}, which is harmless. Last: {error}"
            ) from error

    def _new_second_path(self, sender: InvalidationSender) -> SecondPath:
        retry_queue = RetryQueue(
            self._log_once, names_max=self._retry_queue_names_max, source=self.source, uniform=self._uniform
        )
        return SecondPath(
            self.delivery,
            sender,
            log=self._log,
            retry_queue=retry_queue,
            fallback_after_seconds=self._fallback_after_seconds,
        )

    def _check_is_open(self) -> None:
        if not self._is_entered:
            raise InvalidSettings("expected a publisher that is open, got one that is not: use it within `async with`")

    async def _log(self, pending: Pending, on_failure: Callable[[], None] | None = None) -> Receipt:
        append_it = self._appending(pending)

        async def append_with_registry(link: Link) -> Receipt:
            if pending.ask_first is not None:
                await pending.ask_first(link)
            return await append_it(link)

        return await self._with_retries(pending.invalidation.namespace, append_with_registry, on_failure)

    async def _log_once(self, pending: Pending) -> Receipt:
        return await self._once(pending.invalidation.namespace, self._appending(pending))

    def _appending(self, pending: Pending) -> Callable[[Link], Awaitable[Receipt]]:
        return partial(
            append,
            invalidation=pending.invalidation,
            scope=pending.scope,
            log_length=self._log_length,
            receipt_seconds=pending.receipt_seconds,
        )

    async def _with_retries(
        self, namespace: str, work: Callable[[Link], Awaitable[T]], on_failure: Callable[[], None] | None = None
    ) -> T:
        """Do `work` over a link, over new ones when it is lost, until there is a result or the time is up."""
        self._check_is_open()
        lost: LinkLost | None = None
        refused: NotPrimary | None = None
        attempt = 0
        try:
            async with asyncio.timeout(self._timeout_seconds):
                while True:
                    if not self._is_entered:
                        raise LinkLost("the publisher was closed meanwhile")
                    try:
                        return await self._once(namespace, work)
                    except LinkLost as error:
                        lost = error
                    except NotPrimary as error:
                        refused = error
                    except LogRefused as error:
                        if lost is None:
                            raise
                        raise _both(lost, error) from error
                    if on_failure is not None:
                        on_failure()
                    attempt += 1
                    pause_seconds = backoff_seconds(
                        attempt,
                        seconds_min=_BACKOFF_SECONDS_MIN,
                        seconds_max=_BACKOFF_SECONDS_MAX,
                        uniform=self._uniform,
                    )
                    await asyncio.sleep(pause_seconds)
        except TimeoutError:
            label = "Redis" if self._address is None else self._address.label
            if lost is not None and refused is not None:
                raise _both(lost, refused) from None
            raise lost or refused or LinkLost(f"no answer from {label}") from None

    async def _once(self, namespace: str, work: Callable[[Link], Awaitable[T]]) -> T:
        kept = await self._link_for(namespace)
        return await self._answered(await kept.connected(), work)

    async def _answered(self, link: Link, work: Callable[[Link], Awaitable[T]]) -> T:
        """Do `work`, but leave a link that keeps silent, or leads to a server that does not take it any more."""
        try:
            async with link.within(self._call_timeout_seconds):
                return await work(link)
        except (LinkLost, NotPrimary):
            await link.close()
            raise

    async def _link_for(self, namespace: str) -> KeptLink:
        """Return the link that leads to where `namespace` is."""
        if self._links is None:
            raise InvalidSettings(
                'expected a publisher that has a log, got one with delivery="fanout" and no url; give it the url'
            )
        return await self._links.of(namespace)


def _both(lost: LinkLost, refused: LogRefused) -> LinkLost:
    """Return what to raise: what was lost on the way may have been logged, so that is what it is."""
    return LinkLost(f"{lost}; besides: {refused}")


def _answered_by_http(receipt: Receipt, wait: Wait) -> Receipt:
    """Return the receipt of what was not logged, with a confirmation by the replicas that answered to the fan-out."""
    outcomes = receipt.fanout.outcomes if receipt.fanout else ()
    # An answer without a replica's id proves nothing.
    wait.expect([outcome.replica or outcome.address for outcome in outcomes], _doubt_of(receipt.fanout))
    for outcome in outcomes:
        wait.record_response(outcome)
    return receipt._replace(confirmation=wait.confirmation())


def _doubt_of(report: FanoutReport | None) -> str | None:
    """Return why there may be replicas that a fan-out has not called."""
    if report is not None and report.total and report.complete and report.problem is None:
        return None
    found = "it was not fanned out" if report is None else report.summary()
    return (
        f"{found}: a replica that was not called may serve old values; expected discovery to name every replica: check "
        "the service's name and the resolver, then publish again"
    )


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
