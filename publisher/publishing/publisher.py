"""The publisher: logs invalidations for the replicas of a namespace, and delivers them by HTTP as a second path."""

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Final, Literal, Self, TypeVar

from ...shared.clock import Clock, monotonic
from ...shared.confirmation import Confirm, checked_confirm
from ...shared.errors import LinkLost, NotConnected
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
from ...shared.process.closing import Closing
from ...shared.process.loops import Home, LoopBlocked
from ...shared.process.renamed import renamed, warn_of_rename
from ...shared.question import Question, counting
from ...shared.receipt import Receipt, checked_receipt_seconds
from ...shared.telemetry.tracing import is_set_up, publishing
from ...shared.transport.redis.address import AddressRemap, Credentials, RedisAddress, address_of
from ...shared.transport.redis.link import Link
from ...shared.transport.redis.log import LOG_LENGTH, Entry, append, head, read_newest
from ...shared.transport.redis.registry import Registries, ReplicaCounts, forget, replicas_of
from ..history.namespaces import ForgetResult, Namespaces, NamespacesPage
from ..history.pages import EXAMINED_MAX, Filter, HistoryPage, read_page
from ..history.since import unix_ms_of
from ..telemetry.observer import UNOBSERVED, PublisherObserver, observed
from .backlog import Pending
from .calls import Calls, check_limits, without_log
from .confirmations import Confirmations
from .confirming import Confirming
from .delivery import Delivery, InvalidationSender, check_delivery, sender_of
from .preview import Preview
from .questions import Answers, Questions, count_replicas
from .retry_queue import RETRY_QUEUE_NAMES_MAX, RetryQueue
from .second_path import SecondPath

__all__ = ["Publisher"]

T = TypeVar("T")

_RECEIPT_SECONDS_MIN: Final = 30.0
_ID_BYTES_MAX: Final = 512
"""More than the id of a replica may have; other programs may write longer ones into a registry."""


class Publisher(Closing):
    """Publishes over one connection (in a cluster: one to each primary), which concurrent calls share.

    The connection is replaced when it is lost, and when its server is no longer the primary.

    An asynchronous context manager. Entering does not connect: a publisher outlives an outage of Redis, and each
    `publish` says whether it was logged.

    It may be used from one event loop after another, or from several: its connections belong to the first loop, which
    does the work of the others for as long as it runs. Code without an event loop uses `SyncPublisher`.

    Shape:  `source` names the publisher to replicas and operators, and scopes each `id`; by default the host's name.
            With a `delivery` other than "redis", `fanout` calls the replicas; with "fanout" alone, `url` may be None.
            `observer` receives the outcome of each publish.
            `credentials` returns (user, password) and is called for each connection, for passwords that change.
            `address_remap` maps addresses of sentinels and clusters, `prefix` begins all names: docs/redis.md.
    Units:  `timeout_seconds` limits one `publish` with all its retries. `log_length` is about how many invalidations
            of a namespace the log keeps for replicas that were away. `fallback_after_seconds` is how long a publish
            waits for Redis before the fan-out begins, at most half of `timeout_seconds`. `retry_queue_names_max` is how
            many names, over all namespaces, may wait to be logged; `outbox_names_max` is its old name, until 0.2.
    Raises: InvalidSettings.
    """

    def __init__(
        self,
        url: str | RedisAddress | None,
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
        credentials: Credentials = None,
        address_remap: AddressRemap | None = None,
        prefix: str | None = None,
        outbox_names_max: int | None = None,
    ) -> None:
        if outbox_names_max is not None:
            warn_of_rename("outbox_names_max", "retry_queue_names_max", stacklevel=3)
            retry_queue_names_max = outbox_names_max
        check_limits(timeout_seconds, log_length, fallback_after_seconds, retry_queue_names_max)
        check_delivery(delivery, has_url=url is not None, has_fanout=fanout is not None)
        self.source: Final = check_text(socket.gethostname() if source is None else source, SOURCE_BYTES_MAX, "source")
        self.delivery: Final = delivery
        self.observer: PublisherObserver = observer
        address = None if url is None else address_of(url, credentials, address_remap, prefix)
        self.address: Final = address
        self._fanout = None if fanout is None else sender_of(fanout)
        self._fallback_after_seconds = min(fallback_after_seconds, timeout_seconds / 2)
        self._retry_queue_names_max = retry_queue_names_max
        self._second_path: SecondPath | None = None
        self._timeout_seconds = timeout_seconds
        self._log_length = log_length
        self._uniform = uniform
        self._registries = Registries(clock=clock)
        self._home = Home(self._move, begin_seconds=timeout_seconds)
        self._calls = Calls(address, timeout_seconds=timeout_seconds, uniform=uniform)
        self._confirmations = None if address is None else Confirmations(address, clock=clock)
        self._namespaces = Namespaces(address, self._calls.with_retries, self._registries)
        subscribe_seconds_max = self._calls.attempt_seconds
        if fanout is not None:  # the second path must not wait long for a Redis that may be away
            subscribe_seconds_max = min(subscribe_seconds_max, self._fallback_after_seconds)
        self._confirming = Confirming(
            self._deliver,
            calls=self._calls,
            confirmations=self._confirmations,
            registries=self._registries,
            subscribe_seconds_max=subscribe_seconds_max,
            clock=clock,
        )

    async def __aenter__(self) -> Self:
        await self._run(self._open)
        return self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self._calls.label}, source {self.source!r}>"

    @property
    def has_log(self) -> bool:
        """Whether the publisher has a log. With delivery "fanout" it may do without Redis."""
        return self._confirmations is not None

    @property
    @renamed("Publisher.retry_queue_length")
    def outbox_length(self) -> int:
        """The old name of `retry_queue_length`, until 0.2."""
        return self.retry_queue_length

    @property
    def retry_queue_length(self) -> int:
        """How many invalidations wait to be logged."""
        return 0 if self._second_path is None else len(self._second_path.retry_queue)

    async def close(self, *, last_attempt_seconds: float = 1.0) -> None:
        """Stop calls under way and close the connection. Closing twice, or before entering, is harmless.

        A fan-out that has begun is awaited, for 20 s at most. What is in the retry queue is tried once more, for up to
        `last_attempt_seconds`; what is left then is lost, and logged as an error.
        """
        await self._run(partial(self._close, last_attempt_seconds))

    async def _open(self) -> None:
        if self._fanout is not None and self._second_path is None:
            await self._fanout.__aenter__()
            self._second_path = self._new_second_path(self._fanout)
        self._calls.open()

    async def _close(self, last_attempt_seconds: float) -> None:
        self._calls.stop_retries()
        try:
            if self._second_path is not None:
                await self._second_path.close(last_attempt_seconds)
                self._second_path = None
        finally:
            if self._confirmations is not None:
                await asyncio.gather(self._calls.close(), self._confirmations.close())
            if not self._calls.is_open:  # not entered again meanwhile
                self._home.leave()

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

        It is retried until `timeout_seconds` have passed, always with the same id, and is logged once. To continue
        after LinkLost or NotDelivered, call again with the same `id`. With another delivery it has been accepted by the
        log or applied by every replica, and the receipt says which; what was not logged waits in the retry queue.

        Shape:  one too large for one message is split, logged atomically, and the receipt has the last position.
                `scope` is whose `id` it is, the publisher's `source` by default: the same id of another scope is
                another invalidation. Only its hash goes to Redis.
        Units:  `receipt_seconds` is how long the id is remembered, by default at least half a minute.
        Raises: InvalidTarget (for a reason or an id that is too long as well), InvalidNamespace; LinkLost when it is
                not known whether it was logged (NotConnected, a LinkLost, when it was not); LogRefused when it was not
                (its text says so if it was: Redis 6.2), NotPrimary when no primary was found that would; NotDelivered,
                instead of these three, when both paths failed; IdempotencyConflict when the id was used for other
                targets; InvalidSettings.
        """
        self._calls.check_is_open()
        if scope is not None:
            check_text(scope, SCOPE_BYTES_MAX, "scope")
        invalidation = invalidation_of(
            targets, namespace=namespace, reason=reason, source=self.source, id=id, confirm=confirm is not None
        )
        receipt_seconds = checked_receipt_seconds(receipt_seconds, max(_RECEIPT_SECONDS_MIN, 2 * self._timeout_seconds))
        deliver = (
            self._deliver
            if confirm is None
            else partial(self._confirming.publish, timeout_seconds=checked_confirm(confirm).timeout_seconds)
        )
        if self.observer is UNOBSERVED and not is_set_up():
            # A publish takes a fraction of a millisecond: an observer and a span that record nothing would be felt.
            pending = Pending(invalidation, receipt_seconds, scope=scope)
            return await (deliver(pending) if self._home.is_here else self._run(partial(deliver, pending)))
        with observed(self.observer, namespace) as recorded, publishing(invalidation) as traced:
            return recorded(await self._run(partial(deliver, Pending(traced, receipt_seconds, scope=scope))))

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
                were sent since then by their publisher's clock: for people. An unreadable entry concerns every key and
                every time: replicas drop everything for it.
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
        """Do what `history` does, but examine `examined_max` entries at most, and say where to continue.

        Raises: InvalidNamespace, LinkLost, LogRefused.
        """
        check_namespace(namespace)

        async def read(count: int, before: int | None) -> list[Entry]:
            return await self._call(namespace, partial(read_newest, namespace=namespace, count=count, before=before))

        is_wanted = Filter(key=key, since_ms=since_ms)
        return await read_page(read, is_wanted, count=count, before=before, examined_max=examined_max)

    async def head(self, namespace: str = DEFAULT_NAMESPACE) -> Position | None:
        """Return the position of the newest logged invalidation.

        Raises: InvalidNamespace, LinkLost, LogRefused; InvalidSettings when there is no log.
        """
        check_namespace(namespace)
        return await self._call(namespace, partial(head, namespace=namespace))

    async def replicas(self, namespace: str = DEFAULT_NAMESPACE) -> list[ReplicaPresence]:
        """Return the replicas that follow `namespace`, by name, as each was at its last echo.

        Shape:  with those that fell silent within a day: that have not left, and whose registration has ended.
        Raises: InvalidNamespace, LinkLost, LogRefused.
        """
        check_namespace(namespace)
        self._registries.watch(namespace)
        return await self._call(namespace, partial(replicas_of, namespace=namespace))

    async def forget_replica(
        self, replica_id: str, namespace: str = DEFAULT_NAMESPACE
    ) -> Literal["forgotten", "registered", "unknown"]:
        """Forget a replica that fell silent: it is neither listed nor missing any more, until its next echo.

        Shape:  `registered` if it is not silent: its next echo would register it again. Another process with its id is.
        Raises: InvalidNamespace, LinkLost, LogRefused.
        """
        check_namespace(namespace)
        replica_id = check_text(replica_id, _ID_BYTES_MAX, "replica")
        result = await self._call(namespace, partial(forget, namespace=namespace, replica_id=replica_id))
        return "forgotten" if self._registries.dismiss(namespace, replica_id) and result == "unknown" else result

    async def namespaces(self, *, after: str = "", count: int = 1_000, among: Sequence[str] = ()) -> NamespacesPage:
        """Return the namespaces that have keys in this database and with this prefix, by name.

        Shape:  up to `count`, whose names come after `after`; with `among`, only these. Without it, each page scans the
                keys of the database, in slices of a thousand.
        Raises: InvalidNamespace, InvalidSettings, LinkLost, LogRefused.
        """
        self._calls.check_has_log()
        return await self._run(partial(self._namespaces.page, after, count, among))

    async def forget_namespace(self, namespace: str) -> ForgetResult:
        """Remove a namespace: head, log, registry, presences and receipts, in one atomic step.

        It is refused while replicas are registered, or silent ones may serve from their caches. A replica or publisher
        that comes later begins a new log, which clears each replica that follows it.

        Raises: InvalidNamespace, InvalidSettings, LinkLost, LogRefused.
        """
        self._calls.check_has_log()
        return await self._run(partial(self._namespaces.forget, check_namespace(namespace)))

    async def replica_counts(
        self, namespaces: Sequence[str] = (), *, timeout_seconds: float = 0.5
    ) -> dict[str, ReplicaCounts]:
        """Count the replicas of each namespace, for metrics; those that Redis does not answer for are left out.

        Shape: without `namespaces`, those whose replicas this publisher has read before.
        """
        return await self._run(
            partial(count_replicas, self._calls, self._registries, tuple(namespaces), timeout_seconds)
        )

    async def preview(
        self, *targets: Target, namespace: str = DEFAULT_NAMESPACE, timeout_seconds: float = 1.0
    ) -> Preview:
        """Query the registered replicas for how many of their entries `targets` name. Nothing is dropped or logged.

        Units:  `timeout_seconds` limits the wait for their answers: above 0, at most 60.
        Raises: InvalidTarget, InvalidNamespace, LinkLost, LogRefused; InvalidSettings, also when there is no log.
        """
        questions = counting(invalidation_of(targets, namespace=namespace))
        return Preview.of(namespace, await self.query(*questions, namespace=namespace, timeout_seconds=timeout_seconds))

    async def query(
        self, *questions: Question, namespace: str = DEFAULT_NAMESPACE, timeout_seconds: float = 1.0
    ) -> Answers:
        """Send questions to the replicas of a namespace, and return each replica's answers to all of them.

        Units:  as for `preview`.
        Raises: InvalidNamespace, LinkLost, LogRefused; InvalidSettings, also when there is no log.
        """
        check_namespace(namespace)
        Confirm(timeout_seconds=timeout_seconds)  # the same bounds
        if self._confirmations is None:
            raise without_log()
        asked = Questions(self._confirmations, self._calls, self._registries)
        return await self._run(partial(asked.query, namespace, questions, timeout_seconds))

    async def _run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do `work` on the event loop that the publisher's connections belong to. Raises: NotConnected; as `work`."""
        try:
            return await self._home.run(work)
        except LoopBlocked as error:
            raise NotConnected(
                "the event loop that this publisher belongs to, the first that used it, has not responded for "
                f"{self._timeout_seconds:g} s: do not block it, or make a Publisher for each event loop"
            ) from error

    async def _call(self, namespace: str, work: Callable[[Link], Awaitable[T]]) -> T:
        return await self._run(partial(self._calls.with_retries, namespace, work))

    def _move(self) -> Coroutine[Any, Any, None] | None:
        """Drop the connections of an event loop that has ended; what waits to be logged stays."""
        self._calls.abandon()
        if self._confirmations is not None:
            self._confirmations.abandon()
        return None if self._second_path is None else self._second_path.resume()

    @renamed("Publisher.query")
    async def ask(
        self, *questions: Question, namespace: str = DEFAULT_NAMESPACE, timeout_seconds: float = 1.0
    ) -> Answers:
        """The old name of `query`, until 0.2."""
        return await self.query(*questions, namespace=namespace, timeout_seconds=timeout_seconds)

    def _deliver(self, pending: Pending) -> Awaitable[Receipt]:
        return self._log_alone(pending) if self._second_path is None else self._second_path.deliver(pending)

    async def _log_alone(self, pending: Pending) -> Receipt:
        """Log it, and explain in LinkLost how to continue: no other path delivers it."""
        try:
            return await self._log(pending)
        except NotConnected as error:
            raise NotConnected(
                f"Redis could not be reached within {self._timeout_seconds:g} s, and nothing was logged: publish again "
                f"when it is back. Last: {error}"
            ) from error
        except LinkLost as error:
            raise LinkLost(
                f"Redis did not acknowledge the invalidation within {self._timeout_seconds:g} s; it may have been "
                f"logged: publish again with id={pending.invalidation.id!r}, which is harmless. Last: {error}"
            ) from error

    def _log(self, pending: Pending, on_failure: Callable[[], None] | None = None) -> Coroutine[Any, Any, Receipt]:
        return self._calls.with_retries(pending.invalidation.namespace, self._append_of(pending), on_failure)

    def _log_once(self, pending: Pending) -> Awaitable[Receipt]:
        return self._calls.once(pending.invalidation.namespace, self._append_of(pending._replace(before_append=None)))

    def _append_of(self, pending: Pending) -> Callable[[Link], Awaitable[Receipt]]:
        """Return the work that logs it."""
        append_it = partial(
            append,
            invalidation=pending.invalidation,
            scope=pending.scope,
            log_length=self._log_length,
            receipt_seconds=pending.receipt_seconds,
        )
        if (before_append := pending.before_append) is None:
            return append_it

        async def prepare_and_append(link: Link) -> Receipt:
            await before_append(link)
            return await append_it(link)

        return prepare_and_append

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
