"""Logging of the `broadcache` commands: lines for people, or JSON for machines."""

import json
import logging
from datetime import UTC, datetime
from typing import Annotated, Final, Literal, TypeAlias

from msgspec import Meta

from .settings import Settings

__all__ = ["JsonFormatter", "LogFormat", "LogSettings", "set_up_logging"]

LogFormat: TypeAlias = Literal["text", "json"]

_TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_OWN_FIELDS: Final = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "color_message"})


class LogSettings(Settings, frozen=True, kw_only=True):
    """The settings of a process's logs."""

    log_format: Annotated[
        LogFormat, Meta(description="text for people, json for machines: one object a line, on standard error.")
    ] = "text"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (RFC 3339, UTC), `level`, `logger`, `message`, the fields of `extra`, and `error`
    with the traceback when there is an exception.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return one record as a line of JSON."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, object] = {
            **{name: value for name, value in vars(record).items() if name not in _OWN_FIELDS},
            "time": time,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def set_up_logging(log_format: LogFormat) -> None:
    """Log INFO and above to standard error, unless the root logger of this process has handlers already."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
