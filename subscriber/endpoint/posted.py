"""What a POST of an invalidation does in this process and in all others of its address, and its response."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, NamedTuple

from ...shared.fanout_report import NOT_APPLIED_BY_ALL, NOT_FOLLOWED
from ...shared.process.forks import keep_inherited
from .members import Served, apply_to, with_others
from .processes.own_socket import own_socket
from .processes.siblings import PassedOn, pass_on

__all__ = ["InvalidationEndpoint", "PostedResponse", "passing_on", "response_of"]

_THREADS_MAX: Final = 16


class PostedResponse(NamedTuple):
    """The response of POST /cache-invalidation: 200, or 500 if a process of this address has not applied it."""

    status_code: int
    document: dict[str, Any]


class InvalidationEndpoint:
    """POST /cache-invalidation for frameworks other than FastAPI: Flask, Django, any WSGI application.

    Make it where the application is made, before the subscribers are started: from then on, this process has a socket
    for the other processes of its address while they run. Who may post is the service's task.

    Shape:  `subscribers` are those that the application answers for, besides all others of the process that run.
    """

    def __init__(self, *subscribers: Served) -> None:
        if not subscribers:
            raise TypeError("expected at least one subscriber, got none: InvalidationEndpoint(subscriber)")
        self._subscribers: Final = subscribers
        own_socket.has_endpoint()

    def post(self, body: bytes, server: tuple[str, int | None] | None = None) -> PostedResponse:
        """Apply the body of a request here, and in all other processes of the address. Blocks for a second at most.

        Shape:  `server` is the local address of the connection, where the framework tells it: (host, port), or the path
                of a Unix socket and None. Without it, all addresses are meant at which this process listens.
        Raises: nothing, whatever the bytes.
        """
        own = apply_to(with_others(self._subscribers, own_socket.running, None), body)
        return response_of(own, pass_on(body, server))


def passing_on(body: bytes, server: tuple[str, int | None] | None) -> Future[PassedOn]:
    """Do `pass_on` in a thread: for an event loop."""
    return _threads.submit(body, server)


def response_of(own: dict[str, Any], passed_on: PassedOn) -> PostedResponse:
    """Return the response of all processes of an address.

    Shape:  `own` is the document of this process. `processes` is added, with each of them, this one first, and `doubt`,
            why there may be others. `replica`, `outcome` and `dropped` are of all together, and `replicas` lists all.
    """
    document = dict(own)
    own_replicas = [each["replica"] for each in own["replicas"]]
    processes = [_process(os.getpid(), own["outcome"], own["dropped"], own_replicas)]
    replicas = [*own["replicas"]]
    for each in passed_on.answers:
        processes.append(_process(each.pid, each.outcome, each.dropped, [*each.replicas]))
        replicas += [{"replica": replica, "outcome": outcome} for replica, outcome in each.replicas.items()]
        if document["outcome"] == NOT_FOLLOWED != each.outcome:
            document["replica"], document["outcome"] = next(iter(each.replicas)), each.outcome
    processes += [_process(each.pid, None, None, [], each.why) for each in passed_on.silent]
    dropped = sum(each["dropped"] or 0 for each in processes)
    document |= {"dropped": dropped, "replicas": replicas, "processes": processes, "doubt": passed_on.doubt}
    if passed_on.silent:
        document["outcome"] = NOT_APPLIED_BY_ALL
    return PostedResponse(500 if passed_on.silent else 200, document)


def _process(
    pid: int | None, outcome: str | None, dropped: int | None, replicas: Sequence[str], error: str | None = None
) -> dict[str, Any]:
    return {"pid": pid, "outcome": outcome, "dropped": dropped, "replicas": replicas, "error": error}


class _Threads:
    """A few threads of its own: those of the application may all be waiting for loads."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, body: bytes, server: tuple[str, int | None] | None) -> Future[PassedOn]:
        pool = self._pool
        if pool is None:
            pool = self._pool = ThreadPoolExecutor(_THREADS_MAX, thread_name_prefix="broadcache siblings")
        return pool.submit(pass_on, body, server)

    def start_over(self) -> None:
        """In a forked child: its parent's threads do not run."""
        keep_inherited(self._pool)
        self._pool = None


_threads: Final = _Threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.start_over)
