"""One connection to Redis: commands out, replies and pushes back, in the order in which the server sent them.

Only this module, responses.py, address.py and topology.py use the Redis client library. A link never retries and never
reconnects by itself, so its owner learns of every gap. One reader handles all replies and pushes of a link in order: a
reply that has arrived therefore proves that every push the server sent before it has been handled.
"""

import asyncio
import contextlib
import itertools
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from ...errors import LinkLost
from ...process.forks import close_inherited, in_forked_child, keep_inherited
from .address import Connected, RedisAddress
from .responses import Refused, close_socket, close_without_waiting, descriptor_of, exchange_of, packer_of

__all__ = ["Argument", "Link", "OnMessage", "RedisAddress", "Refused"]

Argument: TypeAlias = str | bytes | int | float
"""One argument of a command."""
OnMessage: TypeAlias = Callable[[bytes, bytes], None]
"""Called with the channel and the frame of each message, as it arrives. It must neither block nor raise."""

_MESSAGES: Final = (b"message", b"smessage")
_CALLS_MAX: Final = 10_000
"""The most commands that may await their replies on one link."""


class _Awaited(NamedTuple):
    """The confirmations that a SUBSCRIBE or UNSUBSCRIBE still awaits."""

    kind: bytes
    channels: set[bytes]


class Link:
    """One open connection. Created by `Link.open`; once lost it stays lost.

    Every method raises LinkLost when the connection is lost. `lost` is set to the reason as soon as that is detected.

    Shape: `is_sharded` is whether the server belongs to a cluster with sharded channels: each has a slot, like a key.
           `names_of` returns the names of a namespace's keys and channels there.
    """

    @classmethod
    async def open(
        cls,
        address: RedisAddress,
        *,
        client_name: str,
        timeout_seconds: float,
        on_message: OnMessage | None = None,
    ) -> "Link":
        """Connect, authenticate and send HELLO, all within `timeout_seconds`.

        Raises: LinkLost.
        """
        connected = await address.connect(client_name, timeout_seconds=timeout_seconds)
        return cls(connected, on_message or _ignore)

    def __init__(self, connected: Connected, on_message: OnMessage) -> None:
        self.label: Final = connected.label
        self.is_sharded: Final = connected.is_sharded
        self.naming: Final = connected.naming
        self.names_of: Final = connected.naming.of
        self.lost: asyncio.Future[LinkLost] = asyncio.get_running_loop().create_future()
        self._connection = connected.connection
        self._on_message = on_message
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._confirmations: dict[asyncio.Future[Any], _Awaited] = {}
        self._deadlines: dict[float, _Deadlines] = {}
        self._is_inherited = False
        self._name = secrets.token_hex(9)
        self._numbers = itertools.count(1)
        self._pack = packer_of(connected.connection)
        self._exchange = exchange_of(connected.connection, self._receive, self._on_lost)
        self._push_type = self._exchange.push_type
        self._keeper = asyncio.create_task(self._end_with_tasks(), name=f"broadcache link {self.label}")
        in_forked_child(self._leave_to_parent)

    @property
    def is_open(self) -> bool:
        """Whether no loss of the link has been detected."""
        return not self.lost.done()

    @property
    def received_bytes(self) -> int:
        """How many bytes have arrived so far, including those of an incomplete response."""
        return self._exchange.received_bytes

    def new_epoch(self) -> str:
        """Return 26 hexadecimal digits that are returned only once: no other link has the random ones."""
        return f"{self._name}{next(self._numbers):08x}"

    async def call(self, *command: Argument) -> Any:
        """Send one command and return its reply. Concurrent calls share writes and round trips.

        Raises: LinkLost; Refused when the reply is an error.
        """
        return await self._send(command)

    async def call_all(self, commands: Iterable[Sequence[Argument]]) -> list[Any]:
        """Send several commands in one write and return their replies.

        Raises: LinkLost; Refused for the first error reply, after all replies have arrived.
        """
        together = [self._send(tuple(command), at_once=False) for command in commands]
        replies = await asyncio.gather(*together, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply
        return replies

    @property
    def publish_command(self) -> Literal["PUBLISH", "SPUBLISH"]:
        """The command that publishes on this link: SPUBLISH where channels are sharded."""
        return "SPUBLISH" if self.is_sharded else "PUBLISH"

    async def publish(self, channel: str, message: bytes) -> int:
        """Publish one message; return the number of subscribed connections that the server reports.

        Raises: LinkLost; Refused when the user has no right to the channel.
        """
        receivers: int = await self.call(self.publish_command, channel, message)
        return receivers

    def within(self, seconds: float) -> "_Within":
        """Limit the time for what is awaited inside the `async with`. Raises: LinkLost when `seconds` have passed."""
        deadlines = self._deadlines.get(seconds)
        if deadlines is None:
            deadlines = self._deadlines[seconds] = _Deadlines(seconds)
        return _Within(self.label, deadlines)

    async def subscribe(self, *channels: str) -> None:
        """Subscribe; return when the server has confirmed each channel. In a cluster, all must be of one slot.

        Raises: LinkLost; Refused when the user has no right to a channel.
        """
        await self._confirmed("SSUBSCRIBE" if self.is_sharded else "SUBSCRIBE", channels)

    async def unsubscribe(self, *channels: str) -> None:
        """Unsubscribe; return when the server has confirmed each channel.

        Raises: LinkLost; Refused when the user has no right to the command.
        """
        await self._confirmed("SUNSUBSCRIBE" if self.is_sharded else "UNSUBSCRIBE", channels)

    async def close(self) -> None:
        """Close the connection. Pending calls raise LinkLost. Closing twice is harmless."""
        if self._is_inherited:
            return
        self._lose(LinkLost(f"the link to {self.label} was closed"))
        try:
            await asyncio.wait([self._keeper])
        finally:
            # Also when the closing task is cancelled meanwhile.
            await self._connection.disconnect(nowait=True)

    def abandon(self) -> None:
        """Close the connection without its event loop, which has ended. May be called from any thread."""
        if self._is_inherited:
            return
        loop = self.lost.get_loop()
        if not loop.is_closed():
            with contextlib.suppress(RuntimeError):  # it was closed just now
                loop.call_soon_threadsafe(self._end_with_loop)  # if it ever runs again
                return
        with contextlib.suppress(RuntimeError):  # the tasks of a closed loop cannot be cancelled any more
            self._lose(LinkLost(f"the event loop of the link to {self.label} has ended"))
        close_socket(self._connection)

    def _end_with_loop(self) -> None:
        if not self.lost.done():
            self._lose(LinkLost(f"the event loop of the link to {self.label} has ended"))
        close_without_waiting(self._connection)

    def _send(self, command: tuple[Argument, ...], *, at_once: bool = True) -> asyncio.Future[Any]:
        """Write a command, or queue it; return the future of its reply.

        A command is written at once while no other awaits its reply. Commands of many concurrent callers share writes.
        """
        if self.lost.done():
            raise LinkLost(str(self.lost.result()))
        waiting = self._waiting
        if len(waiting) >= _CALLS_MAX:
            raise LinkLost(f"{_CALLS_MAX} commands await replies from {self.label} already: it is too slow, or hangs")
        packed = self._pack(command)  # first: a command that cannot be encoded is not sent, and gets no reply
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        is_idle = not waiting
        waiting.append(reply)
        self._exchange.send(packed, at_once=at_once and is_idle)
        return reply

    async def _confirmed(self, command: str, channels: Sequence[str]) -> None:
        confirmed = self._send((command, *channels))
        # Confirmations are pushes, a refusal is a reply: this call keeps its place in the queue until one arrives.
        self._confirmations[confirmed] = _Awaited(command.lower().encode(), {each.encode() for each in channels})
        await confirmed

    def _receive(self, responses: Sequence[Any]) -> None:
        push_type, on_message = self._push_type, self._on_message
        for response in responses:
            if response.__class__ is push_type:
                if response[0] in _MESSAGES:
                    on_message(response[1], response[2])
                else:
                    self._on_control(response[0], response[1])
            elif isinstance(response, Refused):
                refused = self._waiting.popleft()
                self._confirmations.pop(refused, None)
                _settle(refused, error=response)
            else:
                _settle(self._waiting.popleft(), response)

    def _on_lost(self, how: str, error: BaseException | None) -> None:
        self._lose(LinkLost(f"the link to {self.label} {how}: {error}"))

    async def _end_with_tasks(self) -> None:
        """Wait for the loss; lose the link when the event loop ends with all its tasks."""
        try:
            await asyncio.wait([self.lost])
        except asyncio.CancelledError:
            if not self.lost.done():
                self._end_with_loop()
            raise

    def _on_control(self, kind: bytes, channel: bytes) -> None:
        confirmed = self._waiting[0] if self._waiting else None
        awaited = self._confirmations.get(confirmed) if confirmed else None
        if confirmed is None or awaited is None or awaited.kind != kind or channel not in awaited.channels:
            # E.g. the slot of a channel has moved to another server, and this one has ended the subscription.
            raise LinkLost(f"the server sent {kind.decode(errors='replace')!r} without a request for it")
        awaited.channels.remove(channel)
        if not awaited.channels:
            del self._confirmations[confirmed]
            _settle(self._waiting.popleft())

    def _leave_to_parent(self) -> None:
        """Give the connection up, in a forked child: it is the parent's, and must not carry a byte of this process."""
        self._is_inherited = True
        keep_inherited(self)
        if (descriptor := descriptor_of(self._connection)) is not None:
            close_inherited(descriptor)
        with contextlib.suppress(RuntimeError):  # of an event loop in debug mode: this is not its thread
            self._lose(LinkLost(f"the link to {self.label} belongs to the parent of this forked process"))

    def _lose(self, reason: LinkLost) -> None:
        if self.lost.done():
            return
        try:
            self.lost.set_result(reason)
        finally:  # also in a forked child, where an event loop in debug mode raises
            self._exchange.stop()
        waiting, self._waiting = self._waiting, deque()
        for reply in waiting:
            # One error object each: a shared one would collect the tracebacks of all raisers.
            _settle(reply, error=LinkLost(str(reason)))


class _Deadlines:
    """The deadlines of tasks that all have the same time, in order, with one timer: most tasks end long before."""

    def __init__(self, seconds: float) -> None:
        self.seconds: Final = seconds
        self._loop = asyncio.get_running_loop()
        self._entries: deque[_Within] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, entry: "_Within") -> None:
        entries = self._entries
        while entries and entries[0].task is None:
            entries.popleft()
        entry.due_at = due_at = self._loop.time() + self.seconds
        entries.append(entry)
        if self._timer is None:
            self._timer = self._loop.call_at(due_at, self._expire)

    def _expire(self) -> None:
        self._timer = None
        entries, now = self._entries, self._loop.time()
        while entries and (entries[0].task is None or entries[0].due_at <= now):
            entries.popleft().expire()
        if entries:
            self._timer = self._loop.call_at(entries[0].due_at, self._expire)


class _Within:
    """A timeout that raises LinkLost: asyncio's own, with a timer for each, would cost a publish 10 % more.

    Shape: `task` is None before and after.
    """

    __slots__ = ("_cancelling", "_deadlines", "_is_expired", "_label", "due_at", "task")

    def __init__(self, label: str, deadlines: _Deadlines) -> None:
        self.task: asyncio.Task[Any] | None = None
        self.due_at: float = 0.0
        self._label = label
        self._deadlines = deadlines
        self._cancelling = 0
        self._is_expired = False

    def expire(self) -> None:
        """Cancel the task, if it is still inside."""
        if self.task is not None:
            self._is_expired = True
            self.task.cancel()

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("expected a timeout to be used inside a task")
        self.task, self._cancelling = task, task.cancelling()
        self._deadlines.add(self)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self.task = self.task, None
        is_late = kind is not None and issubclass(kind, TimeoutError)  # of the operating system
        if self._is_expired and task is not None:
            # As asyncio.Timeout: another cancellation meanwhile, from outside, goes on.
            is_ours = task.uncancel() <= self._cancelling
            is_late = is_late or (is_ours and kind is not None and issubclass(kind, asyncio.CancelledError))
        if is_late:
            raise LinkLost(f"no answer from {self._label} within {self._deadlines.seconds:g} s") from None


def _settle(reply: asyncio.Future[Any], result: Any = None, *, error: Exception | None = None) -> None:
    if reply.done():  # its caller was cancelled; the reply still had to be read
        return
    if error is None:
        reply.set_result(result)
    else:
        reply.set_exception(error)


def _ignore(channel: bytes, frame: bytes) -> None:
    pass
