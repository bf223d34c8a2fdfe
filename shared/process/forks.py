"""Forks and exits: what a forked child must not use as it inherits it, and what a process does before it ends."""

import atexit
import contextlib
import itertools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, Final
from weakref import WeakMethod

__all__ = ["at_exit", "close_inherited", "in_forked_child", "keep_inherited"]

_log = logging.getLogger("broadcache")

_numbers: Final = itertools.count()
# A plain dictionary, whose operations are atomic: another thread may be registering at the moment of the fork.
_methods: Final[dict[int, WeakMethod[Callable[[], None]]]] = {}
_inherited: Final[list[object]] = []


def in_forked_child(method: Callable[[], None]) -> None:
    """Call a bound method in each forked child before any other code of it runs, as long as its object lives.

    Only the thread that forked goes on in the child: a lock that another thread held is never released, and a task of
    its event loop never continues. The method must not block, and must not send anything.
    """
    number = next(_numbers)
    _methods[number] = WeakMethod(method, lambda _: _methods.pop(number, None))


def _start_over() -> None:
    for each in list(_methods.values()):
        method = each()
        try:
            if method is not None:
                method()
        except Exception:  # noqa: BLE001  (the others must start over all the same)
            _log.exception("a forked process keeps a part of its parent's state: an error in broadcache, please report")


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_start_over)


def keep_inherited(*things: object) -> None:
    """Keep what a child has inherited and never uses: tasks and transports act when they are collected."""
    _inherited.extend(things)


def close_inherited(descriptor: int) -> None:
    """Close a forked child's copy of a descriptor, without a word to the other end, and without freeing its number.

    The number leads to /dev/null from then on. Objects that still have it may write to it, close it, or remove it from
    an epoll set, which child and parent share: none of that reaches the parent's connection.
    """
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_RDWR)
        try:
            os.dup2(null, descriptor, inheritable=False)
        finally:
            os.close(null)


def at_exit(method: Callable[[], None]) -> None:
    """Call a bound method when this process ends in order, as long as its object lives. It may be called twice.

    A forked child may call it too: Python inherits exit handlers.
    """
    weak = WeakMethod(method)

    def call(**_: object) -> None:
        if (found := weak()) is not None:
            found()

    atexit.register(call)
    # Their children do not run the exit handlers of Python.
    util: Any = sys.modules.get("multiprocessing.util")
    if util is not None:
        util.Finalize(None, call, exitpriority=10)
    signals: Any = sys.modules.get("celery.signals")
    if signals is not None:
        signals.worker_process_shutdown.connect(call, weak=False)
