"""Calls to the sockets of other processes, all at once, within a limit of time. Blocks: not for an event loop."""

import os
import selectors
import socket
import time
from collections.abc import Iterable
from typing import Final

from .messages import Answer, Unreadable, answer_in
from .places import Found, Peer, peer_of, remove_stale

__all__ = ["Call", "call_all"]

_RECONNECT_SECONDS: Final = 0.005
"""The pause before a socket whose queue of connections is full is tried again."""
_ENDS_MAX: Final = 2
"""How often a process may end a connection without an answer. One that closes its subscriber does so once."""


class Call:
    """The call of one process.

    Shape:  `peer` is known once connected. At the end, `answer` is set, or `is_gone`: there is no such process, or it
            is not of this user; or neither: `problem` says what it did instead.
    """

    def __init__(self, found: Found, message: bytes) -> None:
        self.peer: Peer | None = None
        self.answer: Answer | None = None
        self.is_gone: bool = False
        self.problem: str = "it did not accept the call"
        self.connection: socket.socket | None = None
        self._found: Final = found
        self._message: Final = message
        self._unsent = memoryview(b"")
        self._received = bytearray()
        self._ends = 0

    @property
    def is_over(self) -> bool:
        """Whether there is no more to wait for."""
        return self.answer is not None or self.is_gone or self._ends >= _ENDS_MAX

    @property
    def events(self) -> int:
        """What its connection waits for."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)

    def connect(self) -> bool:
        """Try to connect; return whether there is a connection."""
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:  # no descriptor is left; perhaps one will be
            self.problem = f"it could not be called: {error}"
            return False
        try:
            connection.setblocking(False)
            connection.connect(self._found.address)
        except BlockingIOError:  # its queue is full
            connection.close()
            return False
        except OSError as error:
            connection.close()
            self.is_gone = True
            if isinstance(error, ConnectionRefusedError):
                remove_stale(self._found)
            return False
        peer = peer_of(connection)
        if peer is None or peer.uid != os.geteuid():
            connection.close()
            self.is_gone = True
            return False
        self.connection, self.peer, self._unsent = connection, peer, memoryview(self._message)
        self._received.clear()
        self.problem = "it did not answer in time"
        return True

    def proceed(self) -> bool:
        """Send and receive what can be; return whether the connection is of further use."""
        assert self.connection is not None, "it is called for what waits for its connection"
        try:
            if self._unsent:
                self._unsent = self._unsent[self.connection.send(self._unsent) :]
            if chunk := self.connection.recv(65_536):
                self._received += chunk
                self.answer = answer_in(bytes(self._received))
                return self.answer is None
            self.problem = "it ended the connection without an answer"
        except BlockingIOError:
            return True
        except (OSError, Unreadable) as error:
            self.problem = str(error)
        self._ends += 1
        return False

    def close(self) -> None:
        """Close the connection."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def call_all(sockets: Iterable[Found], message: bytes, timeout_seconds: float) -> list[Call]:
    """Send `message` to all of these sockets at once, and return when each has answered, or the time is up."""
    deadline = time.monotonic() + timeout_seconds
    calls = [Call(each, message) for each in sockets]
    with selectors.DefaultSelector() as selector:
        try:
            while waiting := [call for call in calls if not call.is_over]:
                unconnected = [call for call in waiting if call.connection is None]
                for call in unconnected:
                    if call.connect() and call.connection is not None:
                        selector.register(call.connection, call.events, call)
                left_seconds = deadline - time.monotonic()
                if left_seconds <= 0:
                    break
                is_refused = any(call.connection is None and not call.is_over for call in unconnected)
                _proceed(selector, min(left_seconds, _RECONNECT_SECONDS) if is_refused else left_seconds)
        finally:
            for call in calls:
                call.close()
    return calls


def _proceed(selector: selectors.BaseSelector, timeout_seconds: float) -> None:
    if not selector.get_map():
        time.sleep(min(timeout_seconds, _RECONNECT_SECONDS))
        return
    for key, _ in selector.select(timeout_seconds):
        call: Call = key.data
        if call.proceed():
            selector.modify(key.fileobj, call.events, call)
        else:
            selector.unregister(key.fileobj)
            call.close()
