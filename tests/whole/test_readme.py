"""The README, executed as it stands: its replica, its shell session, its Python, and the output it shows."""

import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.paths import ROOT

from broadcache.publisher.api.settings import ApiSettings
from broadcache.shared.process.settings import variable_of
from broadcache.shared.transport.redis.embedded import EmbeddedServer

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATIENCE_SECONDS = 30


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCK.findall((ROOT / "README.md").read_text()) if found == language]


@contextmanager
def replica(folder: Path, text: str) -> Iterator[int]:
    """Run the README's replica under uvicorn, on a port that this process holds and hands over."""
    (folder / "replica.py").write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-m", "uvicorn", "replica:app", "--fd", str(listener.fileno())]
        process = subprocess.Popen(command, cwd=folder, pass_fds=[listener.fileno()], stderr=subprocess.PIPE)
        try:
            yield listener.getsockname()[1]
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE_SECONDS)


def as_pattern(shown: str) -> str:
    """The output that the README shows, in which … stands for whatever differs from run to run."""
    return re.escape(shown).replace("…", ".+")


def shell_steps(session: str) -> Iterator[tuple[str, str]]:
    """Split a session into commands and the output shown below each."""
    for step in session.removeprefix("$ ").split("\n$ "):
        command, _, shown = step.partition("\n")
        yield command, shown.rstrip("\n")


def output_of(command: list[str], environment: dict[str, str]) -> str:
    ran = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


@pytest.mark.skipif(
    shutil.which("curl") is None, reason="curl, which the README's shell session uses, is not installed"
)
def test_what_the_readme_shows_is_what_happens(own_server: EmbeddedServer, tmp_path: Path) -> None:
    replica_text, publisher_text = (text.replace("redis://127.0.0.1:6379", own_server.url) for text in blocks("python"))
    [session] = blocks("console")
    [shown_by_publisher] = blocks("output")
    environment = os.environ | {
        "BROADCACHE_REDIS_URL": own_server.url,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with replica(tmp_path, replica_text) as port:
        # The listener takes the connection before the replica is up, and the replica answers when it is.
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=PATIENCE_SECONDS) as ready:
            assert ready.status == 200
        for command, shown in shell_steps(session):
            printed = output_of(["bash", "-c", command.replace(":8101", f":{port}")], environment)
            assert re.fullmatch(as_pattern(shown), printed.rstrip("\n")), f"{command}\n{printed}"
        assert output_of([sys.executable, "-c", publisher_text], environment) == shown_by_publisher


@pytest.mark.parametrize("page", sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")}), ids=lambda page: page.name)
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_publishers_page_lists_every_setting_with_its_variable() -> None:
    page = "".join((ROOT / "docs" / name).read_text() for name in ("publisher.md", "fanout.md"))
    documented = set(re.findall(r"^\| `(BROADCACHE_\w+)` \|", page, re.MULTILINE))
    assert documented == {variable_of(name) for name in ApiSettings.__struct_fields__}
