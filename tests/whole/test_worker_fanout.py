"""Several workers behind one address: what a fan-out says of them is compared with what the test knows."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from tests.support import worker_service
from tests.support.waiting import until
from tests.support.worker_apps import KEY, NAMESPACE
from tests.support.worker_service import TOKEN, WORKERS, WorkerService
from tests.whole.test_worker_services import stands_still

from broadcache.publisher import Confirm, Fanout, Publisher
from broadcache.shared import Keys, NotDelivered, Receipt
from broadcache.shared.transport.redis.embedded import EmbeddedServer

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; forks"),
    pytest.mark.timeout(120),
]

Started = Callable[..., AbstractAsyncContextManager[WorkerService]]

_UVICORN = "uvicorn.workers.UvicornWorker"


def gunicorn(worker_class: str, *, preload: bool, at_path: bool = False) -> Started:
    def start(url: str, folder: Path, **environment: str) -> AbstractAsyncContextManager[WorkerService]:
        return worker_service.gunicorn(url, folder, worker_class, preload=preload, at_path=at_path, **environment)

    return start


SERVICES: dict[str, tuple[Started, bool]] = {
    "uvicorn": (worker_service.uvicorn, False),
    "uvicorn-unix-socket": (lambda *places, **more: worker_service.uvicorn(*places, at_path=True, **more), False),
    "gunicorn-sync": (gunicorn("sync", preload=False), False),
    "gunicorn-sync-preload": (gunicorn("sync", preload=True), True),
    "gunicorn-gthread": (gunicorn("gthread", preload=False), False),
    "gunicorn-gthread-preload": (gunicorn("gthread", preload=True), True),
    "gunicorn-gthread-unix-socket": (gunicorn("gthread", preload=False, at_path=True), False),
    "gunicorn-uvicorn": (gunicorn(_UVICORN, preload=False), False),
    "gunicorn-uvicorn-preload": (gunicorn(_UVICORN, preload=True), False),
}
"""How each is started, and whether its main process has a subscriber as well."""

_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")


def publisher_of(service: WorkerService) -> Publisher:
    """A publisher from which Redis is away: it reaches the workers by HTTP alone."""
    fanout = Fanout("web", service.port, addresses=[f"127.0.0.1:{service.port}"], token=TOKEN)
    return Publisher(None, delivery="fanout", fanout=fanout)


async def published(publisher: Publisher) -> Receipt:
    return await publisher.publish(Keys(KEY), namespace=NAMESPACE, confirm=Confirm(timeout_seconds=5))


async def values(service: WorkerService) -> dict[int, str]:
    return {pid: answer["value"] for pid, answer in (await service.answers()).items()}


@_warnings
@pytest.mark.parametrize("name", SERVICES)
async def test_each_worker_is_told_and_the_receipt_names_it(
    name: str, own_server: EmbeddedServer, tmp_path: Path
) -> None:
    start, has_master = SERVICES[name]
    async with start(own_server.url, tmp_path) as service, publisher_of(service) as publisher:
        ids = {pid: answer["replica"] for pid, answer in (await service.coherent_answers()).items()}
        assert set((await values(service)).values()) == {"first"}

        service.source.write_text("second")
        receipt = await published(publisher)
        report, confirmation = receipt.fanout, receipt.confirmation
        assert report is not None
        assert confirmation is not None
        assert (report.total, report.succeeded, report.complete, report.is_delivered) == (1, 1, True, True)
        [outcome] = report.outcomes
        told = {each.pid: each for each in outcome.processes}
        assert set(told) == {*ids, *({service.master_pid} if has_master else ())}
        assert {pid: told[pid].replicas for pid in ids} == {pid: (id,) for pid, id in ids.items()}
        assert {each.outcome for each in outcome.processes} == {"applied"}
        assert confirmation.is_complete
        assert set(confirmation.confirmed) == {replica for each in outcome.processes for replica in each.replicas}
        assert await values(service) == dict.fromkeys(ids, "second")

        # One is frozen: it is named, and the address has not applied it.
        frozen = next(iter(ids))
        service.source.write_text("third")
        os.kill(frozen, signal.SIGSTOP)
        try:
            await until(lambda: stands_still(frozen), "a standstill")
            answers = await failing(publisher)
        finally:
            os.kill(frozen, signal.SIGCONT)
        [unapplied] = [each for each in answers if each["error"] is not None]
        assert unapplied["pid"] == frozen
        assert {each["pid"] for each in answers} == set(told)
        await until(lambda: all_have(service, "third"), "the third value everywhere: the frozen one has it after all")

        # One is killed, and another starts in its place.
        os.kill(frozen, signal.SIGKILL)
        await until(lambda: is_replaced(service, frozen), "a new worker")
        service.source.write_text("fourth")
        receipt = await published(publisher)
        assert receipt.fanout is not None
        assert receipt.fanout.complete
        current = set(await values(service))
        assert current - {each.pid for each in receipt.fanout.outcomes[0].processes} == set()
        assert frozen not in {each.pid for each in receipt.fanout.outcomes[0].processes}
        assert await values(service) == dict.fromkeys(current, "fourth")


async def failing(publisher: Publisher) -> list[dict[str, Any]]:
    """Publish while a worker is frozen, until another one takes the request; return the processes it names."""
    found: list[dict[str, Any]] = []

    async def is_named() -> bool:
        with pytest.raises(NotDelivered) as caught:
            await published(publisher)
        report = caught.value.report
        assert report is not None
        assert (report.succeeded, report.failed) == (0, 1)
        [outcome] = report.outcomes
        assert not outcome.is_success
        found[:] = [{"pid": each.pid, "error": each.error} for each in outcome.processes]
        if found:  # else the frozen one has taken the request itself
            assert "process" in str(caught.value)
            assert "did not answer in time" in str(caught.value)
        return bool(found)

    await until(is_named, "a worker that answers")
    return found


async def all_have(service: WorkerService, value: str) -> bool:
    return set((await values(service)).values()) == {value}


async def is_replaced(service: WorkerService, pid: int) -> bool:
    now = {answer["pid"]: answer for answer in [await service.call() for _ in range(2 * WORKERS)]}
    return pid not in now and len(await values(service)) >= WORKERS


@_warnings
@pytest.mark.parametrize("name", ["uvicorn", "gunicorn-gthread"])
async def test_without_passing_on_one_of_three_is_told_and_the_receipt_says_one_of_one(
    name: str, own_server: EmbeddedServer, tmp_path: Path
) -> None:
    """The negative control."""
    start, _ = SERVICES[name]
    async with start(own_server.url, tmp_path, ALONE="1") as service, publisher_of(service) as publisher:
        await service.coherent_answers()
        assert set((await values(service)).values()) == {"first"}
        service.source.write_text("second")
        receipt = await published(publisher)
        assert receipt.fanout is not None
        assert (receipt.fanout.total, receipt.fanout.succeeded, receipt.fanout.is_delivered) == (1, 1, True)
        assert receipt.confirmation is not None
        assert receipt.confirmation.is_complete
        assert sorted((await values(service)).values()) == ["first", "first", "second"]
