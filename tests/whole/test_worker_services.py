"""Services of several workers, as people run them: what is said about replicas is compared with what the test knows."""

import asyncio
import json
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
from tests.support.worker_apps import BOUND_SECONDS, KEY, NAMESPACE
from tests.support.worker_service import WORKERS, WorkerService

from broadcache.publisher import Confirm, Publisher
from broadcache.shared import Keys
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.registry import registered

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; forks")]

Started = Callable[[str, Path], AbstractAsyncContextManager[WorkerService]]

SERVICES: dict[str, tuple[Started, bool]] = {
    "gunicorn-sync": (lambda url, folder: worker_service.gunicorn(url, folder, "sync"), True),
    "gunicorn-gthread": (lambda url, folder: worker_service.gunicorn(url, folder, "gthread"), True),
    "gunicorn-uvicorn": (
        lambda url, folder: worker_service.gunicorn(url, folder, "uvicorn.workers.UvicornWorker"),
        False,
    ),
    "uvicorn": (worker_service.uvicorn, False),
    "celery": (worker_service.celery, True),
}
"""How each is started, and whether its main process is a replica as well."""


@pytest.mark.timeout(180)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("name", SERVICES)
async def test_what_is_said_about_the_workers_is_true(name: str, own_server: EmbeddedServer, tmp_path: Path) -> None:
    start, has_master = SERVICES[name]
    async with start(own_server.url, tmp_path) as service, Publisher(own_server.url) as publisher:
        answers = await service.coherent_answers()
        ids = {pid: answer["replica"] for pid, answer in answers.items()}
        assert len(set(ids.values())) == WORKERS, "each worker has an id of its own"
        assert {answer["value"] for answer in answers.values()} == {"first"}

        # The listing.
        listed = {each.pid: each.replica for each in await publisher.replicas(NAMESPACE)}
        masters = set(listed) - set(ids)
        assert {pid: listed[pid] for pid in ids} == ids
        assert masters == ({service.master_pid} if has_master else set())
        everyone = set(listed.values())

        # A receipt and its confirmation.
        async def is_confirmed_by_all() -> bool:
            service.source.write_text("second")
            receipt = await publisher.publish(Keys(KEY), namespace=NAMESPACE, confirm=Confirm(timeout_seconds=5))
            assert receipt.receivers == len(everyone)
            assert receipt.confirmation is not None
            assert {each.replica for each in receipt.confirmation.replicas} == everyone
            if receipt.confirmation.missing:  # a worker was slow
                assert not receipt.confirmation.is_complete
            # Not before the registry is older than the longest lease.
            return receipt.confirmation.is_complete

        await until(is_confirmed_by_all, "a complete confirmation")
        assert {answer["value"] for answer in (await service.answers()).values()} == {"second"}

        # The doctor.
        assert await verdict_of_doctor(own_server.url) == {"severity": "ok", "replicas": len(everyone)}

        # One worker is frozen.
        frozen = next(iter(ids))
        os.kill(frozen, signal.SIGSTOP)
        await until(lambda: stands_still(frozen), "a standstill")
        receipt = await publisher.publish(Keys(KEY), namespace=NAMESPACE, confirm=Confirm(timeout_seconds=3))
        os.kill(frozen, signal.SIGCONT)
        assert receipt.confirmation is not None
        assert receipt.confirmation.missing == (ids[frozen],)
        assert not receipt.confirmation.is_complete
        await until(lambda: is_listed(publisher, everyone), "the frozen worker's return")

        # One worker ends in order: it alone is deregistered, at once, and not when its lease ends.
        seen_left_ms: dict[str, int] = {}

        async def is_gone() -> bool:
            left_ms = (await registered(await publisher._calls.link(NAMESPACE), NAMESPACE)).left_ms
            gone = everyone - set(left_ms)
            seen_left_ms.update({id: left for id, left in left_ms.items() if id in everyone})
            assert len(gone) <= 1
            return gone <= set(ids.values()) and len(gone) == 1 and expects(gone)

        def expects(gone: set[str]) -> bool:
            [id] = gone
            assert seen_left_ms[id] > BOUND_SECONDS * 1_000 / 4, "it was removed, and did not expire"
            return True

        await is_gone()
        await service.end_one(next(pid for pid in ids if pid != frozen))
        await until(is_gone, "the end of one worker")
    async with Publisher(own_server.url) as publisher:
        assert await publisher.replicas(NAMESPACE) == [], "the service has ended, and all its replicas have left"


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
async def test_the_threads_of_a_celery_worker_are_one_replica(own_server: EmbeddedServer, tmp_path: Path) -> None:
    async with (
        worker_service.celery(own_server.url, tmp_path, pool="threads") as service,
        Publisher(own_server.url) as publisher,
    ):
        [(pid, answer)] = (await service.coherent_answers()).items()
        assert (pid, answer["value"]) == (service.master_pid, "first")
        [listed] = await publisher.replicas(NAMESPACE)
        assert (listed.replica, listed.pid) == (answer["replica"], pid)

        async def is_confirmed() -> bool:
            service.source.write_text("second")
            receipt = await publisher.publish(Keys(KEY), namespace=NAMESPACE, confirm=Confirm(timeout_seconds=5))
            assert receipt.receivers == 1
            assert receipt.confirmation is not None
            assert [each.replica for each in receipt.confirmation.replicas] == [listed.replica]
            return receipt.confirmation.is_complete

        await until(is_confirmed, "a complete confirmation")
        assert {each["value"] for each in (await service.answers()).values()} == {"second"}
        assert await verdict_of_doctor(own_server.url) == {"severity": "ok", "replicas": 1}

        os.kill(pid, signal.SIGSTOP)
        await until(lambda: stands_still(pid), "a standstill")
        receipt = await publisher.publish(Keys(KEY), namespace=NAMESPACE, confirm=Confirm(timeout_seconds=1))
        os.kill(pid, signal.SIGCONT)
        assert receipt.confirmation is not None
        assert (receipt.confirmation.missing, receipt.confirmation.is_complete) == ((listed.replica,), False)


def stands_still(pid: int) -> bool:
    """Whether each thread of a process has stopped: the signal reaches one after another."""
    states = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}


async def is_listed(publisher: Publisher, ids: set[str]) -> bool:
    found = {each.replica for each in await publisher.replicas(NAMESPACE) if each.state == "coherent"}
    return ids <= found


async def verdict_of_doctor(url: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "broadcache", "doctor", "--json", "--namespace", NAMESPACE),
        env={**os.environ, "BROADCACHE_REDIS_URL": url},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    [finding] = [each for each in json.loads(output)["findings"] if each["check"] == "replicas"]
    return {"severity": finding["severity"], **finding["measured"]}
