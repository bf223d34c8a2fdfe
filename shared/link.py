"""One connection to Redis: commands out, replies and pushes back, in the order in which the server sent them.

This is the only module that touches the Redis client library. What it does not do is the point: it never retries and
never reconnects by itself, so that whoever owns it knows of every gap. All of a link's replies and pushes pass through
one reader in one order; that a reply has come therefore proves that every push the server sent before it has been
handled.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import urlsplit

from .errors import InvalidSettings, LinkLost

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection
    from redis.exceptions import ResponseError

__all__ = ["Link", "OnMessage", "RedisAddress", "Refused"]

Argument: TypeAlias = str | bytes | int | float
OnMessage: TypeAlias = Callable[[bytes, bytes], None]
"""Called by the reader with the channel and the frame of each message. It must not block nor raise."""

_SLICE_RESPONSES: Final = 128
"""How many responses the reader handles before it lets the rest of the event loop run: a flood never starves it."""
_CALLS_MAX: Final = 10_000
"""The most commands that wait for their replies on one link."""


class Refused(Exception):
    """Redis answered a command with an error. `code` is the error's first word, e.g. `NOSCRIPT`."""

    def __init__(self, error: "ResponseError") -> None:
        self.code = error.status_code or str(error).partition(" ")[0]
        super().__init__(str(error) if str(error).startswith(self.code) else f"{self.code} {error}")


class RedisAddress:
    """Where a Redis or Valkey server is, checked once and kept without showing its password.

    Shape:  `redis://[[user]:password@]host[:port][/db]`, `rediss://…` with TLS, or `unix://path`.
    Raises: InvalidSettings.
    Source: the client library's `parse_url`.
    """

    def __init__(self, url: str) -> None:
        # The client library takes a third of a second to import: only those who connect pay for it.
        from redis.asyncio.connection import Connection, parse_url

        try:
            arguments: dict[str, Any] = dict(parse_url(url))
        except (ValueError, TypeError, AttributeError) as error:
            raise InvalidSettings(
                f"expected a URL such as redis://127.0.0.1:6379/0, got {_without_password(url)!r}: {error}"
            ) from None
        self._connection_class: type[AbstractConnection] = arguments.pop("connection_class", Connection)
        self._arguments = arguments
        self.label: Final = _without_password(url)

    def __repr__(self) -> str:
        return f"RedisAddress({self.label!r})"

    def new_connection(self, client_name: str) -> "AbstractConnection":
        """Return a connection that is not connected yet, with every automatism of the client library off."""
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.maint_notifications import MaintNotificationsConfig

        ours: dict[str, Any] = {
            "protocol": 3,  # replies and pushes share one connection, in one order
            "client_name": client_name,
            "decode_responses": False,
            "health_check_interval": 0,
            "maint_notifications_config": MaintNotificationsConfig(enabled=False),
            "retry": Retry(NoBackoff(), 0),
            "retry_on_error": [],
            "retry_on_timeout": False,
            "socket_timeout": None,  # deadlines are the link's owner's
        }
        return self._connection_class(**(self._arguments | ours))


class Link:
    """One open connection. Made by `Link.open`; once lost it stays lost.

    Every method raises LinkLost when the connection is gone, and `lost` is set to the reason as soon as it is noticed.
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
        """Connect, authenticate and say hello, all within `timeout_seconds`.

        Raises: LinkLost.
        """
        from redis.exceptions import RedisError

        connection = address.new_connection(client_name)
        try:
            async with asyncio.timeout(timeout_seconds):
                await connection.connect()  # type: ignore[no-untyped-call]
        except TimeoutError:
            raise LinkLost(
                f"expected an answer from {address.label} within {timeout_seconds:g} s, got none; "
                "check the address, and that the server runs"
            ) from None
        except (RedisError, OSError) as error:
            raise LinkLost(f"expected a connection to {address.label}, got: {error}") from error
        finally:
            if not connection.is_connected:
                await connection.disconnect(nowait=True)
        return cls(connection, address.label, on_message or _ignore)

    def __init__(self, connection: "AbstractConnection", label: str, on_message: OnMessage) -> None:
        self.label = label
        self.lost: asyncio.Future[LinkLost] = asyncio.get_running_loop().create_future()
        self._connection = connection
        self._on_message = on_message
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._confirmations: dict[asyncio.Future[Any], int] = {}
        self._unsent: list[tuple[Argument, ...]] = []
        self._has_unsent = asyncio.Event()
        parser: Any = connection._get_parser()
        parser.set_pubsub_push_handler(_as_tuple)
        self._reader = asyncio.create_task(self._read(), name=f"broadcache link reader {label}")
        self._writer = asyncio.create_task(self._write(), name=f"broadcache link writer {label}")

    @property
    def is_open(self) -> bool:
        """Whether the link is not known to be lost."""
        return not self.lost.done()

    async def call(self, *command: Argument) -> Any:
        """Send one command and return its reply. Concurrent calls share writes, and so round trips.

        Raises: LinkLost; Refused when the reply is an error.
        """
        return await self._send(command)

    async def call_all(self, commands: Iterable[Sequence[Argument]]) -> list[Any]:
        """Send several commands in one write and return their replies.

        Raises: LinkLost; Refused for the first reply that is an error, when all have come.
        """
        replies = await asyncio.gather(*[self._send(tuple(command)) for command in commands], return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply
        return replies

    async def subscribe(self, *channels: str) -> None:
        """Subscribe, and return when the server has confirmed each channel.

        Raises: LinkLost; Refused when the user has no right to a channel.
        """
        confirmed = self._send(("SUBSCRIBE", *channels))
        # Confirmations are pushes, a refusal is a reply: this call keeps its place in the queue until either has come.
        self._confirmations[confirmed] = len(channels)
        await confirmed

    async def close(self) -> None:
        """Close the connection. Calls that still wait raise LinkLost. Closing twice is harmless."""
        self._lose(LinkLost(f"the link to {self.label} was closed"))
        current = asyncio.current_task()
        tasks = [task for task in (self._reader, self._writer) if task is not current]
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._connection.disconnect(nowait=True)

    def _send(self, command: tuple[Argument, ...]) -> asyncio.Future[Any]:
        if self.lost.done():
            raise LinkLost(str(self.lost.result()))
        if len(self._waiting) >= _CALLS_MAX:
            raise LinkLost(f"{_CALLS_MAX} commands wait for {self.label} already; it is too slow, or stopped")
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(reply)
        self._unsent.append(command)
        self._has_unsent.set()
        return reply

    async def _write(self) -> None:
        try:
            while True:
                await self._has_unsent.wait()
                self._has_unsent.clear()
                commands, self._unsent = self._unsent, []
                packed = self._connection.pack_commands(commands)
                await self._connection.send_packed_command(packed, check_health=False)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  (whatever it is, the link is of no use any more, and says why)
            self._lose(LinkLost(f"the link to {self.label} was lost while writing: {error}"))

    async def _read(self) -> None:
        from redis.exceptions import ResponseError

        read_response = self._connection.read_response
        on_message = self._on_message
        try:
            while True:
                for _ in range(_SLICE_RESPONSES):
                    try:
                        response = await read_response(
                            disable_decoding=True, timeout=math.inf, disconnect_on_error=False, push_request=True
                        )
                    except ResponseError as error:
                        refused = self._waiting.popleft()
                        self._confirmations.pop(refused, None)
                        _settle(refused, error=Refused(error))
                        continue
                    if type(response) is not tuple:
                        _settle(self._waiting.popleft(), response)
                    elif response[0] == b"message":
                        on_message(response[1], response[2])
                    else:
                        self._on_control(response[0])
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  (the same)
            self._lose(LinkLost(f"the link to {self.label} was lost: {error}"))

    def _on_control(self, kind: bytes) -> None:
        if kind == b"subscribe":
            confirmed = self._waiting[0]
            self._confirmations[confirmed] -= 1
            if not self._confirmations[confirmed]:
                del self._confirmations[confirmed]
                _settle(self._waiting.popleft())
        else:  # e.g. an unsubscription that nobody asked for: the server has stopped telling us something
            raise LinkLost(f"the server sent {kind.decode(errors='replace')!r}, which was not asked for")

    def _lose(self, reason: LinkLost) -> None:
        if self.lost.done():
            return
        self.lost.set_result(reason)
        self._reader.cancel()
        self._writer.cancel()
        waiting, self._waiting = self._waiting, deque()
        self._unsent.clear()
        for reply in waiting:
            # One error object each: a shared one would gather the tracebacks of all its raisers.
            _settle(reply, error=LinkLost(str(reason)))


def _settle(reply: asyncio.Future[Any], result: Any = None, *, error: Exception | None = None) -> None:
    if reply.done():  # its caller was cancelled; the reply still had to be read
        return
    if error is None:
        reply.set_result(result)
    else:
        reply.set_exception(error)


async def _as_tuple(push: Sequence[Any]) -> tuple[Any, ...]:
    """Tell pushes from replies: the parsers make lists of both, and a reply is never a tuple."""
    return tuple(push)


def _ignore(channel: bytes, frame: bytes) -> None:
    pass


def _without_password(url: object) -> str:
    """Name an address in errors and logs without giving its secrets away."""
    if not isinstance(url, str):
        return repr(url)
    try:
        parts = urlsplit(url)
    except ValueError:
        return "a URL that cannot be read"
    user, at, host = parts.netloc.rpartition("@")
    shown = f"{user.partition(':')[0]}{':…' if ':' in user else ''}{at}{host}"
    return parts._replace(netloc=shown, query="").geturl()
