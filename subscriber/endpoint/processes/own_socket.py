"""The socket of this process, for those that serve the same address: it answers what they pass on."""

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Final
from weakref import ref

from ....shared.process.forks import at_exit, close_inherited, keep_inherited
from ..members import Served, apply_to
from .listening import Listener, listeners, network
from .messages import Answer, Question, Unreadable, packed_answer, received_question
from .places import Bound, CannotBind, bind, is_there, peer_of

__all__ = ["OwnSocket", "own_socket"]

_log = logging.getLogger("broadcache.subscriber")

_READ_SECONDS: Final = 2.0
"""How long a connection may take to send its question, which has been written whole before it is read."""
_PAUSE_SECONDS: Final = 0.2
_END_SECONDS: Final = 0.1
"""How long it is awaited that the thread has closed the socket, which takes it some microseconds."""
_CHECK_SECONDS: Final = 5
"""How often it is checked that others can find the socket: cleaners of temporary files may remove it."""
_REMOVED: Final = "the socket of this process had been removed just now, and perhaps those of others too"


class OwnSocket:
    """The socket of a process that has an endpoint and subscribers that run. May be used from any thread.

    It is bound before the caches of the first such subscriber store anything, and closed when the last one has ended.
    A forked child has none until a subscriber starts in it.

    Shape:  `problem` is why there is none although there should be.
    """

    def __init__(self) -> None:
        self.problem: str | None = None
        self._lock = threading.Lock()
        self._has_endpoint = False
        self._subscribers: list[ref[Served]] = []
        self._bound: Bound | None = None
        self._thread: threading.Thread | None = None
        self._held: set[str] = set()
        self._exits_as = 0

    def has_endpoint(self) -> None:
        """Have a socket while subscribers run: this process has a route for what is posted."""
        with self._lock:
            self._has_endpoint = True
            self._settle()

    def join(self, subscriber: Served) -> None:
        """Begin: this subscriber is about to start."""
        with self._lock:
            self._subscribers = [*self._without(subscriber), ref(subscriber)]
            self._settle()

    def leave(self, subscriber: Served) -> None:
        """End: the caches of this subscriber serve nothing any more."""
        with self._lock:
            self._subscribers = self._without(subscriber)
            self._settle()

    def _without(self, subscriber: Served) -> list[ref[Served]]:
        return [each for each in self._subscribers if each() not in (None, subscriber)]

    @property
    def running(self) -> list[Served]:
        """The subscribers of this process that run."""
        return [found for each in self._subscribers if (found := each()) is not None]

    def settled_problem(self) -> str | None:
        """Try again to bind, if that has failed or the socket was removed; return why others may not be found."""
        if self.problem is not None:
            with self._lock:
                self._settle()
        bound = self._bound
        if bound is not None and not is_there(bound):
            self._replace(bound)
            return self.problem or _REMOVED
        return self.problem

    @property
    def address(self) -> str | None:
        """Where siblings find it."""
        bound = self._bound
        return None if bound is None else bound.address

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Its descriptors, which serve no address."""
        bound = self._bound
        return () if bound is None else (bound.socket.fileno(),)

    def _settle(self) -> None:
        if not (self._has_endpoint and self._subscribers):
            self.problem = None
            self._end()
        elif self._bound is None:
            self._held |= {each.name for each in held(self.descriptors)}
            if self._bind() and self._exits_as != os.getpid():
                self._exits_as = os.getpid()
                at_exit(self._end)

    def _bind(self) -> bool:
        """Bind a socket, in place of the one that there is. If that fails, keep it, set `problem`, and return False."""
        before, thread_before, bound = self._bound, self._thread, None
        try:
            self._bound = bound = bind()
            self._thread = threading.Thread(target=self._serve, args=(bound,), name="broadcache siblings", daemon=True)
            self._thread.start()
        except (CannotBind, RuntimeError) as error:
            self._bound, self._thread = before, thread_before
            if bound is not None:
                _close(bound, None)
                bound.socket.close()
            if self.problem is None:
                _log.warning("cannot be found by other processes of the same address: %s", error)
            self.problem = str(error)
            return False
        self.problem = None
        if before is not None:
            _close(before, thread_before)
        return True

    def _replace(self, lost: Bound) -> None:
        with self._lock:
            if self._bound is lost:
                if self.problem is None:
                    _log.warning("the socket for other processes of the same address was removed: %s", lost.path)
                self._bind()

    def _end(self) -> None:
        bound, self._bound = self._bound, None
        if bound is not None:
            _close(bound, self._thread)

    def start_over(self) -> None:
        """In a forked child: only close what is the parent's. Otherwise its siblings would call a deaf socket."""
        bound, self._bound = self._bound, None
        if bound is not None:
            close_inherited(bound.socket.fileno())
            keep_inherited(bound)
        self._lock = threading.Lock()
        self._subscribers = []
        self.problem = None
        self._held = set()

    # --- in its threads -----------------------------------------------------------------------------------------------

    def _serve(self, bound: Bound) -> None:
        with bound.socket as listener:
            with contextlib.suppress(OSError):
                # Not `settimeout`, with which the shutdown of a socket would not end the wait.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _CHECK_SECONDS, 0))
            while self._bound is bound:
                try:
                    connection, _ = listener.accept()
                except BlockingIOError:
                    if self._bound is bound and not is_there(bound):
                        self._replace(bound)
                    continue
                except OSError as error:
                    if self._bound is not bound:
                        return
                    _log.warning("could not accept the call of another process of the same address: %s", error)
                    time.sleep(_PAUSE_SECONDS)  # no descriptor is left, say
                    continue
                try:
                    threading.Thread(
                        target=self._answer, args=(connection,), name="broadcache sibling", daemon=True
                    ).start()
                except RuntimeError:  # no thread is left
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_READ_SECONDS)
            peer = peer_of(connection)
            if peer is None or peer.uid != os.geteuid():
                return
            try:
                question, body = received_question(connection)
            except Unreadable as error:
                _log.warning("unreadable bytes from a process of the same user: %s", error)
                return
            connection.sendall(packed_answer(self._answered(question, body)))

    def _answered(self, question: Question, body: bytes) -> Answer:
        try:
            subscribers = self.running
            if not subscribers or not self._is_concerned(question):
                return Answer(pid=os.getpid(), is_concerned=False)
            return applied(subscribers, body)
        except Exception as error:  # noqa: BLE001  (it must not look like a process that has ended)
            _log.exception("could not apply what another process has passed on: an error in broadcache, please report")
            return Answer(pid=os.getpid(), is_concerned=True, error=f"{type(error).__name__}: {error}")

    def _is_concerned(self, question: Question) -> bool:
        """Whether this process serves one of the addresses, or has done so: it may not have ended all requests.

        One that listens nowhere yet may come to share an address that other sockets may be bound to as well.
        """
        if question.network != network():
            return False
        try:
            now = listeners(self.descriptors)
        except (OSError, AttributeError):  # no descriptor is left, say: it may serve the address
            return True
        self._held |= {each.name for each in now}.intersection(question.addresses)
        listens = any(each.is_listening for each in now)
        return not self._held.isdisjoint(question.addresses) or (question.may_have_twins and not listens)


def _close(bound: Bound, thread: threading.Thread | None) -> None:
    """Have its thread close a socket, and remove its file: in this order, or others would take it for a lost one."""
    # Either wakes the thread.
    try:
        bound.socket.shutdown(socket.SHUT_RDWR)
    except OSError:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as call:
            call.setblocking(False)
            call.connect(bound.address)
    if thread not in (None, threading.current_thread()):
        thread.join(_END_SECONDS)
    if bound.path is not None:
        with contextlib.suppress(OSError):
            bound.path.unlink()


def held(without: Sequence[int]) -> list[Listener]:
    """Return the listeners of this process; none if the platform does not tell."""
    try:
        return listeners(without)
    except (OSError, AttributeError):
        return []


def applied(subscribers: Sequence[Served], body: bytes) -> Answer:
    """Apply what was posted, and return the answer of this process."""
    document = apply_to(subscribers, body)
    return Answer(
        pid=os.getpid(),
        is_concerned=True,
        outcome=document["outcome"],
        dropped=document["dropped"],
        replicas={each["replica"]: each["outcome"] for each in document["replicas"]},
    )


own_socket: Final = OwnSocket()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=own_socket.start_over)
