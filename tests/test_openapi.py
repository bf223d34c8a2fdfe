"""The OpenAPI document against the servers that it describes, and both against whatever bytes may come."""

import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.command_line import ask, environment, running

pytestmark = pytest.mark.anyio


class _Replica(socketserver.StreamRequestHandler):
    """A replica that likes whatever it gets."""

    def handle(self) -> None:
        lines = iter(self.rfile.readline, b"\r\n")
        headers = dict(line.lower().split(b":", 1) for line in lines if b":" in line.partition(b" ")[0])
        self.rfile.read(int(headers.get(b"content-length", b"0")))
        self.wfile.write(b"HTTP/1.1 204 No Content\r\n\r\n")


@pytest.fixture
def replica() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.2", 0), _Replica) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.2:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def fanout_variables(replica: str, **more: str) -> dict[str, str]:
    """The service of the document's examples, at one replica."""
    return {
        "BROADCACHE_FANOUT_ALLOW": "cache-replicas:8889",
        "BROADCACHE_FANOUT_LISTS": f"cache-replicas={replica}",
        "BROADCACHE_REQUEST_BYTES_MAX": "4096",
        **more,
    }


def schemathesis(url: str, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Let schemathesis try all operations of the document at `url`."""
    command = Path(sys.executable).with_name("schemathesis")
    options = (
        *("--seed", "1", "--generation-deterministic", "--max-examples", "4"),
        *("--phases", "examples,coverage,fuzzing", "--workers", "1", "--no-color", "--generation-allow-x00", "false"),
    )
    return subprocess.run(
        [str(command), "run", f"{url}/openapi.json", *options, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=directory,
        env={**environment(), "NO_PROXY": "*"},
    )


@pytest.mark.timeout(300)
def test_the_publisher_does_what_its_document_says(redis_url: str, replica: str, tmp_path: Path) -> None:
    with running("serve", "--port", "0", "--redis-url", redis_url, **fanout_variables(replica)) as command:
        url = command.url()
        finished = schemathesis(url, tmp_path)
        assert finished.returncode == 0, finished.stdout[-6_000:] + finished.stderr[-2_000:]
        assert ask("POST", f"{url}/cache-replicas/8889/cache-invalidation", {"everything": True})[0] == 200


@pytest.mark.timeout(300)
def test_the_fan_out_alone_does_what_its_document_says(replica: str, tmp_path: Path) -> None:
    variables = fanout_variables(replica, BROADCACHE_FANOUT_FAILURE_STATUS="502", BROADCACHE_TOKENS="swordfish")
    with running("serve", "--fanout-only", "--port", "0", **variables) as command:
        url = command.url()
        finished = schemathesis(url, tmp_path, "--header", "Authorization: Bearer swordfish")
        assert finished.returncode == 0, finished.stdout[-6_000:] + finished.stderr[-2_000:]
