"""Logs: lines for people, JSON for machines, and real processes that write either."""

import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.command_line import run, running

from broadcache.shared.process.logs import JsonFormatter


def record_of(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    record = logging.LogRecord("broadcache.test", logging.WARNING, __file__, 1, message, arguments, None)
    vars(record).update(extra)
    return record


def line_of(record: logging.LogRecord) -> dict[str, Any]:
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line: dict[str, Any] = json.loads(text)
    return line


def test_a_record_is_one_object_with_time_level_logger_and_message() -> None:
    record = record_of("cleared %s: %s", "products", "é\nlog lost")
    record.created = 1_700_000_000.0625
    assert line_of(record) == {
        "time": "2023-11-14T22:13:20.062Z",
        "level": "WARNING",
        "logger": "broadcache.test",
        "message": "cleared products: é\nlog lost",
    }


def test_what_is_given_as_extra_stands_beside_them_and_cannot_replace_them() -> None:
    line = line_of(record_of("m", namespace="products", path=Path("/x"), level="FAKE"))
    assert (line["namespace"], line["path"], line["level"]) == ("products", "/x", "WARNING")


def test_an_error_comes_with_its_traceback() -> None:
    try:
        raise ValueError("what happened")
    except ValueError:
        record = record_of("failed")
        record.exc_info = sys.exc_info()
    assert line_of(record)["error"].endswith("ValueError: what happened")
    assert line_of(record)["error"].startswith("Traceback")


@pytest.mark.parametrize("command", ["serve", "replica"])
def test_a_process_that_is_asked_for_json_writes_nothing_else(command: str, tmp_path: Path) -> None:
    arguments = {
        "serve": ["serve", "--port", "0"],
        "replica": ["replica", "--source", str(tmp_path / "products.db"), "--port", "0"],
    }[command]
    variables = {"BROADCACHE_LOG_FORMAT": "json", "BROADCACHE_REDIS_URL": "redis://127.0.0.1:1"}
    with running(*arguments, **variables) as process:
        process.url()
        code, errors = process.end(signal.SIGTERM)
    assert code in (0, 143)
    lines = [json.loads(line) for line in errors.splitlines()]
    assert lines
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


def test_a_process_that_is_not_asked_writes_lines_for_people() -> None:
    with running("serve", "--port", "0") as process:
        process.url()
        _, errors = process.end(signal.SIGTERM)
    assert "INFO broadcache.publisher: closed http://" in errors


def test_a_format_that_is_none_is_refused(tmp_path: Path) -> None:
    for arguments in (["serve", "--port", "0"], ["replica", "--source", str(tmp_path / "p.db"), "--port", "0"]):
        ran = run(*arguments, BROADCACHE_LOG_FORMAT="xml")
        assert ran.returncode == 2
        assert "BROADCACHE_LOG_FORMAT" in ran.stderr
