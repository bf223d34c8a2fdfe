"""One failed load of many callers: each raises an exception of its own, as short as if it had loaded alone."""

import asyncio
import threading
import traceback
from typing import Any

import pytest
from tests.support.waiting import until, wait_until

from broadcache.shared import NotDelivered
from broadcache.subscriber import LocalCache
from broadcache.subscriber.cache.loading.failure import Failure, copied

pytestmark = pytest.mark.anyio

CALLERS = 60


class WithState(ConnectionError):
    """Takes other arguments than it hands on, as many libraries' errors do."""

    __slots__ = ("attempt", "never_set")

    def __init__(self, host: str, *, attempt: int) -> None:
        super().__init__(f"no answer from {host}")
        self.host = host
        self.attempt = attempt


class Stubborn(Exception):
    """Cannot be copied."""

    def __new__(cls, *args: object) -> "Stubborn":
        return super().__new__(cls, *args)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


def failures_of_threads(error: BaseException) -> list[BaseException]:
    cache = LocalCache({})
    gate = threading.Event()
    failures: list[BaseException] = []

    def load() -> Any:
        gate.wait(20)
        raise error

    def call() -> None:
        try:
            cache.get_or_load_sync("a", load)
        except BaseException as failure:  # noqa: BLE001  (what this is about)
            failures.append(failure)

    callers = [threading.Thread(target=call) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    wait_until(lambda: cache.stats().shared_loads == CALLERS - 1, "the callers")
    gate.set()
    for caller in callers:
        caller.join(20)
    assert (len(failures), cache.stats().loads) == (CALLERS, 1)
    return failures


def frames_of(error: BaseException) -> int:
    return len(traceback.extract_tb(error.__traceback__))


def test_sixty_threads_that_share_a_failed_load_each_raise_a_short_error() -> None:
    failures = failures_of_threads(WithState("db-1", attempt=3))
    assert len({id(failure) for failure in failures}) == CALLERS
    assert max(map(frames_of, failures)) <= 6
    for failure in failures:
        assert isinstance(failure, WithState)
        assert (failure.args, failure.host, failure.attempt) == (("no answer from db-1",), "db-1", 3)
        assert traceback.extract_tb(failure.__traceback__)[-1].name == "load", "it shows where the loader failed"
        assert (failure.__cause__, failure.__context__) == (None, None), "it is shown once"


def test_the_same_exception_raised_by_sixty_threads_shows_the_frames_of_all() -> None:
    """The negative control: what a Future does with its exception."""
    shared = LookupError("no such product")
    for _ in range(CALLERS):
        try:
            raise shared
        except LookupError:
            pass
    assert frames_of(shared) >= CALLERS


def test_an_exception_that_cannot_be_copied_is_shared_and_stays_short() -> None:
    stubborn = Stubborn("no")
    assert copied(stubborn) is None
    failure = Failure(stubborn)
    for _ in range(CALLERS):
        with pytest.raises(Stubborn) as caught:
            raise failure.of_joined_caller()
        assert frames_of(caught.value) <= 2
    assert {id(each) for each in failures_of_threads(Stubborn("no"))} != set()


async def test_tasks_that_share_a_failed_load_raise_errors_of_their_own() -> None:
    cache = LocalCache({})
    gate = asyncio.Event()

    async def load() -> Any:
        await gate.wait()
        raise LookupError("no such product")

    callers = [asyncio.ensure_future(cache.get_or_load("a", load)) for _ in range(CALLERS)]
    await until(lambda: cache.stats().shared_loads == CALLERS - 1)
    gate.set()
    failures = await asyncio.gather(*callers, return_exceptions=True)
    assert {type(failure) for failure in failures} == {LookupError}
    assert len({id(failure) for failure in failures}) == CALLERS
    assert all(isinstance(each, LookupError) and frames_of(each) <= 6 for each in failures)


async def test_the_only_caller_of_a_load_raises_the_very_exception_of_its_loader() -> None:
    error = LookupError("no such product")

    def load() -> Any:
        raise error

    with pytest.raises(LookupError) as caught:
        await LocalCache({}).get_or_load("a", load)
    assert caught.value is error
    with pytest.raises(LookupError) as caught:
        LocalCache({}).get_or_load_sync("a", load)
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("wrong", 7),
        KeyError("k"),
        OSError(2, "no such file", "a.txt", None, "b.txt"),
        ConnectionRefusedError(111, "refused"),
        TimeoutError(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
        ImportError("no module", name="m", path="p"),
        StopAsyncIteration(3),
        SyntaxError("wrong", ("f", 1, 2, "text")),
        ExceptionGroup("several", [ValueError(1), KeyError("k")]),
        WithState("db-1", attempt=3),
        NotDelivered("not delivered", reasons=(("redis", "refused"),), report=None, is_pending=True),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_copy_has_the_type_text_arguments_attributes_and_notes(error: Exception) -> None:
    error.add_note("while loading a product")
    error.__cause__ = OSError("cause")
    own = copied(error)
    assert own is not None
    assert own is not error
    assert (type(own), own.args, str(own), repr(own)) == (type(error), error.args, str(error), repr(error))
    assert (own.__dict__, own.__cause__, own.__traceback__) == (error.__dict__, error.__cause__, None)
    for name in (
        "errno",
        "filename",
        "filename2",
        "reason",
        "name",
        "path",
        "value",
        "lineno",
        "exceptions",
        "attempt",
    ):
        assert getattr(own, name, None) == getattr(error, name, None)
    own.add_note("and another one")
    assert error.__notes__ == ["while loading a product"]
