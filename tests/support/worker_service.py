"""A service of several workers, behind a server that people run: gunicorn, uvicorn, or Celery's prefork pool."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2
from tests.support.paths import ROOT
from tests.support.waiting import until

from broadcache.shared.transport.redis.embedded import dying_with_us

WORKERS: Final = 3
_CALLS_AT_ONCE: Final = 4 * WORKERS
_LISTENING: Final = re.compile(rb"(?:Listening at|running on):? (?:http://)?127\.0\.0\.1:(\d+)")
_APPS: Final = "tests.support.worker_apps"


@dataclass
class WorkerService:
    """Its workers, each of which answers `call`, and `end_one` of which ends in order: the given one, if it may choose.

    Shape:  `master_pid` is the process that was started. `source` has the value that the workers load. `port` is where
            they are called; 0 if not by HTTP.
    """

    master_pid: int
    source: Path
    call: Callable[[], Awaitable[dict[str, Any]]]
    end_one: Callable[[int], Awaitable[object]]
    port: int = 0

    async def answers(self) -> dict[int, dict[str, Any]]:
        """One answer of each worker that can answer, by its pid."""
        answers: dict[int, dict[str, Any]] = {}

        async def have_all_answered() -> bool:
            for answer in await asyncio.gather(*[self.call() for _ in range(_CALLS_AT_ONCE)]):
                answers[answer["pid"]] = answer
            return len(answers) >= WORKERS

        await until(have_all_answered, "an answer of each worker")
        return answers

    async def coherent_answers(self) -> dict[int, dict[str, Any]]:
        """The same, when all workers are coherent."""
        answers: dict[int, dict[str, Any]] = {}

        async def are_coherent() -> bool:
            answers.clear()
            answers.update(await self.answers())
            return {each["state"] for each in answers.values()} == {"coherent"}

        await until(are_coherent, "coherence of all workers")
        return answers


@asynccontextmanager
async def gunicorn(url: str, folder: Path, worker_class: str) -> AsyncIterator[WorkerService]:
    """gunicorn with `--preload`; one of its ASGI workers is started by the lifespan, the others in the master."""
    app = "asgi" if "uvicorn" in worker_class else "wsgi"
    options = ["--preload", "--workers", str(WORKERS), "--worker-class", worker_class, "--bind", "127.0.0.1:0"]
    options += ["--graceful-timeout", "5", "--no-control-socket"]
    async with _http(url, folder, ["gunicorn", *options, f"{_APPS}:{app}"]) as service:
        yield service


@asynccontextmanager
async def uvicorn(url: str, folder: Path) -> AsyncIterator[WorkerService]:
    """uvicorn, which spawns its workers."""
    command = ["uvicorn", "--workers", str(WORKERS), "--host", "127.0.0.1", "--port", "0", f"{_APPS}:asgi"]
    async with _http(url, folder, command) as service:
        yield service


@asynccontextmanager
async def celery(url: str, folder: Path) -> AsyncIterator[WorkerService]:
    """Celery's prefork pool; the subscriber is started in its main process."""
    import celery as library  # type: ignore[import-untyped]

    source = folder / "source"
    source.write_text("first")
    client = library.Celery(broker=url, backend=url)
    options = ["--pool", "prefork", "--concurrency", str(WORKERS), "-O", "fair", "--without-mingle", "--without-gossip"]
    command = ["celery", "--app", f"{_APPS}:celery_app", "worker", *options, "--loglevel", "WARNING"]

    async def call() -> dict[str, Any]:
        # All from this one thread, and without the client's own waiting: several threads may not share that.
        task = client.send_task("read").id
        meta: dict[str, Any] = {}

        def has_ended() -> bool:
            meta.update(client.backend.get_task_meta(task, cache=False))
            return bool(meta["status"] == "SUCCESS")

        await until(has_ended, "the end of a task")
        answer: dict[str, Any] = meta["result"]
        return answer

    async def end_one(_: int) -> None:
        client.send_task("end")

    async with _started(command, url, source, folder / "output") as pid:
        try:
            yield WorkerService(pid, source, call, end_one)
        finally:
            client.close()


@asynccontextmanager
async def _http(url: str, folder: Path, command: list[str]) -> AsyncIterator[WorkerService]:
    source, output = folder / "source", folder / "output"
    source.write_text("first")
    async with _started(command, url, source, output) as pid:
        await until(lambda: _LISTENING.search(output.read_bytes()), f"a port of {command[0]}")
        found = _LISTENING.search(output.read_bytes())
        assert found is not None
        port = int(found[1])

        async def listens() -> bool:  # uvicorn's workers do, some time after the port is known
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                return False
            writer.close()
            return True

        await until(listens, f"the workers of {command[0]}")

        async def call() -> dict[str, Any]:
            # A connection for each call: a kept one would lead to one worker.
            async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=15, trust_env=False) as client:
                answer: dict[str, Any] = (await client.get("/")).raise_for_status().json()
                return answer

        async def end_one(pid: int) -> None:
            os.kill(pid, signal.SIGTERM)

        yield WorkerService(pid, source, call, end_one, port)


@asynccontextmanager
async def _started(command: list[str], url: str, source: Path, output: Path) -> AsyncIterator[int]:
    environment = {**os.environ, "REDIS": url, "SOURCE": str(source), "PYTHONUNBUFFERED": "1"}
    with output.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *dying_with_us((sys.executable, "-m", *command)), cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    try:
        yield process.pid
    except BaseException:
        sys.stderr.write(output.read_text(errors="replace")[-4_000:])  # noqa: ASYNC240
        raise
    finally:
        for pid in _children_of(process.pid):  # one that a test has frozen would not end
            os.kill(pid, signal.SIGCONT)
        process.terminate()
        try:
            async with asyncio.timeout(15):
                await process.wait()
        except TimeoutError:
            for pid in (*_children_of(process.pid), process.pid):
                os.kill(pid, signal.SIGKILL)
            await process.wait()


def _children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for children in tasks.glob("*/children") for child in children.read_text().split()]
