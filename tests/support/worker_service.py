"""A service of several workers, behind a server that people run: gunicorn, uvicorn, or Celery."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2
from tests.support.paths import ROOT
from tests.support.waiting import until

from broadcache.shared.transport.redis.embedded import dying_with_us

WORKERS: Final = 3
TOKEN: Final = "swordfish"
_CALLS_AT_ONCE: Final = 4 * WORKERS
_LISTENING: Final = re.compile(rb"(?:Listening at|running on):? (?:http://)?127\.0\.0\.1:(\d+)")
_APPS: Final = "tests.support.worker_apps"


@dataclass
class WorkerService:
    """Its workers, each of which answers `call`, and `end_one` of which ends in order: the given one, if it may choose.

    Shape:  `master_pid` is the process that was started. `source` has the value that the workers load. `port` is where
            they are called; 0 if not by HTTP. `processes` is how many can answer.
    """

    master_pid: int
    source: Path
    call: Callable[[], Awaitable[dict[str, Any]]]
    end_one: Callable[[int], Awaitable[object]]
    port: int = 0
    processes: int = WORKERS

    async def answers(self) -> dict[int, dict[str, Any]]:
        """One answer of each worker that can answer, by its pid."""
        answers: dict[int, dict[str, Any]] = {}

        async def have_all_answered() -> bool:
            for answer in await asyncio.gather(*[self.call() for _ in range(_CALLS_AT_ONCE)]):
                answers[answer["pid"]] = answer
            return len(answers) >= self.processes

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
async def gunicorn(
    url: str, folder: Path, worker_class: str, *, preload: bool = True, at_path: bool = False, **environment: str
) -> AsyncIterator[WorkerService]:
    """gunicorn; its ASGI workers are started by their lifespans, the others where the module is imported."""
    app = "asgi" if "uvicorn" in worker_class else "wsgi"
    bind = f"unix:{folder / 'service'}" if at_path else "127.0.0.1:0"
    options = [*(["--preload"] if preload else []), "--workers", str(WORKERS), "--worker-class", worker_class]
    options += ["--bind", bind, "--graceful-timeout", "5", "--no-control-socket"]
    if worker_class == "gthread":  # else one of them may take all calls
        options += ["--worker-connections", str(_CALLS_AT_ONCE // WORKERS)]
    command = ["gunicorn", *options, f"{_APPS}:{app}"]
    async with _http(url, folder, command, at_path=at_path, environment=environment) as service:
        yield service


@asynccontextmanager
async def uvicorn(url: str, folder: Path, *, at_path: bool = False, **environment: str) -> AsyncIterator[WorkerService]:
    """uvicorn, which spawns its workers."""
    bind = ["--uds", str(folder / "service")] if at_path else ["--host", "127.0.0.1", "--port", "0"]
    command = ["uvicorn", "--workers", str(WORKERS), *bind, f"{_APPS}:asgi"]
    async with _http(url, folder, command, at_path=at_path, environment=environment) as service:
        yield service


@asynccontextmanager
async def celery(url: str, folder: Path, *, pool: str = "prefork") -> AsyncIterator[WorkerService]:
    """A pool of Celery, of processes or threads; the subscriber is started in its main process."""
    import celery as library  # type: ignore[import-untyped]

    source = folder / "source"
    source.write_text("first")
    client = library.Celery(broker=url, backend=url)
    options = ["--pool", pool, "--concurrency", str(WORKERS), "-O", "fair", "--without-mingle", "--without-gossip"]
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
            yield WorkerService(pid, source, call, end_one, processes=WORKERS if pool == "prefork" else 1)
        finally:
            client.close()


@asynccontextmanager
async def _http(
    url: str, folder: Path, command: list[str], *, at_path: bool, environment: dict[str, str]
) -> AsyncIterator[WorkerService]:
    source, output = folder / "source", folder / "output"
    source.write_text("first")
    async with _started(command, url, source, output, environment) as pid, AsyncExitStack() as stack:
        if at_path:
            port = await stack.enter_async_context(_proxy(folder / "service"))
        else:
            await until(lambda: _LISTENING.search(output.read_bytes()), f"a port of {command[0]}")
            found = _LISTENING.search(output.read_bytes())
            assert found is not None
            port = int(found[1])

        async def listens() -> bool:  # uvicorn's workers do, some time after the port is known
            try:
                if at_path:
                    _, writer = await asyncio.open_unix_connection(folder / "service")
                else:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
            except (ConnectionRefusedError, FileNotFoundError):
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
async def _proxy(path: Path) -> AsyncIterator[int]:
    """A proxy in front of a service with a Unix socket: its port."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(65_536):
                writer.write(chunk)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_unix_connection(path)
        except OSError:
            writer.close()
            return
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port: int = server.sockets[0].getsockname()[1]
        yield port


@asynccontextmanager
async def _started(
    command: list[str], url: str, source: Path, output: Path, more: dict[str, str] | None = None
) -> AsyncIterator[int]:
    environment = {**os.environ, "REDIS": url, "SOURCE": str(source), "PYTHONUNBUFFERED": "1", **(more or {})}
    environment["BROADCACHE_REPLICA_TOKEN"] = TOKEN
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
