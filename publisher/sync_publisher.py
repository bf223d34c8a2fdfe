"""The synchronous publisher: for code without an event loop, from any thread."""

import asyncio
import atexit
import contextlib
import os
import random
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Final, Literal, NoReturn, Self, TypeVar
from weakref import WeakSet, finalize

from ..shared.clock import Clock, monotonic
from ..shared.confirmation import Confirm
from ..shared.errors import BroadcacheError, InvalidSettings, LinkLost, NotConnected
from ..shared.invalidation import DEFAULT_NAMESPACE, Position, Target, new_id
from ..shared.presence import ReplicaPresence
from ..shared.process.copying import refuse_copy
from ..shared.process.loops import LoopUnavailable, is_in_event_loop, result_from
from ..shared.receipt import Receipt
from ..shared.transport.redis.address import AddressRemap, Credentials, RedisAddress
from ..shared.transport.redis.log import LOG_LENGTH, Entry
from .history.namespaces import ForgetResult, NamespacesPage
from .history.pages import EXAMINED_MAX, HistoryPage
from .publishing.delivery import Delivery, InvalidationSender
from .publishing.preview import Preview
from .publishing.publisher import Publisher
from .publishing.retry_queue import RETRY_QUEUE_NAMES_MAX
from .telemetry.observer import UNOBSERVED, PublisherObserver

__all__ = ["SyncPublisher"]

T = TypeVar("T")


class SyncPublisher:
    """A `Publisher` for code without an event loop: Flask, Django, Celery, scripts. Each call blocks until it is done.

    Its connection lives on an event loop in a daemon thread, which the first call starts. Threads share it: concurrent
    calls share round trips. After a fork, the child's first call starts a thread and a connection of its own.

    A context manager. It also works without `with`, and is then closed when it is collected or the interpreter exits.
    Where an event loop runs, use `Publisher`: a call from there blocks the loop until it is done.

    Shape:  arguments, results and errors are those of `Publisher`. `observer` is called in the publisher's thread, and
            `fanout` runs there.
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
    ) -> None:
        self._publisher: Final = Publisher(
            url,
            delivery=delivery,
            fanout=fanout,
            source=source,
            timeout_seconds=timeout_seconds,
            log_length=log_length,
            fallback_after_seconds=fallback_after_seconds,
            retry_queue_names_max=retry_queue_names_max,
            uniform=uniform,
            clock=clock,
            observer=observer,
            credentials=credentials,
            address_remap=address_remap,
            prefix=prefix,
        )
        self._thread: _LoopThread | None = None
        self._is_closed = False
        self._why_closed = ""

    def __getstate__(self) -> NoReturn:
        """Refuse to be copied and pickled."""
        refuse_copy(self)

    def __enter__(self) -> Self:
        self._is_closed, self._why_closed = False, ""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        publisher = repr(self._publisher).partition(" ")[2].removesuffix(">")
        return f"<{type(self).__name__} {publisher}{', closed' if self._is_closed else ''}>"

    @property
    def source(self) -> str:
        """The name of the publisher, for replicas and operators."""
        return self._publisher.source

    @property
    def delivery(self) -> Delivery:
        """How invalidations reach the replicas."""
        return self._publisher.delivery

    @property
    def has_log(self) -> bool:
        """Whether the publisher has a log. With delivery "fanout" it may do without Redis."""
        return self._publisher.has_log

    @property
    def retry_queue_length(self) -> int:
        """How many invalidations wait to be logged."""
        return self._publisher.retry_queue_length

    def close(self, *, last_attempt_seconds: float = 1.0) -> None:
        """Do what `Publisher.close` does, and end the thread. Closing twice, or before the first call, is harmless."""
        with _starting:
            self._is_closed = True
            thread, self._thread = self._thread, None
        _in_use.discard(self)
        if thread is not None and thread.is_running:
            try:
                with contextlib.suppress(LoopUnavailable):  # it has ended meanwhile, and the connection with it
                    result_from(thread.loop, partial(self._publisher.close, last_attempt_seconds=last_attempt_seconds))
            finally:
                thread.stop()

    def publish(
        self,
        *targets: Target,
        namespace: str = DEFAULT_NAMESPACE,
        reason: str = "",
        id: str | None = None,
        scope: str | None = None,
        receipt_seconds: float | None = None,
        confirm: Confirm | None = None,
    ) -> Receipt:
        """`Publisher.publish`: log one invalidation of all `targets` and publish it."""
        return self._call(
            partial(
                self._publisher.publish,
                *targets,
                namespace=namespace,
                reason=reason,
                id=new_id() if id is None else id,  # the same if the call has to be made again
                scope=scope,
                receipt_seconds=receipt_seconds,
                confirm=confirm,
            )
        )

    def history(
        self,
        namespace: str = DEFAULT_NAMESPACE,
        *,
        count: int = 100,
        before: int | None = None,
        key: str | None = None,
        since: datetime | None = None,
    ) -> list[Entry]:
        """`Publisher.history`: return logged invalidations, the newest first."""
        return self._call(partial(self._publisher.history, namespace, count=count, before=before, key=key, since=since))

    def history_page(
        self,
        namespace: str = DEFAULT_NAMESPACE,
        *,
        count: int = 100,
        before: int | None = None,
        key: str | None = None,
        since_ms: int | None = None,
        examined_max: int = EXAMINED_MAX,
    ) -> HistoryPage:
        """`Publisher.history_page`: the same with a limit on the work, and where to continue."""
        return self._call(
            partial(
                self._publisher.history_page,
                namespace,
                count=count,
                before=before,
                key=key,
                since_ms=since_ms,
                examined_max=examined_max,
            )
        )

    def head(self, namespace: str = DEFAULT_NAMESPACE) -> Position | None:
        """`Publisher.head`: return the position of the newest logged invalidation."""
        return self._call(partial(self._publisher.head, namespace))

    def replicas(self, namespace: str = DEFAULT_NAMESPACE) -> list[ReplicaPresence]:
        """`Publisher.replicas`: return the replicas that follow `namespace`."""
        return self._call(partial(self._publisher.replicas, namespace))

    def namespaces(self, *, after: str = "", count: int = 1_000, among: Sequence[str] = ()) -> NamespacesPage:
        """`Publisher.namespaces`: return the namespaces that have keys, by name."""
        return self._call(partial(self._publisher.namespaces, after=after, count=count, among=among))

    def forget_namespace(self, namespace: str) -> ForgetResult:
        """`Publisher.forget_namespace`: remove a namespace that no replica uses."""
        return self._call(partial(self._publisher.forget_namespace, namespace))

    def forget_replica(
        self, replica_id: str, namespace: str = DEFAULT_NAMESPACE
    ) -> Literal["forgotten", "registered", "unknown"]:
        """`Publisher.forget_replica`: forget a replica that fell silent."""
        return self._call(partial(self._publisher.forget_replica, replica_id, namespace))

    def preview(self, *targets: Target, namespace: str = DEFAULT_NAMESPACE, timeout_seconds: float = 1.0) -> Preview:
        """`Publisher.preview`: query the replicas for how many of their entries `targets` name. Nothing is dropped."""
        return self._call(
            partial(self._publisher.preview, *targets, namespace=namespace, timeout_seconds=timeout_seconds)
        )

    def _call(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do `work` on the event loop of the publisher's thread, which is started if need be."""
        if sys.is_finalizing():  # threads no longer run, and new ones do not start: the call would wait for ever
            raise NotConnected(
                "the interpreter is ending, and nothing was published: publish before that, e.g. in an atexit handler, "
                "and not while objects are collected (`__del__`)"
            )
        while True:
            loop = self._running_loop()
            if is_in_event_loop() and asyncio.get_running_loop() is loop:
                raise InvalidSettings(
                    "this call would wait for ever: it was made in the publisher's own thread, by an observer or a "
                    "sender; make it from another thread"
                )
            try:
                return result_from(loop, work)
            except LoopUnavailable as error:
                if self._is_closed:
                    raise LinkLost(
                        f"the publisher was closed during the call ({error}); an invalidation may have been logged: "
                        "publish it again, which is harmless"
                    ) from error
                # With gevent, the loop of another object was used, and has ended.

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with _starting:
            if self._is_closed:
                raise InvalidSettings(
                    f"the publisher is closed{self._why_closed}: make a new one, or use it within `with`"
                )
            thread = self._thread
            if thread is None or not thread.is_running:
                thread = self._thread = _LoopThread()
                _in_use.add(self)
                finalize(self, thread.end_soon, self._publisher).atexit = False
                result_from(thread.loop, self._publisher.__aenter__)
            return thread.loop


class _LoopThread:
    """A daemon thread with an event loop."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._loop: Future[asyncio.AbstractEventLoop] = Future()
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="broadcache publisher", daemon=True)
        self._thread.start()
        self.loop: Final = self._loop.result()

    @property
    def is_running(self) -> bool:
        """Whether the event loop runs, in this process: a thread does not survive a fork."""
        return self._pid == os.getpid() and self.loop.is_running()

    def stop(self) -> None:
        """End the thread, and wait for its end."""
        if self._stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def end_soon(self, publisher: Publisher) -> None:
        """Close `publisher` and end the thread, without waiting for it."""

        async def end() -> None:
            try:
                await publisher.close()
            finally:
                if self._stop is not None:
                    self._stop.set()

        if self.is_running:
            ending = end()
            try:
                asyncio.run_coroutine_threadsafe(ending, self.loop)
            except RuntimeError:  # the loop was closed just now
                ending.close()

    def _run(self) -> None:
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(self._live())
        else:
            # gevent: this thread is a greenlet, and another greenlet runs an event loop. There can be only one.
            self._loop.set_result(running)

    async def _live(self) -> None:
        self._stop = asyncio.Event()
        self._loop.set_result(asyncio.get_running_loop())
        await self._stop.wait()


_starting = threading.Lock()
_in_use: WeakSet[SyncPublisher] = WeakSet()


def _close_at_exit() -> None:
    """Log what waits in retry queues, or report it as lost."""
    for publisher in list(_in_use):
        publisher._why_closed = ", since the interpreter is ending"
        with contextlib.suppress(BroadcacheError):
            publisher.close()


def _forget_after_fork() -> None:
    """In a child: the threads are those of the parent, one of which may have held the lock."""
    global _starting  # noqa: PLW0603
    _starting = threading.Lock()
    _in_use.clear()


atexit.register(_close_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
