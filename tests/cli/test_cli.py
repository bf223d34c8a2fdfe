"""The command line: what it prints, where, and with which exit code it ends."""

import asyncio
import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tests.support.command_line import ask, descendants, environment, is_alive, run, running
from tests.support.tcp_proxy import TcpProxy
from typer.testing import CliRunner

from broadcache import __version__
from broadcache.cli import main
from broadcache.cli.app import app
from broadcache.cli.watch_printer import JsonPrinter, TextPrinter
from broadcache.publisher import Publisher
from broadcache.shared import Keys, MalformedFrame
from broadcache.shared.transport.redis.embedded import EmbeddedServer

InThisProcess = Callable[..., tuple[int, str, str]]
HEAVY = {"aiohttp", "cachetools", "fastapi", "redis", "uvicorn"}


class Containing(str):
    """Equal to every text that it is part of."""

    def __eq__(self, text: object) -> bool:
        return isinstance(text, str) and str(self) in text

    __hash__ = str.__hash__


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InThisProcess:
    """Runs a command that is over soon without a process of its own; returns code, standard output and error."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.setattr(sys, "argv", ["broadcache", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output, errors = capsys.readouterr()
        return int(ended.value.code or 0), output, errors

    return command


def test_the_version_is_that_of_the_package() -> None:
    finished = run("--version")
    assert (finished.returncode, finished.stdout) == (0, f"broadcache {__version__}\n")


@pytest.mark.parametrize("command", ["serve", "publish", "watch", "replicas", "doctor", "fanout", "replica", "demo"])
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "120", "TERM": "dumb"})
    assert result.exit_code == 0
    assert "Usage" in result.output
    assert command in CliRunner().invoke(app, ["--help"]).output


def test_the_commands_load_what_they_need_only_when_they_run() -> None:
    program = "import broadcache.cli.app, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert HEAVY & set(finished.stdout.split()) == set()


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("typer", ["--help"], "cli"),
        ("fastapi", ["serve"], "publisher"),
        ("uvicorn", ["replica", "--source", "catalogue.sqlite"], "publisher"),
        ("aiohttp", ["demo", "--once"], "demo"),
    ],
)
def test_a_missing_package_is_answered_with_the_extra_to_install(module: str, arguments: list[str], extra: str) -> None:
    program = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv[1:] = {arguments!r}\n"
        "from broadcache.cli import main\nmain()"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment()
    )
    assert finished.returncode == 2
    assert f"pip install 'broadcache[{extra}]'" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("service", "arguments"),
    [("publisher", ["serve", "--fanout-only", "--port", "0"]), ("replica", ["replica", "--port", "0", "--source"])],
)
def test_a_service_without_the_metrics_library_logs_that_and_the_extra(
    service: str, arguments: list[str], tmp_path: Path
) -> None:
    if service == "replica":
        arguments = [*arguments, str(tmp_path / "catalogue.sqlite"), "--redis-url", "redis://127.0.0.1:1"]
    program = (
        "import importlib.util, sys\n"
        "find_spec = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *_: None if name == 'prometheus_client' else find_spec(name, *_)\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "from broadcache.cli import main\nmain()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            assert process.stderr is not None
            line = next((line for line in process.stderr if "/metrics" in line), "")
            assert f"{service} " in line
            assert "has no GET /metrics: prometheus_client is not installed" in line
            assert "pip install 'broadcache[metrics]'" in line
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "at least one of --key, --tag, --prefix or --everything"),
        (["--key", "a", "--everything"], "expected Everything() alone"),
        (["--key", ""], "not empty"),
        (["--key", "a", "--namespace", "no such name"], "expected a namespace"),
        (["--key", "a", "--redis-url", "http://127.0.0.1"], "expected a URL such as redis://"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_a_publish_typed_wrongly_ends_with_2(
    arguments: list[str], complaint: str, in_this_process: InThisProcess
) -> None:
    assert in_this_process("publish", *arguments) == (2, "", Containing(complaint))


def test_a_publish_that_redis_does_not_take_ends_with_1_and_says_why() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{closed.getsockname()[1]}"
        finished = run("publish", "--key", "product:42", "--redis-url", url, "--timeout-seconds", "0.3")
    assert finished.returncode == 1
    assert "Redis could not be reached within 0.3 s, and nothing was logged" in finished.stderr
    assert finished.stdout == ""


def test_a_publish_answers_one_line_for_people_or_the_fields_of_the_api_for_scripts(redis_url: str) -> None:
    for_people = run("publish", "-n", "products", "--everything", BROADCACHE_REDIS_URL=redis_url)
    assert for_people.returncode == 0
    assert "to products at 1 of epoch" in for_people.stdout
    assert "receivers: 0 (subscribed connections; no proof that they applied it)" in for_people.stdout

    for_scripts = run("publish", "-n", "products", "--tag", "a", "--tag", "b", "--json", "--redis-url", redis_url)
    answer = json.loads(for_scripts.stdout)
    assert set(answer) == {"id", "namespace", "epoch", "sequence", "receivers", "logged", "pending", "fanout"}
    assert (answer["namespace"], answer["sequence"], answer["receivers"]) == ("products", 2, 0)


def test_watch_shows_invalidations_of_every_publisher(valkey_server: EmbeddedServer, redis_url: str) -> None:
    with running("watch", "--namespace", "products", "--json", "--redis-url", redis_url) as watch:
        watch.complain("watching cache-invalidation:products")
        answer = json.loads(run("publish", "-n", "products", "--key", "a", "--json", "--redis-url", redis_url).stdout)
        _publish_by_hand(valkey_server, "cache-invalidation:products", '{"keys":["b"]}')
        _publish_by_hand(valkey_server, "cache-invalidation:products", "now")
        logged, unsequenced, unreadable = (json.loads(watch.stdout.readline()) for _ in range(3))

    assert answer["receivers"] == 1
    assert logged["kind"] == unsequenced["kind"] == "invalidation"
    assert {name: logged[name] for name in ("id", "epoch", "sequence", "keys")} == {
        **{name: answer[name] for name in ("id", "epoch", "sequence")},
        "keys": ["a"],
    }
    assert (unsequenced["keys"], unsequenced["epoch"], unsequenced["sequence"]) == (["b"], None, None)
    assert (unreadable["kind"], unreadable["frame"]) == ("unreadable", "now")
    assert "invalid frame" in unreadable["error"]


def test_watch_for_people_escapes_what_a_terminal_would_obey(valkey_server: EmbeddedServer, redis_url: str) -> None:
    with running("watch", "--redis-url", redis_url) as watch:
        watch.complain("watching cache-invalidation at")
        _publish_by_hand(valkey_server, "cache-invalidation", json.dumps({"keys": ["\x1b[2J[red]"], "reason": "\n"}))
        _publish_by_hand(valkey_server, "cache-invalidation", "now")
        line, unreadable = watch.stdout.readline(), watch.stdout.readline()
    assert r"unsequenced  keys \x1b[2J[red]  “\n”  from an unknown source" in line
    assert "unreadable  replicas drop everything" in unreadable


def test_watch_says_that_the_link_is_lost_and_goes_on_when_the_server_is_back(own_server: EmbeddedServer) -> None:
    with running("watch", "-n", "products", "--json", "--redis-url", own_server.url) as watch:
        watch.complain("watching")
        own_server.kill()
        watch.complain("no link to Redis, retrying")
        own_server.restart()
        watch.complain("reconnected")
        _publish(own_server.url)
        assert json.loads(watch.stdout.readline())["keys"] == ["product:42"]


def test_watch_waits_for_a_server_that_is_not_there_yet(own_server: EmbeddedServer) -> None:
    own_server.kill()
    with running("watch", "-n", "products", "--json", "--redis-url", own_server.url) as watch:
        watch.complain("no link")
        own_server.restart()
        watch.complain("watching")
        _publish(own_server.url)
        assert json.loads(watch.stdout.readline())["keys"] == ["product:42"]


def test_watch_since_shows_what_was_logged_and_goes_on_live_without_a_hole(redis_url: str) -> None:
    run("publish", "-n", "products", "--key", "too-old", "--redis-url", redis_url)
    since = datetime.now(UTC)
    _publish(redis_url, *(f"logged-{number}" for number in range(150)))
    with running("watch", "-n", "products", "--json", "--redis-url", redis_url, "--since", since.isoformat()) as watch:
        _publish(redis_url, *(f"live-{number}" for number in range(150)))
        shown = [json.loads(watch.stdout.readline()) for _ in range(300)]
    assert [line["keys"][0] for line in shown] == [
        f"{when}-{number}" for when in ("logged", "live") for number in range(150)
    ]


def test_watch_since_says_so_when_the_log_does_not_reach_back(valkey_server: EmbeddedServer, redis_url: str) -> None:
    _publish(redis_url, "a", "b", "c")
    _send(valkey_server, "XTRIM", "{cache-invalidation:products}:log", "MAXLEN", "1")
    with running("watch", "-n", "products", "--redis-url", redis_url, "--since", "15m") as watch:
        gap, shown = watch.stdout.readline(), watch.stdout.readline()
    assert "gap  invalidations may be missing here" in gap
    assert "back to sequence 3 only" in gap
    assert "keys c" in shown


def test_a_watch_since_an_unknown_time_ends_with_2(in_this_process: InThisProcess) -> None:
    assert in_this_process("watch", "--since", "lunch") == (2, "", Containing("expected a time such as"))


def test_watch_shows_what_was_logged_while_the_link_was_lost(valkey_server: EmbeddedServer, redis_url: str) -> None:
    with (
        _relay_to(valkey_server.port) as relay,
        running("watch", "-n", "products", "--json", "--redis-url", f"redis://127.0.0.1:{relay.port}") as watch,
    ):
        watch.complain("watching")
        _publish(redis_url, "before")
        assert json.loads(watch.stdout.readline())["keys"] == ["before"]
        relay.refuse_and_cut()
        watch.complain("no link")
        _publish(redis_url, "meanwhile-1", "meanwhile-2")
        relay.accept()
        watch.complain("invalidations logged meanwhile come first")
        _publish(redis_url, "after")
        shown = [json.loads(watch.stdout.readline())["keys"] for _ in range(3)]
    assert shown == [["meanwhile-1"], ["meanwhile-2"], ["after"]]


def test_watch_says_that_the_log_cannot_tell_what_was_lost_with_it(own_server: EmbeddedServer) -> None:
    with running("watch", "-n", "products", "--json", "--redis-url", own_server.url) as watch:
        watch.complain("watching")
        _publish(own_server.url, "before")
        assert json.loads(watch.stdout.readline())["keys"] == ["before"]
        own_server.kill()
        watch.complain("no link")
        own_server.restart()
        watch.complain("reconnected")
        gap = json.loads(watch.stdout.readline())
        assert (gap["kind"], gap["reason"]) == ("gap", "log-lost")
        _publish(own_server.url, "after")
        assert json.loads(watch.stdout.readline())["keys"] == ["after"]


def test_ctrl_c_ends_watch_with_130_and_no_traceback(redis_url: str) -> None:
    with running("watch", "--redis-url", redis_url) as watch:
        watch.complain("watching")
        assert watch.end(signal.SIGINT) == (130, "")


def test_watch_ends_when_its_reader_is_gone_without_waiting_for_a_message(redis_url: str) -> None:
    with running("watch", "--redis-url", redis_url) as watch:
        watch.complain("watching")
        watch.stdout.close()
        assert watch.wait() == (0, "")


@pytest.mark.parametrize("printer", [TextPrinter, JsonPrinter])
def test_a_message_without_a_reader_is_a_broken_pipe(
    printer: type[TextPrinter | JsonPrinter], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    output = open(writer, "w")  # noqa: PTH123, SIM115
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(BrokenPipeError):
        printer("products").on_unreadable(b"now", MalformedFrame("invalid frame"))
    with contextlib.suppress(BrokenPipeError):
        output.close()


def test_serve_with_an_embedded_server_publishes_and_takes_the_server_along_when_it_ends() -> None:
    with running("serve", "--embedded", "--port", "0") as serve:
        url = serve.url()
        status, answer = ask("POST", f"{url}/invalidations", {"namespace": "products", "keys": ["product:42"]})
        assert (status, answer["namespace"], answer["sequence"]) == (200, "products", 1)
        started = descendants(serve.pid)
        code, _ = serve.end(signal.SIGTERM)
        assert code == 0
        assert [pid for pid in started if is_alive(pid)] == []


def test_serve_takes_tokens_from_its_options(redis_url: str) -> None:
    with running(
        "serve", "--port", "0", "--redis-url", redis_url, "--token", "a-secret-of-32-characters-0000001"
    ) as serve:
        url = f"{serve.url()}/invalidations"
        assert ask("POST", url, {"keys": ["a"]})[0] == 401
        assert ask("POST", url, {"keys": ["a"]}, Authorization="Bearer a-secret-of-32-characters-0000001")[0] == 200


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--host", "0.0.0.0"], "loopback"),
        (["--embedded", "--redis-url", "redis://127.0.0.1"], "got both"),
        (["--port", "65536"], "--port"),
    ],
)
def test_a_serve_that_must_not_start_ends_with_2(
    arguments: list[str], complaint: str, in_this_process: InThisProcess
) -> None:
    assert in_this_process("serve", *arguments) == (2, "", Containing(complaint))


@pytest.mark.parametrize("command", ["serve", "replica"])
def test_a_taken_port_ends_a_service_with_1(command: str, tmp_path: Path) -> None:
    arguments = ["--source", f"{tmp_path}/catalogue.sqlite"] if command == "replica" else []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        finished = run(command, "--port", str(port), *arguments)
    assert finished.returncode == 1
    assert f"127.0.0.1 port {port}" in finished.stderr
    assert "Traceback" not in finished.stderr


def _publish(url: str, *keys: str) -> None:
    async def publish() -> None:
        async with Publisher(url) as publisher:
            for key in keys or ("product:42",):
                await publisher.publish(Keys(key), namespace="products")

    asyncio.run(publish())


def _publish_by_hand(server: EmbeddedServer, channel: str, message: str) -> None:
    """What `redis-cli PUBLISH` does."""
    assert _send(server, "PUBLISH", channel, message) == b":1\r\n"


def _send(server: EmbeddedServer, *parts: str) -> bytes:
    command = f"*{len(parts)}\r\n" + "".join(f"${len(part.encode())}\r\n{part}\r\n" for part in parts)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(command.encode())
        return connection.recv(64)


class _Relay:
    """A TcpProxy in an event loop of its own, for a test that waits for a process."""

    def __init__(self, proxy: TcpProxy) -> None:
        self.port = proxy.port
        self._proxy = proxy
        self._loop = asyncio.get_running_loop()
        self._has_ended = asyncio.Event()

    async def until_ended(self) -> None:
        await self._has_ended.wait()

    def refuse_and_cut(self) -> None:
        self._do(self._proxy.refuse())
        self._do(self._proxy.cut())

    def accept(self) -> None:
        self._do(self._proxy.accept())

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._has_ended.set)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=20)


@contextlib.contextmanager
def _relay_to(port: int) -> Iterator[_Relay]:
    relays: queue.Queue[_Relay] = queue.Queue()

    async def relay() -> None:
        async with TcpProxy("127.0.0.1", port) as proxy:
            started = _Relay(proxy)
            relays.put(started)
            await started.until_ended()

    thread = threading.Thread(target=lambda: asyncio.run(relay()))
    thread.start()
    started = relays.get(timeout=20)
    try:
        yield started
    finally:
        started.end()
        thread.join()
