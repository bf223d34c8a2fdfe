"""How many `POST /invalidations` the API answers in a second, under 64 clients that keep their connections.

Ours and two bare FastAPI routes, each in its own process with the same uvicorn settings, take turns. The barest route
publishes the raw body with one `await redis.publish`; the other first parses it into a pydantic model. Ours checks the
request, assigns an id, and logs and publishes the invalidation atomically. A fourth process is ours with the fan-out
allowed, whose requests may have any method. The clients are one more process, which does the minimum that HTTP/1.1
allows. A round is 3,000 requests each.

On few cores server, clients and Redis compete: requests per second of the server process's CPU time is the fair figure;
the wall-clock figure is shown beside it.
"""

import asyncio
import threading
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from benchmarks.harness import Effort, Limit, Measure, Row, Stopwatch, Taken, answer, child, compare, take_turns
from broadcache.publisher.api.app import create_app
from broadcache.publisher.api.server import new_server
from broadcache.publisher.api.settings import ApiSettings
from broadcache.shared.process.serving import listen
from broadcache.shared.transport.redis.embedded import EmbeddedServer

if TYPE_CHECKING:
    from fastapi import FastAPI

CLIENTS: Final = 64
_CHANNEL: Final = "cache-invalidation:products"
_BODY: Final = b'{"namespace":"products","keys":["product:42"],"reason":"price change"}'
_REQUEST: Final = (
    b"POST /invalidations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)

Route: TypeAlias = Literal["ours", "ours with fan-out", "raw", "model"]
_FANOUT: Final[Route] = "ours with fan-out"
_PEERS: Final[dict[Route, str]] = {
    "raw": "bare FastAPI route, body unread",
    "model": "bare FastAPI route, pydantic",
}


def run(effort: Effort) -> list[Row]:
    requests = effort.pick(full=3_000, quick=640)
    routes: tuple[Route, ...] = ("ours", _FANOUT, *_PEERS)
    taken: dict[str, list[Taken]] = {route: [] for route in routes}
    with EmbeddedServer() as redis, ExitStack() as stack:
        pipes = {route: stack.enter_context(child(serve, redis.url, route)) for route in routes}
        ports: dict[str, int] = {route: answer(pipe) for route, pipe in pipes.items()}

        def measure(route: Route) -> float:
            pipes[route].send("begin")
            answer(pipes[route])
            asyncio.run(_post_all(ports[route], requests))
            pipes[route].send("end")
            taken[route].append(Taken(*answer(pipes[route])))
            return 0.0

        contestants = {route: partial(measure, route) for route in routes}
        take_turns(contestants, rounds=1)  # connections to Redis, and the interpreter's own warming up
        for each in taken.values():
            each.clear()
        take_turns(contestants, rounds=effort.pick(full=9, quick=2))

    def row(what: str, ours: Route, peer: Route, measure: Measure, limit: Limit | None) -> Row:
        figures = {
            route: [requests / (each.cpu if measure == "CPU" else each.wall) for each in taken[route]]
            for route in (ours, peer)
        }
        peer_name = _PEERS.get(peer, "without the fan-out")
        return compare(what, figures[ours], peer_name, figures[peer], unit="/s", measure=measure, limit=limit)

    what = f"POST /invalidations, {CLIENTS} clients"
    nine_tenths = Limit("≥", 0.9)
    return [
        row(what, "ours", "raw", "CPU", nine_tenths),
        row(what, "ours", "raw", "wall", nine_tenths),
        row(what, "ours", "model", "CPU", None),
        row(what, "ours", "model", "wall", None),
        row(f"{what}, fan-out allowed", _FANOUT, "ours", "CPU", nine_tenths),
        row(f"{what}, fan-out allowed", _FANOUT, "ours", "wall", None),
    ]


async def _post_all(port: int, requests: int) -> None:
    async with asyncio.timeout(60), asyncio.TaskGroup() as clients:
        for _ in range(CLIENTS):
            clients.create_task(_post(port, requests // CLIENTS))


async def _post(port: int, requests: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(requests):
        writer.write(_REQUEST)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"expected 200, got {head.decode()}")
        length = head.lower().partition(b"content-length:")[2].split(None, 1)[0]
        await reader.readexactly(int(length))
    writer.close()
    await writer.wait_closed()


def serve(pipe: Connection, redis_url: str, route: Route) -> None:
    """Serve one of the routes until the pipe is closed; between `begin` and `end`, take the time."""
    settings = ApiSettings(redis_url=redis_url, fanout_allow=("replicas.test:8080",) if route == _FANOUT else ())
    app = create_app(settings) if route in ("ours", _FANOUT) else _bare_app(redis_url, route)
    with listen("127.0.0.1", 0) as listener:
        server = new_server(app, on_ready=lambda: pipe.send(listener.getsockname()[1]))

        def take_time() -> None:
            try:
                while True:
                    pipe.recv()
                    stopwatch = Stopwatch()
                    pipe.send("begun")
                    pipe.recv()
                    pipe.send(stopwatch.read())
            except EOFError:
                server.should_exit = True

        threading.Thread(target=take_time, daemon=True).start()
        server.run(sockets=[listener])


def _bare_app(redis_url: str, route: Route) -> "FastAPI":
    from fastapi import FastAPI, Request
    from pydantic import BaseModel
    from redis.asyncio import Redis

    class Message(BaseModel):
        namespace: str
        keys: list[str]
        reason: str = ""

    app = FastAPI()
    redis = Redis.from_url(redis_url)

    async def publish_unread(request: Request) -> dict[str, int]:
        return {"receivers": await redis.publish(_CHANNEL, await request.body())}

    async def publish_model(message: Message) -> dict[str, int]:
        return {"receivers": await redis.publish(_CHANNEL, message.model_dump_json())}

    app.add_api_route("/invalidations", publish_unread if route == "raw" else publish_model, methods=["POST"])
    return app
