"""What the command line prints when Redis is away, for old entries of the log, and where the output is not UTF-8."""

import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.support.command_line import BROADCACHE, environment, run, running

from broadcache.cli import main
from broadcache.cli.printable import escape_unencodable
from broadcache.cli.watch_printer import TextPrinter
from broadcache.publisher import Publisher
from broadcache.publisher.history.replay import Gap
from broadcache.shared import Invalidation, LinkLost, MalformedFrame, Position

AWAY = "redis://127.0.0.1:1"


def test_a_publish_without_a_connection_was_not_logged_and_an_id_is_logged_once(redis_url: str) -> None:
    failed = run("publish", "--key", "a", "--redis-url", AWAY, "--timeout-seconds", "0.3")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "nothing was logged" in failed.stderr
    assert "may have been logged" not in failed.stderr
    again = [run("publish", "--key", "a", "--redis-url", redis_url, "--json", "--id", "mine") for _ in range(2)]
    assert [json.loads(each.stdout)["id"] for each in again] == ["mine", "mine"]
    assert [json.loads(each.stdout)["sequence"] for each in again] == [1, 1]


def test_a_publish_without_an_answer_names_the_option_for_its_id(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def lost(publisher: Publisher, *targets: object, id: str, **options: object) -> None:
        raise LinkLost(f"it may have been logged: publish again with id={id!r}, which is harmless")

    monkeypatch.setattr(Publisher, "publish", lost)
    monkeypatch.setattr(sys, "argv", ["broadcache", "publish", "--key", "a", "--redis-url", AWAY, "--id", "mine"])
    with pytest.raises(SystemExit):
        main()
    assert "publish again with --id mine, which is harmless" in capsys.readouterr().err


def test_an_id_that_is_too_long_ends_with_2() -> None:
    failed = run("publish", "--key", "a", "--redis-url", AWAY, "--id", "x" * 129)
    assert (failed.returncode, failed.stdout) == (2, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
def test_output_that_cannot_be_written_is_an_error_in_one_line(redis_url: str) -> None:
    at = ("--redis-url", redis_url)
    for arguments in (("--version",), ("publish", "--key", "a", *at), ("doctor", *at), ("replicas", "--json", *at)):
        with Path("/dev/full").open("w") as full:
            finished = subprocess.run(
                [*BROADCACHE, *arguments],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(),
                check=False,
            )
        assert finished.returncode == 1
        if finished.stderr:  # there is nothing to print about no replicas
            assert finished.stderr.startswith("broadcache: the output could not be written (No space left on device)")
            assert len(finished.stderr.splitlines()) == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_output_in_any_encoding_is_printed(redis_url: str, encoding: str) -> None:
    for arguments in (
        ("--help",),
        ("publish", "--key", "über→\U0001f600", "--reason", "…", "--confirm", "--redis-url", redis_url),
        ("doctor", "--redis-url", redis_url),
    ):
        finished = subprocess.run(
            [*BROADCACHE, *arguments], capture_output=True, env=environment(PYTHONIOENCODING=encoding), check=False
        )
        assert b"Traceback" not in finished.stderr, arguments
        assert finished.stdout + finished.stderr
        finished.stdout.decode(encoding)
    with subprocess.Popen(
        [*BROADCACHE, "watch", "--since", "1h", "--redis-url", redis_url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(PYTHONIOENCODING=encoding),
    ) as watch:
        assert watch.stdout is not None
        line = watch.stdout.readline().decode(encoding)
        watch.terminate()
    shown = {
        "ascii": r"keys \u00fcber->\ud83d\ude00",
        "cp1252": r"keys über->\ud83d\ude00",
        "utf-8": "keys über→\U0001f600",
    }
    assert shown[encoding] in line


def test_output_that_cannot_be_encoded_stays_json() -> None:
    program = (
        "import json; from broadcache.cli.printable import escape_unencodable; escape_unencodable();"
        'print(json.dumps({"a": "ü“…”\\U0001f600"}, ensure_ascii=False))'
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=environment(PYTHONIOENCODING="ascii"), check=True
    )
    assert json.loads(finished.stdout) == {"a": "ü'...'\U0001f600"}


def test_streams_that_cannot_be_reconfigured_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as under pythonw
    escape_unencodable()


def test_watch_stamps_an_entry_with_the_time_at_which_it_was_sent(capsys: pytest.CaptureFixture[str]) -> None:
    printer = TextPrinter("products")
    old = datetime(2020, 2, 29, 12, 34, 56, 789_000, UTC)
    printer.on_invalidation(Invalidation(keys=("a",), sent_at_ms=round(old.timestamp() * 1_000)))
    printer.on_invalidation(Invalidation(keys=("b",), sent_at_ms=2**60))
    printer.on_invalidation(Invalidation(keys=("c",)))
    printer.on_gap(Gap("log-trimmed", "gone"))
    printer.on_unreadable(b"now", MalformedFrame("invalid frame"))
    printer.on_unreadable(b"now", MalformedFrame("invalid entry"), Position("E", 7))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{old.astimezone():%Y-%m-%d %H:%M:%S}.789  ")
    # The time of arrival, which is today's.
    assert [line for line in lines[1:5] if not re.match(r"\d\d:\d\d:\d\d\.\d{3}  ", line)] == []
    # The log does not hold the time of an entry that cannot be read.
    assert lines[5].startswith("--:--:--.---  unreadable")


def test_watch_since_does_not_show_old_entries_as_new_ones(redis_url: str) -> None:
    sent_at = datetime(2020, 2, 29, 12, 34, 56, tzinfo=UTC)
    program = """
import asyncio, sys
from broadcache.publisher import Publisher
from broadcache.shared import Keys, invalidation
invalidation.time.time_ns = lambda: int(sys.argv[2]) * 1_000_000_000
async def main():
    async with Publisher(sys.argv[1]) as publisher:
        await publisher.publish(Keys("a"))
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", program, redis_url, str(int(sent_at.timestamp()))], check=True)
    with running("watch", "--redis-url", redis_url, "--since", "2020-01-01T00:00:00Z") as watch:
        assert watch.stdout.readline().startswith(f"{sent_at.astimezone():%Y-%m-%d %H:%M:%S}.000  #1  keys a")
