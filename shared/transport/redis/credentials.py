"""User and password, read for each connection; and errors without them."""

import asyncio
import concurrent.futures
import inspect
import re
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ...errors import InvalidSettings, LinkLost
from ...process.forks import in_forked_child

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

__all__ = ["Credentials", "Login", "explained"]

_Pair: TypeAlias = tuple[str | None, str]
Credentials: TypeAlias = "Callable[[], _Pair | Awaitable[_Pair]] | CredentialProvider | None"
"""Returns (user, password), or a provider of the client library; it is called for each connection. None: the URL's."""

_Call: TypeAlias = Callable[[], Any]
_SHOWN_CHARACTERS_MAX: Final = 300
_PART_CHARACTERS: Final = 4
"""A text is not shown when it has so many characters in common with a secret, or all of a shorter one."""
# Texts of the system, and of servers when they refuse: whatever they have in common with a secret is chance.
_HARMLESS: Final = re.compile(
    r"Error -?\d+ .*connecting to .*"
    r"|invalid username-password pair or user is disabled\.?"
    r"|Authentication required\.?"
    r"|(?:Redis|Valkey) is loading the dataset in memory\.?"
    r"|max number of clients reached\.?"
    r"|this user has no permissions to (?:run the '[\w|-]{1,40}' command(?: or its subcommand)?"
    r"|access (?:a|one of the|the) (?:keys?|channels?|database)(?: used as arguments)?)\.?",
    re.DOTALL,
)
_ONLY_A_NUMBER: Final = re.compile(r"\. \d+\.?$")
_USER: Final = re.compile(r"^User \S+ has no permissions")


class Login:
    """The user and password of the data servers: those of the URL, or read anew for each connection.

    Raises: InvalidSettings.
    """

    def __init__(self, credentials: Credentials, arguments: Mapping[str, Any]) -> None:
        self._fixed = {name: arguments[name] for name in ("username", "password") if name in arguments}
        self._credentials = credentials
        self._in_thread = _InThread()
        if credentials is None:
            return
        if self._fixed:
            raise InvalidSettings(
                "expected user and password in the URL or credentials=, got both; leave one of them out"
            )
        if not callable(credentials) and not hasattr(credentials, "get_credentials"):
            raise InvalidSettings(
                "expected credentials= to be a function that returns (user, password), or a CredentialProvider, got "
                f"{type(credentials).__name__} (not shown, since it may contain a password)"
            )

    @property
    def is_read_anew(self) -> bool:
        """Whether credentials are read for each connection."""
        return self._credentials is not None

    async def read(self) -> dict[str, Any]:
        """Return `username` and `password` as arguments of a connection. Raises: LinkLost."""
        if self._credentials is None:
            return self._fixed
        problem = ""
        try:
            got = await self._called(self._credentials)
            return _arguments_of(got)
        except _Unusable as error:
            problem = str(error)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  (whatever the function raises, the next attempt calls it again)
            # The text may contain what the function has read: only the type is shown, and where it was raised.
            problem = f"it raised {type(error).__name__}{_place_of(error)}"
        raise LinkLost(f"the credentials could not be read: {problem}; they are read again for the next connection")

    async def _called(self, credentials: Credentials) -> Any:
        call, is_async = _call_of(credentials)
        got = call() if is_async else await self._in_thread.call(call)
        return await got if inspect.isawaitable(got) else got


class _Unusable(Exception):
    """Credentials of a form that cannot be used. Its text shows no value."""


class _InThread:
    """Calls a function that may block in a daemon thread. While a call hangs, others wait for it and start no more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: concurrent.futures.Future[Any] | None = None
        in_forked_child(self._start_over)

    def _start_over(self) -> None:
        """Forget the call under way: a child of a fork has no thread that would end it."""
        self._lock = threading.Lock()
        self._pending = None

    async def call(self, function: _Call) -> Any:
        with self._lock:
            if self._pending is None or self._pending.done():
                self._pending = concurrent.futures.Future()
                self._pending.set_running_or_notify_cancel()  # no waiter can cancel it for the others
                thread = threading.Thread(
                    target=_run, args=(function, self._pending), name="broadcache credentials", daemon=True
                )
                thread.start()
            pending = self._pending
        return await asyncio.wrap_future(pending)


def _run(function: _Call, done: "concurrent.futures.Future[Any]") -> None:
    try:
        got = function()
    except Exception as error:  # noqa: BLE001
        done.set_exception(error)
    except BaseException as error:  # noqa: BLE001  (e.g. SystemExit: it must not end the event loop that waits)
        done.set_exception(RuntimeError(type(error).__name__))
    else:
        done.set_result(got)


def _call_of(credentials: Any) -> tuple[_Call, bool]:
    """Return what is called, and whether in the event loop: then it does not block."""
    if hasattr(credentials, "get_credentials"):
        from redis.credentials import CredentialProvider

        call = getattr(credentials, "get_credentials_async", None)
        # The provider's own one only calls the other, in the event loop and with a warning.
        base_call = getattr(CredentialProvider, "get_credentials_async", None)  # none before redis-py 5.3
        if call is not None and getattr(call, "__func__", None) is not base_call:
            return call, True
        return credentials.get_credentials, False
    is_async = inspect.iscoroutinefunction(credentials) or inspect.iscoroutinefunction(type(credentials).__call__)
    return credentials, is_async


def _arguments_of(got: object) -> dict[str, Any]:
    expected = "expected (user, password)"
    if not isinstance(got, tuple | list):
        raise _Unusable(f"{expected}, got {type(got).__name__}")
    if len(got) not in (1, 2):
        raise _Unusable(f"{expected}, got {len(got)} values")
    user, password = (None, got[0]) if len(got) == 1 else got
    if not isinstance(password, str) or not isinstance(user, str | None):
        raise _Unusable(f"{expected} as two str, got {type(user).__name__} and {type(password).__name__}")
    if not user and not password:
        raise _Unusable(f"{expected}, got neither")
    if not _is_utf_8(password) or not _is_utf_8(user or ""):
        raise _Unusable(f"{expected}, got characters that UTF-8 cannot encode")
    return {"username": user or None, "password": password}


def _is_utf_8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _place_of(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({PurePath(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def explained(error: BaseException, secrets: Iterable[object]) -> str:
    """Return the text of an error for users; of one that repeats a part of a secret, its first word.

    A server that does not know a command repeats its arguments, which are user and password at the begin of a link.
    """
    text = _text_of(error)[:_SHOWN_CHARACTERS_MAX] or type(error).__name__
    head, found, _ = text.partition("with args beginning with")
    if found:
        return f"{head.rstrip(' ,')} (its arguments are not shown); check that this is a Redis of version 6 or newer"
    # The name of the user may be a password in the wrong place.
    text = _USER.sub("this user has no permissions", text)
    if _HARMLESS.fullmatch(text) is None and any(_is_shared(text, each) for each in secrets if isinstance(each, str)):
        return f"{type(error).__name__} (its text is not shown, since it repeats a part of a secret)"
    return text.removesuffix(".")  # the text continues a sentence


def _text_of(error: BaseException) -> str:
    """Return the text of an error. redis-py before 6 shows only the number of an error of the system."""
    text, reason = str(error), getattr(error.__context__, "strerror", None)
    return _ONLY_A_NUMBER.sub(lambda _: f". {reason}", text) if isinstance(reason, str) else text


def _is_shared(text: str, secret: str) -> bool:
    width = min(_PART_CHARACTERS, len(secret))
    return bool(width) and any(secret[start : start + width] in text for start in range(len(secret) - width + 1))
