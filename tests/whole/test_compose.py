"""The image and the compose file, as far as that can be said without an engine to run them."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from tests.support.paths import ROOT

from broadcache.cli.app import app
from broadcache.publisher.api.settings import ApiSettings
from broadcache.shared.process.settings import read_settings
from broadcache.subscriber.endpoint.replica_token import replica_tokens

SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
OURS = ("publisher", "replica")
HEALTHY = ROOT / "deploy/healthy"
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    .replace("\\\n", "")
    .splitlines()
    if line
]
LAST_STAGE = INSTRUCTIONS[max(at for at, (word, _) in enumerate(INSTRUCTIONS) if word == "FROM") :]


def test_the_stack_is_valkey_the_publisher_and_three_replicas() -> None:
    assert {name: service.get("scale", 1) for name, service in SERVICES.items()} == {
        "valkey": 1,
        "publisher": 1,
        "replica": 3,
    }


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_locked_down(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"cap_add", "privileged", "network_mode", "pid", "ipc", "devices"}


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_runs_as_a_user_who_is_not_root(name: str) -> None:
    user, group = str(SERVICES[name].get("user", _last("USER"))).split(":")
    assert int(user) > 0
    assert int(group) > 0


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_says_whether_it_is_healthy(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("name", OURS)
def test_health_is_asked_for_at_the_port_that_the_service_listens_on(name: str) -> None:
    command = SERVICES[name]["command"]
    _, program, port, path = SERVICES[name]["healthcheck"]["test"]
    assert (program, port, path) == (HEALTHY.name, command[command.index("--port") + 1], "/health/ready")


def test_ports_are_published_on_loopback_only() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"publisher": ["127.0.0.1:8000:8000"], "replica": ["127.0.0.1:8101-8103:8080"]}


def test_images_are_named_with_a_version() -> None:
    images = [service["image"] for service in SERVICES.values()]
    images += [rest.partition("=")[2] for word, rest in INSTRUCTIONS if word == "ARG"]
    unversioned = [image for image in images if not re.fullmatch(r".+:(?!latest$)[\w.-]+", image)]
    assert unversioned == []


def test_the_log_is_never_evicted() -> None:
    command = SERVICES["valkey"]["command"]
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"


@pytest.mark.parametrize("name", OURS)
def test_the_command_line_takes_what_the_services_are_started_with(name: str) -> None:
    service = SERVICES[name]
    _, _, script, *_ = service.get("entrypoint", ["sh", "-c", 'exec broadcache "$$@"'])
    executed, program, *arguments = shlex.split(script)
    assert (executed, program, arguments.pop()) == ("exec", "broadcache", "$$@")
    command, *options = arguments + service["command"]
    with typer.main.get_group(app).commands[command].make_context(command, options) as context:
        assert context.params["host"] == "0.0.0.0"


def test_the_publisher_takes_the_environment_it_is_given() -> None:
    settings = read_settings(ApiSettings, environment_of("publisher"), listen_host="0.0.0.0")
    assert settings.allow_open
    assert settings.redis_url == "redis://valkey:6379"


def environment_of(name: str) -> dict[str, str]:
    """The environment of a service where the user's own has no variable."""
    given: dict[str, str] = SERVICES[name]["environment"]
    return {variable: re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text) for variable, text in given.items()}


def test_replicas_require_the_token_that_the_publisher_sends() -> None:
    tokens = {name: environment_of(name)["BROADCACHE_REPLICA_TOKEN"] for name in OURS}
    assert len(replica_tokens(tokens["replica"])) == 1
    assert tokens["publisher"] == tokens["replica"]
    assert all(SERVICES[name]["environment"]["BROADCACHE_REPLICA_TOKEN"].startswith("${BROADCACHE_") for name in OURS)


def test_the_entry_point_gets_signals_itself() -> None:
    assert json.loads(_last("ENTRYPOINT")) == ["broadcache"]


def test_the_image_is_unhealthy_only_when_its_process_does_not_answer() -> None:
    _, _, command = _last("HEALTHCHECK").partition("CMD ")
    assert json.loads(command) == [HEALTHY.name, _last("EXPOSE"), "/health/live"]


def test_the_image_ends_as_a_user_who_is_not_root() -> None:
    assert _last("USER") == "10001:10001"
    words = [word for word, _ in LAST_STAGE]
    assert "RUN" not in words[words.index("USER") :]


def test_any_builder_takes_the_dockerfile() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^# *(?:syntax|escape)=|--(?:mount|link|chmod|security)\b|<<", text, re.MULTILINE) == []


def test_dependencies_are_installed_by_hash_and_from_no_index_of_ours() -> None:
    commands = [part for word, rest in INSTRUCTIONS if word == "RUN" for part in rest.split("&&")]
    installs = [part for part in commands if re.search(r"\bpip\b.* (?:install|wheel) ", part)]
    assert installs
    assert [part for part in installs if "--require-hashes" not in part and "--no-deps" not in part] == []
    assert [part for part in installs if re.search(r"index|find-links|trusted", part)] == []


def test_the_image_is_built_from_all_that_the_package_is_made_of_and_no_more() -> None:
    copied = {
        Path(source)
        for word, rest in INSTRUCTIONS
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    admitted = {Path(line[1:]) for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == admitted
    assert [str(path) for path in copied if not (ROOT / path).exists()] == []
    linked = {link.resolve().relative_to(ROOT) for link in (ROOT / "src/broadcache").iterdir() if link.is_symlink()}
    assert {Path("src"), *linked} <= copied


@pytest.fixture
def answering() -> Iterator[HTTPServer]:
    """A server that answers GET /200 with 200, and so on."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"in other words"
            self.send_response(int(self.path.removeprefix("/")))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name it overrides
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_healthy_is_who_answers_200_whatever_proxy_is_named(answering: HTTPServer) -> None:
    found = _healthy(answering.server_port, "/200", http_proxy="http://127.0.0.1:1")
    assert (found.returncode, found.stderr) == (0, "")


def test_unhealthy_is_who_answers_something_else_and_it_is_said_what(answering: HTTPServer) -> None:
    found = _healthy(answering.server_port, "/503")
    assert found.returncode == 1
    assert found.stderr == f"expected 200 from port {answering.server_port}/503, got 503: in other words\n"


def test_unhealthy_is_who_does_not_answer() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        found = _healthy(silent.getsockname()[1], "/200")
    assert found.returncode == 1
    assert "refused" in found.stderr


def test_healthy_can_be_executed() -> None:
    assert os.access(HEALTHY, os.X_OK)


@pytest.mark.parametrize("compose", ["docker-compose", "docker compose"])
def test_compose_takes_the_file_and_complains_of_nothing(compose: str) -> None:
    command = compose.split()
    if shutil.which(command[0]) is None or _run(*command, "version").returncode != 0:
        pytest.skip(f"{compose} is not installed")
    found = _run(*command, "--file", str(ROOT / "docker-compose.yml"), "config", "--quiet")
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def _last(word: str) -> str:
    """What the last stage of the Dockerfile says after the last such word."""
    return [rest for found, rest in LAST_STAGE if found == word][-1]


def _healthy(port: int, path: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return _run(sys.executable, str(HEALTHY), str(port), path, environ=environ)


def _run(*command: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)
